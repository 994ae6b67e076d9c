"""The mass (L1 norm) of each tensor's change, and what gives it back to a change that was thinned.

N: entries of a stretch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.flows import Piece
from luthier.kit.deltas import changes

LEAST = 1e-7
"""Masses below this are left alone, as mergekit does."""


def restoring(inputs: Any, thinned: Callable[[Piece], Sequence[Tensor]]) -> dict[str, list[float]]:
    """By tensor name, one factor an expert: the mass of its change, over that of what `thinned` leaves of it."""

    def masses(piece: Piece) -> tuple[str, list[float]]:
        return piece.name, [*map(_mass_, changes(piece)), *map(_mass_, thinned(piece))]

    sums: dict[str, list[float]] = {}
    for name, found in inputs.each(masses):
        sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(found)), found, strict=True)]
    return {name: [_ratio(a, b) for a, b in _halves(found)] for name, found in sums.items()}


def _mass_(values_N: Tensor) -> float:
    """torch adds pairwise; sums of pieces are then added in fp64. The values are used up."""
    magnitude_N = values_N.abs_()
    found = float(magnitude_N.sum())
    return found if math.isfinite(found) else float(magnitude_N.sum(dtype=torch.float64))


def _halves(found: list[float]) -> zip[tuple[float, float]]:
    return zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True)


def _ratio(before: float, after: float) -> float:
    return 1.0 if min(before, after) < LEAST else before / after
