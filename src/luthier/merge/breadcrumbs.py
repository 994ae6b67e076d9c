"""Model Breadcrumbs: drop the largest changes as outliers and the smallest as noise, add up what lies between.

Paper: arXiv 2312.06795.  Of each row of each change (the last dimension; a vector is one row) the largest
magnitudes go, then the next largest stay, as many as the density says, and the rest goes. Nothing is rescaled.

Footguns: `density` is the share that stays, the paper's code calls it beta; its trials keep about 0.15 and drop
0.006 as outliers. Entries that equal one that stays stay too: changes of bfloat16 models have many such.

R: rows.  C: columns.  N: entries of a stretch.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from luthier.fields import Schedule, Unit
from luthier.flows import Ctx, Piece
from luthier.kit.deltas import changes, each, one_each
from luthier.kit.schedule import at
from luthier.kit.select import largest, largest_in, row_band
from luthier.kit.sieve import Sieve, fused, magnitudes, votes
from luthier.kit.vote import divisible, tied
from luthier.shapes import Reduces, Transform

Band = list[tuple[float, float]]


class Breadcrumbs(Transform):
    density: Unit = 0.15
    """share of each change that stays"""
    gamma: Unit = 0.006
    """share of each change that is dropped as outliers, the largest magnitudes first, as far as density leaves room"""
    scope: Literal["row", "tensor"] = "row"
    """what shares are taken of: each row (the paper's code) or the whole tensor (mergekit)"""
    scale: Schedule = 1.0
    """factor of the merged change: a number, a list by depth, or {glob: either}"""
    densities: tuple[Unit, ...] | None = None
    """one density an expert, in place of `density`"""
    gammas: tuple[Unit, ...] | None = None
    """one share of outliers an expert, in place of `gamma`"""
    weights: tuple[Schedule, ...] | None = None
    """one factor an expert; none means 1 each"""
    vote: Literal["none", "majority", "plus"] = "none"
    """none adds all changes; else only those of the sign with more mass, and a tie takes the majority's or plus"""
    normalize: bool = False
    """divide by the sum of the weights, of all experts or of those that agree, as TIES does"""

    granularity = "row"
    reduces_to = (
        Reduces({"density": 1.0, "gamma": 0.0}, "merge.task_arithmetic"),
        Reduces(
            {"density": 0.25, "gamma": 0.0, "scope": "tensor", "vote": "majority", "normalize": True}, "merge.ties"
        ),
    )
    departures = (
        "mergekit 0.1.5 (git a6e4028): `breadcrumbs` takes shares of a whole tensor, the paper's code of each row; "
        "rows that moved little lose more there, unless asked for here with scope: row "
        "(tests/golden/test_merge_breadcrumbs.py::test_scopes_differ)",
    )

    def plan(self, inputs: Any) -> Any:
        for field in ("weights", "densities", "gammas"):
            one_each(field, getattr(self, field), inputs)
        if self.normalize and self.vote == "none":
            divisible(self.weights, inputs)
        return inputs

    def _ranks(self, tensor: Any, experts: int, count: int) -> list[tuple[int, int]]:
        """Of `count` magnitudes, the first and the last that stays, counted from the largest; the last is 0 if none."""
        ranks = []
        gammas = each(self.gammas, self.gamma, tensor, experts)
        for density, gamma in zip(each(self.densities, self.density, tensor, experts), gammas, strict=True):
            keep = int(density * count)
            top = min(int(gamma * count), count - keep)
            ranks.append((top + min(keep, 1), top + keep if keep else 0))
        return ranks

    def survey(self, inputs: Any, ctx: Ctx) -> tuple[dict[str, Band], float | None]:
        """With scope tensor the magnitudes between which a change stays; and what a tie elects, None without a vote."""
        cuts: dict[str, Band] = {}
        if self.scope == "tensor":
            apart = {name: tensor for name, tensor in inputs.tensors.items() if not inputs.at_once(name)}
            cuts = {name: self._cuts(inputs.only(name), tensor) for name, tensor in apart.items()}
        return cuts, tied(self.vote, inputs, lambda piece: votes(piece, self._band(piece, cuts), self._weights(piece)))

    def _cuts(self, inputs: Any, tensor: Any) -> Band:
        """Of one tensor, (the smallest magnitude that stays, the largest) of every expert."""
        every = [rank for pair in self._ranks(tensor, len(inputs.experts), inputs.count) for rank in pair]
        found = largest(
            lambda sample, see: inputs.each(lambda p: see(_twice(p)), sample), every, inputs.count, inputs.room
        )
        return list(zip(found[1::2], found[::2], strict=True))

    def _band(self, piece: Piece, cuts: dict[str, Band]) -> Sieve:
        """What is neither an outlier nor small, of every expert's change."""
        if piece.name in cuts:
            band = cuts[piece.name]
        elif self.scope == "tensor":  # the piece shows all of it
            twice = _twice(piece)
            ranks = self._ranks(piece, piece.count, twice[0].numel())
            found = largest_in(twice, [rank for pair in ranks for rank in pair])
            band = list(zip(found[1::2], found[::2], strict=True))
        else:
            ranks = self._ranks(piece, piece.count, piece.seen[-1])
            band = [row_band(change_RC.abs_(), *rank) for change_RC, rank in zip(changes(piece), ranks, strict=True)]
        return Sieve(low=[low for low, _ in band], high=[high for _, high in band])

    def _weights(self, piece: Piece) -> list[float]:
        return each(self.weights, 1.0, piece, piece.count)

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        cuts, tie = ctx.survey
        weights = self._weights(tensors)
        band, scale = self._band(tensors, cuts), at(self.scale, tensors.name, tensors.depth)
        return fused(tensors, band, weights, weights, tie, self.normalize, scale)


def _twice(piece: Piece) -> list[Tensor]:
    """Every expert's magnitudes, flat, once for either end of the band."""
    return [m_N for magnitude_N in magnitudes(piece) for m_N in [magnitude_N] * 2]
