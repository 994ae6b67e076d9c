"""Where two checkpoints differ: per tensor, how far the weights moved and how many of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from luthier.checkpoint.reader import Checkpoint

STRETCH = 1 << 22  # elements read at a time, so that memory does not grow with the model


@dataclass(frozen=True)
class Change:
    """One tensor's change. moved: share of entries that differ.  relative: ‖new - old‖ / ‖old‖."""

    name: str
    role: str
    layer: int | None
    moved: float
    relative: float
    norm: float


def changes(old: Checkpoint, new: Checkpoint) -> list[Change]:
    """One Change a tensor that both checkpoints have with the same shape, in the old one's file order."""
    found = []
    for name, info in old.tensors.items():
        other = new.tensors.get(name)
        if other is None or other.shape != info.shape or not info.dtype.is_floating_point:
            continue
        count = 1
        for size in info.shape:
            count *= size
        moved, gap, base = 0, 0.0, 0.0
        for start in range(0, count, STRETCH):
            length = min(STRETCH, count - start)
            a_N = old.read_flat(name, start, length).float()
            d_N = new.read_flat(name, start, length).float() - a_N
            moved += int(torch.count_nonzero(d_N))
            gap += float(d_N.square().sum())
            base += float(a_N.square().sum())
        relative = (gap / base) ** 0.5 if base else 0.0
        found.append(Change(name, info.role, info.layer, moved / max(count, 1), relative, gap**0.5))
    return found


def by_layer(rows: list[Change]) -> dict[str, dict[int, float]]:
    """{role: {layer: relative change}} of the tensors inside layers; several of a role are pooled."""
    pooled: dict[str, dict[int, list[Change]]] = {}
    for row in rows:
        if row.layer is not None:
            pooled.setdefault(row.role, {}).setdefault(row.layer, []).append(row)
    return {
        role: {layer: (sum(c.relative**2 for c in cs) / len(cs)) ** 0.5 for layer, cs in layers.items()}
        for role, layers in pooled.items()
    }
