"""DARE: drop most of each change at random, rescale what is left so that its expectation stays, then merge.

Paper: arXiv 2311.03099.  A step before other merges: what is left is added up, averaged (normalize), or put
to TIES' vote on signs. Which entries stay depends on the seed, the step, the tensor, the expert's number and
the entry's place, and on nothing else.

Footguns: it works where changes are small, as after fine-tuning on instructions; dropping 9 in 10 entries
of a large change breaks the model. The number of an expert decides what it loses, so another order of the
experts is another draw.

N: entries of a stretch.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from luthier.fields import Schedule, Unit
from luthier.flows import Ctx, Piece
from luthier.kit.deltas import each, one_each
from luthier.kit.mass import restoring
from luthier.kit.noise import Draws
from luthier.kit.schedule import at
from luthier.kit.sieve import Sieve, fused, masses, votes
from luthier.kit.vote import divisible, tied
from luthier.shapes import Reduces, Transform

Factors = dict[str, list[float]]


class Dare(Transform):
    density: Unit = 0.1
    """share of each change that stays: 1 minus the paper's drop rate"""
    rescale: Literal["expectation", "l1", "none"] = "expectation"
    """what stays is divided by the density (the paper), or brought to its tensor's old L1 norm (mergekit)"""
    scale: Schedule = 1.0
    """factor of the merged change: a number, a list by depth, or {glob: either}"""
    densities: tuple[Unit, ...] | None = None
    """one density an expert, in place of `density`"""
    weights: tuple[Schedule, ...] | None = None
    """one factor an expert; none means 1 each"""
    vote: Literal["none", "majority", "plus"] = "none"
    """none adds all changes; else only those of the sign with more mass, and a tie takes the majority's or plus"""
    normalize: bool = False
    """divide by the sum of the weights, of all experts or of those that agree, as TIES does"""

    ordered = True
    partial = True
    reduces_to = (
        Reduces({"density": 1.0}, "merge.task_arithmetic"),
        Reduces({"density": 1.0, "vote": "majority", "normalize": True}, "merge.ties"),
    )
    departures = (
        "mergekit 0.1.5 (git a6e4028): `dare_linear` and `dare_ties` rescale each tensor to its L1 norm before the "
        "drop, not by 1 over the density; what stays is then not unbiased entry by entry, and differs from the paper "
        "unless asked for here with rescale: l1 (tests/golden/test_merge_dare.py::test_mergekit_rescales_by_l1)",
    )

    def plan(self, inputs: Any) -> Any:
        one_each("weights", self.weights, inputs)
        one_each("densities", self.densities, inputs)
        if self.normalize and self.vote == "none":
            divisible(self.weights, inputs)
        return inputs

    def keeps(self, inputs: Any) -> int:
        """A bit an entry and model, if the draws are needed again."""
        return sum(-(-entries // 8) * changes for entries, changes in self._counts(inputs).values()) * self._again

    @property
    def _again(self) -> bool:
        return self.rescale == "l1" or self.vote == "majority"

    def _counts(self, inputs: Any) -> dict[str, tuple[int, int]]:
        """name: entries of each change, and how many changes."""
        return {name: (info.numel, len(inputs.made_from(name))) for name, info in inputs.tensors.items()}

    def survey(self, inputs: Any, ctx: Ctx) -> tuple[Factors, float | None, Draws]:
        """What restores each tensor's mass; what a tie elects, None without a vote; what was drawn for either."""
        draws = Draws(self._counts(inputs), ctx.scratch, several=self._again)
        factors: Factors = {}
        if self.rescale == "l1":
            factors = restoring(inputs, lambda piece: masses(piece, self._drawn(piece, ctx, draws)))
            draws.seal()
        tie = tied(
            self.vote, inputs,
            lambda piece: votes(piece, self._drawn(piece, ctx, draws), self._factors(piece, factors)),
        )  # fmt: skip
        draws.seal()
        return factors, tie, draws

    def _densities(self, piece: Piece) -> list[float]:
        return each(self.densities, self.density, piece, piece.count)

    def _drawn(self, piece: Piece, ctx: Ctx, draws: Draws) -> Sieve:
        """What the draw leaves of every expert's change."""
        which, count = piece.which or range(piece.count), math.prod(piece.seen)
        return Sieve(found=[
            draws.found(piece.name, number, ctx.key(piece.name, expert), piece.start, count, density)
            for number, (expert, density) in enumerate(zip(which, self._densities(piece), strict=True))
        ])  # fmt: skip

    def _factors(self, piece: Piece, restored: Factors) -> list[float]:
        """Weights times rescales."""
        rescales = restored.get(piece.name, [1.0] * piece.count)
        if self.rescale == "expectation":
            rescales = [1 / density if density else 1.0 for density in self._densities(piece)]
        return [w * r for w, r in zip(each(self.weights, 1.0, piece, len(rescales)), rescales, strict=True)]

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        factors, tie, draws = ctx.survey
        weights = each(self.weights, 1.0, tensors, tensors.count)
        stays, by = self._drawn(tensors, ctx, draws), self._factors(tensors, factors)
        return fused(tensors, stays, by, weights, tie, self.normalize, at(self.scale, tensors.name, tensors.depth))
