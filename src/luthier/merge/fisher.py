"""Fisher merge: averages models entry by entry, each weighed by how much its likelihood hangs on the entry.

Paper: arXiv 2111.09832.  The weight is the diagonal of the Fisher information: the mean over examples of the
squared gradient of log p(y|x), with y drawn from the model itself. A row of a language model is one example;
its labels are drawn at every labelled place, given the row's own text before it.

Notable. One example goes through at a time, and each parameter's gradient is squared into a file as soon as it is
complete: beyond the model in fp32 there is one tensor's gradient in memory. Tied tensors get the gradient of both
uses. Tensors that the loaded model does not have are averaged.

Footguns. The Fisher of a large model is mostly smaller than the paper's floor of 1e-6, and where every expert's
is, the plain average results: the log says how much of each lies below. The authors' code raises only the first
model to the floor, so that this one wins there. The experts must descend from one model.

N: entries of a stretch, or labelled places.  V: words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.checkpoint.roles import live_places
from luthier.checkpoint.totals import Totals
from luthier.errors import LuthierError
from luthier.fields import Count, Range, Schedule
from luthier.flows import Ctx, Data, Piece, Subject
from luthier.kit.calibrate import drawn, each_gradient, sampled
from luthier.kit.deltas import each, one_each, shares
from luthier.kit.encode import Row, pad_id
from luthier.kit.likelihood import on_device
from luthier.kit.logits import labelled
from luthier.kit.schedule import at
from luthier.shapes import Reduces, Transform


class Measured(NamedTuple):
    """The Fisher of one expert. sums: by tensor.  share: what a sum counts, the mean over examples.
    factor: what the whole is multiplied by before experts are weighed."""

    sums: Totals
    share: float
    factor: float


class Fisher(Transform):
    examples: Count = 256
    """training items of its own data that each expert is looked at with"""
    max_length: Annotated[int, Range(8)] = 512
    """tokens of an item at most"""
    labels: Literal["sampled", "gold"] = "sampled"
    """what the likelihood is of: words drawn from the model (the Fisher), or the data's own (the empirical one)"""
    batch: Count = 1
    """examples whose gradients are added before they are squared; above 1 (released peers) it is no Fisher"""
    floor: Annotated[Schedule, Range(0.0, above=True)] = 1e-6
    """least weight of an entry, before anything is normalised"""
    balance: bool = True
    """divide each expert's weights by their Euclidean length over the whole model"""
    weights: tuple[Schedule, ...] | None = None
    """one factor an expert, which multiplies its Fisher; none means 1 each"""

    roles = ("base?", "experts*", "data*")
    kept = 1.0
    reduces_to = (
        Reduces({"floor": 1e9, "balance": False}, "merge.linear", tolerance=1e-6),
        Reduces({"floor": 1e9, "balance": False, "weights": (0.5, 1.5, 1.0)}, "merge.linear", tolerance=1e-6),
    )
    departures = (
        "yule-BUAA/MergeLM 6d49ad9 and fusion-bench 1a28175: `fisher_merging` sums sqrt(p) log p over labels and "
        "examples before it squares the gradient, so labels cancel: of two equally likely ones the weight is 0, where "
        "the Fisher is largest (tests/golden/test_merge_fisher.py::test_peers_cancel_labels)",
    )

    def passes(self, experts: int) -> float:
        return 3.0

    def plan(self, inputs: Any) -> Any:
        shares("weights", self.weights, inputs)
        one_each("floor", [self.floor] * len(inputs.experts), inputs)
        return inputs

    def survey(self, inputs: Any, ctx: Ctx) -> list[Measured]:
        """The Fisher of every expert."""
        pairs = zip(ctx.role("subjects"), ctx.role("data"), strict=True)
        return [self._of(i, subject, source, inputs, ctx) for i, (subject, source) in enumerate(pairs)]

    def _of(self, number: int, subject: Subject, source: Data, inputs: Any, ctx: Ctx) -> Measured:
        with subject.open() as (model, tokenizer):
            places = live_places(model, inputs.tensors)
            if not places:
                raise LuthierError("has none of the tensors that are to be merged", where=subject.name)
            folder = Path(str(ctx.scratch)) / f"fisher{number}"
            sums = Totals(folder, {name: place.shape for name, place in places.items()})
            owners: dict[str, list[tuple[str, int]]] = {}
            for name, place in places.items():
                owners.setdefault(place.live, []).append((name, place.start))

            def take(live: str, gradient: Tensor) -> None:
                squared_N = gradient.float().square().view(-1)
                for name, start in owners.get(live, ()):
                    sums.add_(name, squared_N[start : start + sums.tensors[name].numel])

            rows = drawn(source, tokenizer, self.examples, self.max_length, ctx)
            batches = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
            with each_gradient(model, take):
                for batch in ctx.progress(batches, what=f"{subject.name} on {source.name}"):
                    self._nll(model, batch, pad_id(tokenizer), ctx).backward()
        floors = {name: at(self.floor, name, inputs.tensors[name].depth) * len(rows) for name in sums.tensors}
        of = f" of {self.floor:g}" if isinstance(self.floor, float) else ""
        below = sums.below(floors) / max(inputs.count, 1)
        ctx.emit("log", text=f"{subject.name}: {below:.0%} of its Fisher lies below the floor{of}")
        length = sums.norm() / len(rows)
        return Measured(sums, 1 / len(rows), 1 / length if self.balance and length else 1.0)

    def _nll(self, model: nn.Module, batch: list[tuple[str, Row]], pad: int, ctx: Ctx) -> Tensor:
        """Of the labels of these rows, summed; its gradient has the same squares as the log-likelihood's."""
        seen = labelled(model, on_device([row for _, row in batch], pad, model))
        logits_NV = seen.head(seen.h_ND).float()
        y_N = seen.y_N
        if self.labels == "sampled":
            y_N = sampled(logits_NV, ctx.rng("labels", [item for item, _ in batch]))
        return F.cross_entropy(logits_NV, y_N, reduction="sum")

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        weights = each(self.weights, 1.0, tensors, len(tensors.experts))
        merged_N, total_N = torch.zeros_like(tensors.experts[0]), torch.zeros_like(tensors.experts[0])
        for weight, expert_N, measured in zip(weights, tensors.experts, ctx.survey, strict=True):
            fisher_N = self._fisher(measured, tensors, expert_N)
            merged_N.addcmul_(fisher_N, expert_N, value=weight)
            total_N.add_(fisher_N, alpha=weight)
        return merged_N.div_(total_N)

    def _fisher(self, measured: Measured, piece: Piece, like_N: Tensor) -> Tensor:
        """An expert's weights for a piece; where nothing was measured, equal ones."""
        if piece.name not in measured.sums.tensors:
            return torch.ones_like(like_N)
        floor = at(self.floor, piece.name, piece.depth)
        sums_N = measured.sums.read_flat(piece.name, piece.start, like_N.numel()).to(like_N.device)
        return sums_N.mul_(measured.share).clamp_(min=floor).mul_(measured.factor)
