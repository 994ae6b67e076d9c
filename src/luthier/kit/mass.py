"""The mass (L1 norm) of each tensor's change, and what gives it back to a change that was thinned.

N: entries of a stretch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.flows import Piece

LEAST = 1e-7
"""Masses below this are left alone, as mergekit does."""
LANES = 4096
"""Entries that far apart are added up in fp32, and the sums of all lanes in fp64: an order that vectors keep to."""


def restoring(inputs: Any, masses: Callable[[Piece], list[tuple[float, float]]]) -> dict[str, list[float]]:
    """By tensor name, one factor an expert: the mass of its change, over that of what is left of it.

    masses: of a piece, both for every expert.
    """
    sums: dict[str, list[tuple[float, float]]] = {}
    for name, found in inputs.each(lambda piece: (piece.name, masses(piece))):
        before = sums.get(name, [(0.0, 0.0)] * len(found))
        sums[name] = [(a + c, b + d) for (a, b), (c, d) in zip(before, found, strict=True)]
    return {name: [_ratio(whole, left) for whole, left in found] for name, found in sums.items()}


def mass_(values_N: Tensor) -> float:
    """The L1 norm of contiguous fp32 values, which are used up."""
    magnitude_N = values_N.abs_().view(-1)
    if magnitude_N.device.type == "cpu":
        lanes, array = np.zeros(LANES, dtype=np.float32), magnitude_N.numpy()
        for start in range(0, array.size, LANES):
            part = array[start : start + LANES]
            lanes[: part.size] += part
        found = total(lanes)
    else:
        found = float(magnitude_N.sum())
    return found if math.isfinite(found) else float(magnitude_N.sum(dtype=torch.float64))


def total(lanes: np.ndarray) -> float:
    """The sum of lanes."""
    return float(lanes.sum(dtype=np.float64))


def _ratio(before: float, after: float) -> float:
    return 1.0 if min(before, after) < LEAST else before / after
