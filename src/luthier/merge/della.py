"""DELLA: drop entries of each change at random, small ones more often than large ones, then elect signs and merge.

Paper: arXiv 2406.11617.  In each row (the last dimension; a vector is one row) the ranks of the magnitudes set
how likely an entry stays: from density - epsilon for the smallest to density + epsilon for the largest, in
equal steps. What stays is divided by its own probability, which keeps its expectation; then as in TIES the
larger mass elects a sign and the changes that agree are averaged. Which entries stay depends on the seed, the
step, the tensor, the expert's number and the entry's place, and on nothing else.

Footguns: the paper's window is twice our epsilon (mergekit's name and meaning). The number of an expert
decides what it loses, so another order of the experts is another draw.

R: rows.  C: columns.  N: entries of a stretch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.fields import Examples, Schedule, Unit
from luthier.flows import Ctx, Piece
from luthier.kit.deltas import add, changes, each, one_each
from luthier.kit.mass import mass_, restoring
from luthier.kit.noise import below, bounds_of
from luthier.kit.schedule import at
from luthier.kit.select import keep_, row_ranks
from luthier.kit.vote import divisible, fuse_, majority, tied
from luthier.shapes import Reduces, Transform

Factors = dict[str, list[float]]


class Della(Transform):
    density: Unit = 0.7
    """share of each change that stays, on average: 1 minus the paper's drop rate"""
    epsilon: Unit = 0.07
    """how much likelier than the density the largest entry of a row stays, and how much less likely the smallest"""
    rescale: Literal["expectation", "l1", "none"] = "expectation"
    """what stays is divided by its probability (the paper), or brought to its tensor's old L1 norm (mergekit)"""
    scale: Schedule = 1.0
    """factor of the merged change: a number, a list by depth, or {glob: either}"""
    densities: tuple[Unit, ...] | None = None
    """one density an expert, in place of `density`"""
    epsilons: Annotated[tuple[Unit, ...] | None, Examples((None, (0.0, 0.25, 0.125)))] = None
    """one epsilon an expert, in place of `epsilon`"""
    weights: tuple[Schedule, ...] | None = None
    """one factor an expert, which multiplies its change before the vote; none means 1 each"""
    vote: Literal["none", "majority", "plus"] = "plus"
    """none adds all changes; else only those of the sign with more mass, and a tie takes the majority's or plus"""
    normalize: bool = True
    """divide by the sum of the weights, of all experts or of those that agree"""

    granularity = "row"
    ordered = True
    partial = True
    reduces_to = (
        Reduces({"density": 1.0, "epsilon": 0.0, "vote": "none", "normalize": False}, "merge.task_arithmetic"),
        Reduces({"density": 1.0, "epsilon": 0.0, "vote": "majority"}, "merge.ties"),
        Reduces({"density": 0.3, "epsilon": 0.0, "vote": "none", "normalize": False}, "merge.dare", tolerance=1e-6),
    )
    departures = (
        "mergekit 0.1.5 (git a6e4028): `della` and `della_linear` rescale each tensor to its L1 norm before the drop, "
        "the paper and its code each entry by 1 over its probability; merges differ unless asked for here with "
        "rescale: l1 (tests/golden/test_merge_della.py::test_mergekit_rescales_by_l1)",
    )

    def check(self) -> None:
        count = max(1, len(self.densities or ()), len(self.epsilons or ()))
        densities, epsilons = self.densities or (self.density,) * count, self.epsilons or (self.epsilon,) * count
        for density, epsilon in zip(densities, epsilons, strict=False):  # `plan` refuses lists of two lengths
            if isinstance(density, float) and isinstance(epsilon, float):
                self._fits(density, epsilon)

    def _fits(self, density: float, epsilon: float) -> None:
        if epsilon > density or density + epsilon > 1:
            raise LuthierError(f"density {density:g} leaves no room for epsilon {epsilon:g}", where=self.id,
                               do=f"set epsilon to {min(density, 1 - density):g} at most")  # fmt: skip

    def plan(self, inputs: Any) -> Any:
        one_each("weights", self.weights, inputs)
        one_each("densities", self.densities, inputs)
        one_each("epsilons", self.epsilons, inputs)
        for tensor in inputs.tensors.values():
            for density, epsilon in self._windows(tensor, len(inputs.experts)):
                self._fits(density, epsilon)
        if self.normalize and self.vote == "none":
            divisible(self.weights, inputs)
        return inputs

    def survey(self, inputs: Any, ctx: Ctx) -> tuple[Factors, float | None]:
        """What restores each tensor's mass, and what a tie elects; None without a vote."""
        restored = restoring(inputs, lambda piece: self._masses(piece, ctx)) if self.rescale == "l1" else {}
        return restored, tied(
            self.vote, inputs, lambda piece: majority(self._dropped(piece, ctx), self._factors(piece, restored))
        )

    def _masses(self, piece: Piece, ctx: Ctx) -> list[tuple[float, float]]:
        """Before the drop and after it."""
        return list(zip(map(mass_, changes(piece)), map(mass_, self._dropped(piece, ctx)), strict=True))

    def _windows(self, tensor: Any, count: int) -> list[tuple[float, float]]:
        """Density and epsilon of every expert at a tensor."""
        densities = each(self.densities, self.density, tensor, count)
        return list(zip(densities, each(self.epsilons, self.epsilon, tensor, count), strict=True))

    def _weights(self, piece: Piece) -> list[float]:
        return each(self.weights, 1.0, piece, len(piece.experts))

    def _factors(self, piece: Piece, restored: Factors) -> list[float]:
        """Weights times what restores masses."""
        rescales = restored.get(piece.name, [1.0] * len(piece.experts))
        return [w * r for w, r in zip(self._weights(piece), rescales, strict=True)]

    def _dropped(self, piece: Piece, ctx: Ctx) -> list[Tensor]:
        """Every expert's change after the drop, divided by the probabilities if so asked."""
        moved = changes(piece)
        which = piece.which or range(len(moved))
        windows = self._windows(piece, len(moved))
        for expert, change_RC, (density, epsilon) in zip(which, moved, windows, strict=True):
            _, columns = change_RC.shape
            self._drop_(change_RC, shares(density, epsilon, columns), ctx.key(piece.name, expert), piece.start)
        return moved

    def _drop_(self, change_RC: Tensor, share_C: np.ndarray, key: int, start: int) -> None:
        """Keep each entry with the probability of its rank, in place."""
        rank_N = row_ranks(change_RC.abs()).flatten()
        found = below(key, start, rank_N.numel(), bounds_of(share_C)[rank_N.cpu().numpy()])
        keep_(change_RC, torch.from_numpy(found).to(change_RC.device))
        if self.rescale == "expectation":
            factor_C = np.divide(1, share_C, out=np.zeros_like(share_C), where=share_C > 0)
            factor_N = torch.from_numpy(factor_C).to(change_RC).index_select(0, rank_N)
            change_RC.mul_(factor_N.view_as(change_RC))

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        restored, tie = ctx.survey
        dropped, factors = self._dropped(tensors, ctx), self._factors(tensors, restored)
        merged_RC = fuse_(dropped, factors, self._weights(tensors), tie, self.normalize)
        return add(tensors, merged_RC, at(self.scale, tensors.name, tensors.depth))


def shares(density: float, epsilon: float, columns: int) -> np.ndarray:
    """How likely the entries of a row stay, from the smallest magnitude to the largest; a lone entry: the density."""
    return np.linspace(density - epsilon, density + epsilon, columns) if columns > 1 else np.array([density])
