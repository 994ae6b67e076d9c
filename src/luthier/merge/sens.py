"""Sens-Merging: weighs experts layer by layer, by how much a layer matters to its task and how far its outputs lie.

Paper: arXiv 2502.12420.  Within a task: the mean over items of Σ |θ · ∂loss/∂θ| over a layer, divided by the
length of these numbers over all layers. Across tasks: the mean distance of an expert's logits to each other
expert's on that one's data, as a share of all experts' distances. A softmax over experts of the product gives
their coefficients, which multiply their changes; n experts with equal ones add up as in task arithmetic.

Notable. Each tensor outside the layers is a layer of its own. Models are looked at one at a time; of the logits
some places an item are kept on disk.

There is no official code, and the full paper could not be consulted: that a larger distance weighs more
(`transfer: distance`) is how its formula is reported; its words, that models which help others are preferred,
would have it the other way (`transfer: closeness`).

Footgun: products of normalised numbers differ little, so at a temperature of 1 the softmax is nearly even.

N: entries of a stretch, or places.  V: words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.checkpoint.roles import live_places
from luthier.checkpoint.totals import Totals
from luthier.fields import Count, Range, Schedule
from luthier.flows import Ctx, Piece
from luthier.kit.calibrate import drawn, each_gradient
from luthier.kit.deltas import add, changes, one_each
from luthier.kit.encode import Row, pad_id
from luthier.kit.likelihood import on_device
from luthier.kit.logits import labelled
from luthier.kit.schedule import at
from luthier.shapes import Reduces, Transform

Rows = Sequence[tuple[str, Row]]


class Sens(Transform):
    examples: Count = 100
    """training items of its own data that each expert is looked at with"""
    max_length: Annotated[int, Range(8)] = 512
    """tokens of an item at most"""
    places: Count = 32
    """labelled places of an item, drawn at random, at which logits are compared"""
    within: bool = True
    """weigh layers by how much they matter to their own task"""
    across: bool = True
    """weigh experts by how far their outputs lie from the others'"""
    transfer: Literal["distance", "closeness"] = "distance"
    """what weighs more across tasks: to be far from the others, or near"""
    temperature: Annotated[Schedule, Range(0.0, above=True)] = 1.0
    """of the softmax; a large one makes all coefficients equal"""
    scale: Schedule = 1.0
    """factor of the weighed sum of changes: a number, a list by depth, or {glob: either}"""

    roles = ("base", "experts*", "data*")
    reduces_to = (
        Reduces({"temperature": 1e9}, "merge.task_arithmetic", tolerance=1e-6),
        Reduces({"within": False, "across": False, "scale": 0.5}, "merge.task_arithmetic", tolerance=1e-6),
    )

    def passes(self, experts: int) -> float:
        return 3.0 * self.within + experts * self.across

    def plan(self, inputs: Any) -> Any:
        one_each("temperature", [self.temperature] * len(inputs.experts), inputs)
        return inputs

    def survey(self, inputs: Any, ctx: Ctx) -> dict[str, list[float]]:
        """Coefficients by tensor name, one an expert."""
        subjects, count = ctx.role("subjects"), len(inputs.experts)
        groups = {name: str(name if info.layer is None else info.layer) for name, info in inputs.tensors.items()}
        within: list[dict[str, float]] = []
        kept: list[tuple[Rows, Totals]] = []
        for i in range(count):
            sensitivity, one = self._own(i, groups, ctx)
            within.append(sensitivity)
            kept.append(one)
        distances = [0.0] * count
        for i in range(count if self.across and count > 1 else 0):
            with subjects[i].open() as (model, tokenizer):
                others = [kept[j] for j in range(count) if j != i]
                distances[i] = sum(self._distance(model, pad_id(tokenizer), rows, own, ctx) for rows, own in others)
        share = self._share(distances)
        weighed = {g: [s[g] * t for s, t in zip(within, share, strict=True)] for g in set(groups.values())}
        hot = {name: at(self.temperature, name, info.depth) for name, info in inputs.tensors.items()}
        return {name: _softmax([v / hot[name] for v in weighed[group]]) for name, group in groups.items()}

    def _share(self, distances: list[float]) -> list[float]:
        """What each expert counts across tasks; all together 1."""
        total, count = sum(distances), len(distances)
        if not self.across or not total:
            return [1 / count] * count
        shares = [distance / total for distance in distances]
        return shares if self.transfer == "distance" else [(1 - share) / (count - 1) for share in shares]

    def _own(self, number: int, groups: dict[str, str], ctx: Ctx) -> tuple[dict[str, float], tuple[Rows, Totals]]:
        """How much each layer matters to an expert on its own data, and its logits there."""
        subject, source = ctx.role("subjects")[number], ctx.role("data")[number]
        what = f"{subject.name} on {source.name}"
        with subject.open() as (model, tokenizer):
            rows = drawn(source, tokenizer, self.examples, self.max_length, ctx)
            sensitivity = self._sensitivity(model, pad_id(tokenizer), rows, groups, what, ctx)
            width = model.get_output_embeddings().weight.shape[0]
            counts = {item: (min(self.places, row.count), width) for item, row in rows}
            logits = Totals(Path(str(ctx.scratch)) / f"logits{number}", counts if self.across else {})
            for item, row in rows if self.across else ():
                logits.add_(item, self._logits(model, pad_id(tokenizer), item, row, ctx))
        return sensitivity, (rows, logits)

    def _sensitivity(
        self, model: nn.Module, pad: int, rows: Rows, groups: dict[str, str], what: str, ctx: Ctx
    ) -> dict[str, float]:
        """By layer, with a Euclidean length of 1."""
        total = dict.fromkeys(groups.values(), 0.0)
        if not self.within:
            return dict.fromkeys(total, 1.0)
        values = {name: p.detach() for name, p in model.named_parameters()}
        lying: dict[str, list[tuple[str, slice]]] = {}
        for name, place in live_places(model, groups).items():
            stretch = slice(place.start, place.start + math.prod(place.shape))
            lying.setdefault(place.live, []).append((groups[name], stretch))

        def take(live: str, gradient: Tensor) -> None:
            product_N = (values[live] * gradient).abs().view(-1)
            for group, stretch in lying.get(live, ()):
                total[group] += float(product_N[stretch].sum(dtype=torch.float64))

        with each_gradient(model, take):
            for _, row in ctx.progress(rows, what=what):
                seen = labelled(model, on_device([row], pad, model))
                F.cross_entropy(seen.head(seen.h_ND).float(), seen.y_N).backward()
        length = math.sqrt(sum(value * value for value in total.values())) or 1.0
        return {group: value / length for group, value in total.items()}

    def _distance(self, model: nn.Module, pad: int, rows: Rows, own: Totals, ctx: Ctx) -> float:
        """The mean over items of the mean distance between a model's logits and those of the data's own expert."""
        apart = [
            float((self._logits(model, pad, item, row, ctx) - own.read(item)).norm(dim=-1).mean())
            for item, row in ctx.progress(rows, what="distances")
        ]
        return sum(apart) / len(apart)

    @torch.no_grad()
    def _logits(self, model: nn.Module, pad: int, item: str, row: Row, ctx: Ctx) -> Tensor:
        seen = labelled(model, on_device([row], pad, model))
        chosen_N = torch.randperm(row.count, generator=ctx.rng("places", item))[: self.places].sort().values
        return seen.head(seen.h_ND[chosen_N.to(seen.h_ND.device)]).float().cpu()

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        total_N = torch.zeros_like(tensors.experts[0])
        for coefficient, change_N in zip(ctx.survey[tensors.name], changes(tensors), strict=True):
            total_N.add_(change_N, alpha=coefficient * len(tensors.experts))
        return add(tensors, total_N, at(self.scale, tensors.name, tensors.depth))


def _softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]
