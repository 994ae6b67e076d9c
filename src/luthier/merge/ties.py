"""TIES: trim small changes, elect a sign for each entry, average the changes that agree with it.

Paper: arXiv 2306.01708.  Three steps on the experts' changes: keep the largest share of each by
magnitude, over the whole model; elect each entry's sign by the larger total mass; average the trimmed
changes of that sign, counting only the experts that have one. An entry whose masses cancel exactly
takes the sign that most entries elected, and stays at the base if these balance too.

Footguns: the default density keeps one entry in five; experts whose changes are already sparser than
that are not trimmed at all. A merged change is an average, not a sum, so `scale` above 1 is common.
Entries that equal the smallest one that stays stay too, so that more than the density may: changes of bfloat16
models have many such, and mergekit takes exactly its count of them.

N: entries of a stretch.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from luthier.errors import LuthierError
from luthier.fields import Schedule, Unit
from luthier.flows import Ctx, Piece
from luthier.kit.deltas import each, one_each
from luthier.kit.schedule import at
from luthier.kit.select import kept, largest
from luthier.kit.sieve import Sieve, fused, least, magnitudes, votes
from luthier.kit.vote import tied
from luthier.shapes import Reduces, Transform


class Ties(Transform):
    density: Unit = 0.2
    """share of each change that survives the trim; by depth or name only with scope: tensor"""
    scope: Literal["model", "tensor"] = "model"
    """what a trim threshold is computed over"""
    scale: Schedule = 1.0
    """factor of the merged change: a number, a list by depth, or {glob: either}"""
    densities: tuple[Unit, ...] | None = None
    """one density an expert, in place of `density`"""
    weights: tuple[Schedule, ...] | None = None
    """one factor an expert, which multiplies its change before the vote; the paper has none"""
    normalize: bool = True
    """divide by the weights of the experts that agree; false adds them up"""
    on_tie: Literal["majority", "plus"] = "majority"
    """sign of an entry whose masses cancel: the majority's (the paper's code) or plus (mergekit)"""

    reduces_to = Reduces({"density": 1.0}, "merge.task_arithmetic", given={"experts": 1})
    departures = (
        "mergekit 0.1.5 (git a6e4028): `ties` trims tensor by tensor, not over the model, keeps everything unless "
        "`density` is given, lets weights vote on the sign and breaks ties to plus; its merges differ from the "
        "paper's unless asked for here with scope, weights and on_tie "
        "(tests/golden/test_merge_ties.py::test_mergekit_form_differs_from_the_paper)",
        "prateeky2806/ties-merging 44e7891: `topk_values_mask` keeps one entry more than the stated share and fails "
        "at a share of 1; a merge differs from ours in that entry "
        "(tests/golden/test_merge_ties.py::test_released_code_keeps_one_more)",
        "prateeky2806/ties-merging 44e7891: where masses cancel and elected signs balance over the model, "
        "`disjoint_merge` takes the mean of the negative changes; ours leaves the base "
        "(tests/golden/test_merge_ties.py::test_released_code_turns_balance_negative)",
    )

    def check(self) -> None:
        varied = [s for s in (self.density, *(self.densities or ())) if not isinstance(s, float)]
        if self.scope == "model" and varied:
            raise LuthierError("a density by depth or name needs a threshold a tensor", where=self.id,
                               do="set scope: tensor")  # fmt: skip

    def plan(self, inputs: Any) -> Any:
        one_each("weights", self.weights, inputs)
        one_each("densities", self.densities, inputs)
        return inputs

    def survey(self, inputs: Any, ctx: Ctx) -> tuple[dict[str, list[float]], float | None]:
        """Trim thresholds by tensor name, one an expert, and the sign that most entries elect."""
        if self.scope == "model":
            whole = self._cuts(inputs, next(iter(inputs.tensors.values())))
            cuts = dict.fromkeys(inputs.tensors, whole)
        else:
            apart = {name: tensor for name, tensor in inputs.tensors.items() if not inputs.at_once(name)}
            cuts = {name: self._cuts(inputs.only(name), tensor) for name, tensor in apart.items()}
        return cuts, tied(
            self.on_tie, inputs, lambda piece: votes(piece, self._trim(piece, cuts), self._weights(piece))
        )

    def _cuts(self, inputs: Any, tensor: Any) -> list[float]:
        """The smallest magnitude that survives, one an expert, over all of `inputs`."""
        keep = self._keep(tensor, len(inputs.experts), inputs.count)
        return largest(
            lambda sample, see: inputs.each(lambda piece: see(magnitudes(piece)), sample=sample),
            keep, inputs.count, inputs.room,
        )  # fmt: skip

    def _keep(self, tensor: Any, experts: int, count: int) -> list[int]:
        """How many of `count` entries survive, one an expert."""
        return [kept(density, count) for density in each(self.densities, self.density, tensor, experts)]

    def _trim(self, piece: Piece, cuts: dict[str, list[float]]) -> Sieve:
        """What survives; of a tensor that was not surveyed the piece shows all."""
        low = cuts.get(piece.name)
        if low is None:
            low = least(piece, self._keep(piece, piece.count, math.prod(piece.shape)))
        return Sieve(low=low)

    def _weights(self, piece: Piece) -> list[float]:
        return each(self.weights, 1.0, piece, piece.count)

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        cuts, majority = ctx.survey
        trimmed, weights = self._trim(tensors, cuts), self._weights(tensors)
        scale = at(self.scale, tensors.name, tensors.depth)
        return fused(tensors, trimmed, weights, weights, majority, self.normalize, scale)
