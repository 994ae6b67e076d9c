"""RegMean: merges each linear layer by the weights that come closest to every expert's outputs on its own data.

Paper: arXiv 2212.09849.  With the inputs X of a layer in expert i and G = XᵀX, the least squares answer is
W = (Σ G)⁻¹ Σ G W, with the entries of G off the diagonal made smaller so that it stays near the average.
Everything else (embeddings, norms, biases, experts of a mixture that are fused in memory) is averaged.

Notable. Gram matrices are gathered in one forward pass over the items; layers with the same input (q, k and v;
gate and up) share one. The system is solved in double precision for what the answer adds to the average, by
Cholesky, or with the smallest such change where the data leave it open. A head is merged like any linear layer;
one tied to the embedding is averaged with it.

Footguns. A Gram matrix is as large as the layer is wide, squared: on disk about the model again for each expert,
and four of the widest in memory for each thread. Few items decide little: the average then stands.

N: tokens.  I, O: inputs and outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from luthier.checkpoint.roles import live_places
from luthier.checkpoint.totals import Totals
from luthier.fields import Count, Range, Schedule, Unit
from luthier.flows import Ctx, Data, Piece, Subject
from luthier.kit.calibrate import drawn, each_input, linears, sharing
from luthier.kit.deltas import each, shares
from luthier.kit.encode import Row
from luthier.kit.schedule import at
from luthier.shapes import Reduces, Transform


class Measured(NamedTuple):
    """The Gram matrices of one expert. owners: a tensor's name → (its Gram matrix, whether it lies as (in, out)).
    share: what a matrix is multiplied by before experts are weighed."""

    grams: Totals
    owners: Mapping[str, tuple[str, bool]]
    share: float


class RegMean(Transform):
    examples: Count = 256
    """training items of its own data that each expert is looked at with"""
    max_length: Annotated[int, Range(8)] = 512
    """tokens of an item at most"""
    ratio: Unit = 0.9
    """factor of the entries off a Gram matrix's diagonal: 1 is plain least squares, 0 weighs input by input"""
    per: Literal["sum", "token"] = "sum"
    """Gram matrices as sums, so that longer data weigh more (the formula), or as means over tokens (released code)"""
    ridge: Annotated[Schedule, Range(0.0)] = 1e-6
    """pulls towards the average: a share of the mean of the summed matrix's diagonal, added to it"""
    weights: tuple[Schedule, ...] | None = None
    """one factor an expert, in the averages and of its Gram matrices; none means 1 each"""

    granularity = "tensor"
    roles = ("base?", "experts*", "data*")
    kept = 1.0
    reduces_to = (
        Reduces({}, "identity", given={"experts": 1}, tolerance=1e-6),
        Reduces({"ridge": 1e9}, "merge.linear", tolerance=1e-5),
        Reduces({"ridge": 1e9, "weights": (0.5, 1.5, 1.0)}, "merge.linear", tolerance=1e-5),
    )
    departures = (
        "bloomberg/dataless-model-merging 92247ae: `compute_grams` divides by the number of tokens, where the formula "
        "sums, so that an expert with more data counts no more; set per: token for theirs "
        "(tests/golden/test_merge_regmean.py::test_sums_or_means)",
    )

    def passes(self, experts: int) -> float:
        return 1.0

    def cubic(self, experts: int) -> float:
        return 0.35 * (experts + 1)

    def plan(self, inputs: Any) -> Any:
        shares("weights", self.weights, inputs)
        return inputs

    def survey(self, inputs: Any, ctx: Ctx) -> list[Measured]:
        """The Gram matrices of every expert."""
        pairs = zip(ctx.role("subjects"), ctx.role("data"), strict=True)
        return [self._of(i, subject, source, inputs, ctx) for i, (subject, source) in enumerate(pairs)]

    @torch.no_grad()
    def _of(self, number: int, subject: Subject, source: Data, inputs: Any, ctx: Ctx) -> Measured:
        with subject.open() as (model, tokenizer):
            rows = drawn(source, tokenizer, self.examples, self.max_length, ctx)
            found = linears(model)
            layers = {name: layer for name, (layer, _) in found.items()}
            owner = sharing(layers, lambda: _run(model, rows[0][1]))
            places = live_places(model, inputs.tensors)
            shapes = dict(model.named_parameters())
            owners = {n: (owner[p.live], found[p.live][1]) for n, p in places.items() if p.live in owner}
            widths = {o: shapes[o].shape[0 if found[o][1] else 1] for o in owner.values()}
            folder = Path(str(ctx.scratch)) / f"grams{number}"
            grams = Totals(folder, {o: (width, width) for o, width in widths.items()})

            def take(name: str, x: Tensor) -> None:
                x_NI = x.detach().reshape(-1, x.shape[-1]).float()
                grams.add_(name, x_NI.T @ x_NI)

            with each_input({o: layers[o] for o in widths}, take):
                for _, row in ctx.progress(rows, what=f"{subject.name} on {source.name}"):
                    _run(model, row)
        tokens = sum(len(row.input_ids) for _, row in rows)
        return Measured(grams, owners, 1.0 if self.per == "sum" else 1 / tokens)

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        weights = each(self.weights, 1.0, tensors, len(tensors.experts))
        mean = torch.zeros_like(tensors.experts[0])
        for weight, expert in zip(weights, tensors.experts, strict=True):
            mean.add_(expert, alpha=weight / sum(weights))
        if not all(tensors.name in measured.owners for measured in ctx.survey):
            return mean
        return mean.add_(self._change(tensors, mean, weights, ctx.survey).to(mean))

    def _change(self, piece: Piece, mean: Tensor, weights: list[float], survey: list[Measured]) -> Tensor:
        """What the least squares answer adds to the average, in double precision."""
        ratio = at(self.ratio, piece.name, piece.depth)
        ridge = at(self.ridge, piece.name, piece.depth)
        turned = survey[0].owners[piece.name][1]
        left_II, right_IO = torch.zeros(0), torch.zeros(0)
        for i, (weight, expert, measured) in enumerate(zip(weights, piece.experts, survey, strict=True)):
            gram_II = measured.grams.read(measured.owners[piece.name][0]).double().mul_(weight * measured.share)
            diagonal_I = gram_II.diagonal().clone()
            gram_II.mul_(ratio).diagonal().copy_(diagonal_I)
            apart = (expert - mean).cpu().double()
            right = gram_II @ (apart if turned else apart.T)
            left_II, right_IO = (left_II.add_(gram_II), right_IO.add_(right)) if i else (gram_II, right)
        left_II.diagonal().add_(ridge * left_II.diagonal().mean())
        change_IO = _solved(left_II, right_IO)
        return change_IO if turned else change_IO.T


def _run(model: nn.Module, row: Row) -> None:
    device = next(model.parameters()).device
    model(input_ids=torch.tensor([row.input_ids], device=device), use_cache=False)


def _solved(left_II: Tensor, right_IO: Tensor) -> Tensor:
    """The solution, or the smallest of several."""
    factor_II, failed = torch.linalg.cholesky_ex(left_II)
    if not int(failed):
        return torch.cholesky_solve(right_IO, factor_II)
    return torch.linalg.lstsq(left_II, right_IO, driver="gelsd").solution
