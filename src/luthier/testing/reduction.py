"""The reduction check: with the fields it names, a method must equal the known method it reduces to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from luthier.catalogue import Card, cards, find
from luthier.fields import hints
from luthier.shapes import Reduces
from luthier.testing import must


def reductions(cls: Any) -> tuple[Reduces, ...]:
    """A class's reductions as a tuple, however many it names."""
    named = cls.reduces_to
    return (named,) if isinstance(named, Reduces) else tuple(named)


def check_reduction(entry: Card, shape: ModuleType) -> None:
    """Every reduction of the method, on the tiny input of its shape; at least one is asked for."""
    cls = find(entry.id)
    must(reductions(cls), f"{entry.id} names no reduction: say what known method it equals, and when")
    for reduction in reductions(cls):
        method = cls(**reduction.fields)
        mine = shape.outcome(method, reduction.given)
        if reduction.to in shape.PEERS:
            other = shape.PEERS[reduction.to](method, reduction.given)
        else:
            must(reduction.to in cards(), f"{entry.id} reduces to {reduction.to!r}, which nobody knows")
            other = shape.outcome(find(reduction.to)(**_shared(reduction)), reduction.given)
        same(mine, other, reduction.tolerance, f"{entry.id} at {dict(reduction.fields)} against {reduction.to}")


def _shared(reduction: Reduces) -> dict[str, Any]:
    """The named fields that the target has too: they are set on both sides, the rest are defaults."""
    return {k: v for k, v in reduction.fields.items() if k in hints(find(reduction.to))}


def same(mine: Mapping[str, Any], other: Mapping[str, Any], tolerance: float, what: str) -> None:
    """Raise unless both outcomes have the same names and values: bit for bit at tolerance 0, else to
    `tolerance` absolutely or relative to the value."""
    must(mine and list(mine) == list(other), f"{what}: outcomes {sorted(mine)} and {sorted(other)}")
    for name, value in mine.items():
        gap = distance(value, other[name], tolerance)
        must(gap <= tolerance, f"{what}: {name} differs by {gap:g}, allowed {tolerance:g}")


def distance(mine: Any, other: Any, tolerance: float = 0.0) -> float:
    """The largest difference between two values, relative where they exceed 1; infinite if incomparable."""
    if isinstance(mine, torch.Tensor) and isinstance(other, torch.Tensor):
        if mine.shape != other.shape or (tolerance == 0 and mine.dtype != other.dtype):
            return math.inf
        if tolerance == 0:
            return 0.0 if torch.equal(mine, other) else _gap(mine, other) or math.inf
        return _gap(mine, other)
    if isinstance(mine, float) and isinstance(other, (int, float)):
        return _gap(torch.tensor(mine, dtype=torch.float64), torch.tensor(float(other), dtype=torch.float64))
    return 0.0 if mine == other else math.inf


def _gap(mine: torch.Tensor, other: torch.Tensor) -> float:
    if mine.numel() == 0:
        return 0.0
    a, b = mine.double(), other.double()
    gap = ((a - b).abs() / b.abs().clamp(min=1)).max().item()
    return gap if math.isfinite(gap) else math.inf
