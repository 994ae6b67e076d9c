"""Where two checkpoints differ: per tensor, how far the weights moved, how many, in how many directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.checkpoint.reader import Checkpoint
from luthier.flows import Table

STRETCH = 1 << 22  # elements read at a time, so that memory does not grow with the model
ENERGY = 0.9


@dataclass(frozen=True)
class Change:
    """One tensor's change.

    moved: share of entries that differ.  relative: ‖new - old‖ / ‖old‖.  weight: ‖old‖.  signs: share of
    entries whose sign is the old one.  rank: how many directions hold 90 % of the squared change, None if
    not asked for or no matrix moved, the mean over the matrices that moved in a stack of them (experts);
    matrices: how many those are; short: the most directions there can be.
    """

    name: str
    role: str
    layer: int | None
    moved: float
    relative: float
    norm: float
    weight: float = 0.0
    count: int = 0
    signs: float = 1.0
    rank: float | None = None
    short: int = 0
    matrices: int = 0


def changes(
    old: Checkpoint, new: Any, ranks: bool = False, watch: Callable[[Any], Any] = lambda items: items
) -> list[Change]:
    """One Change a tensor that both checkpoints have with the same shape, in the old one's file order.

    new: a Checkpoint or what `checkpoint.expert.open_expert` gives.  ranks: also decompose every change,
    which reads whole matrices and takes the cube of their short side.  watch: wraps the loop.
    """
    found = []
    for name, info in watch(list(old.tensors.items())):
        other = new.tensors.get(name)
        if other is None or other.shape != info.shape or not info.dtype.is_floating_point:
            continue
        count = math.prod(info.shape)
        moved, kept, gap, base = 0, 0, 0.0, 0.0
        for start in range(0, count, STRETCH):
            length = min(STRETCH, count - start)
            a_N, b_N = (m.read_flat(name, start, length).float() for m in (old, new))
            moved += int((a_N != b_N).sum())
            kept += int((a_N.sign() == b_N.sign()).sum())
            gap += float((b_N - a_N).square().sum())
            base += float(a_N.square().sum())
        short = min(info.shape[-2:]) if _is_matrices(info.shape) else 0
        ranked = _directions(old, new, name, info.shape) if ranks and short and gap else []
        rank = sum(ranked) / len(ranked) if ranked else None
        relative = (gap / base) ** 0.5 if base else 0.0
        whole = max(count, 1)
        found.append(Change(
            name, info.role, info.layer, moved / whole, relative, gap**0.5, base**0.5, count, kept / whole, rank, short,
            len(ranked),
        ))  # fmt: skip
    return found


def _is_matrices(shape: Sequence[int]) -> bool:
    """A matrix, or a stack of them as experts are kept; a convolution over single channels is none."""
    return len(shape) == 2 or (len(shape) == 3 and min(shape[1:]) > 1)


def _directions(old: Checkpoint, new: Any, name: str, shape: Sequence[int]) -> list[int]:
    """For each matrix that moved the number of singular values that hold ENERGY of the squared change, from the short
    side's Gram matrix."""
    size, found = shape[-2] * shape[-1], []
    for start in range(0, math.prod(shape), size):
        a_N, b_N = (m.read_flat(name, start, size).double() for m in (old, new))  # squares: fp32 has too few bits
        d_MN = (b_N - a_N).view(*shape[-2:])
        d_SL = d_MN if shape[-2] <= shape[-1] else d_MN.T
        energy_S = torch.linalg.eigvalsh(d_SL @ d_SL.T).flip(0).clamp_min(0)
        if energy_S.sum() > 0:
            share_S = energy_S.cumsum(0) / energy_S.sum()
            found.append(int((share_S < ENERGY).sum()) + 1)
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


def summed(rows: Sequence[Change], key: Callable[[Change], Any]) -> Table:
    """The rows that share a key as one: `what`, tensors, share of entries moved, ‖change‖, ‖change‖ / ‖weight‖, rank
    (mean over the matrices that moved, with the most there could be), share of signs kept."""
    groups: dict[Any, list[Change]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    made = []
    for what, group in groups.items():
        entries = sum(c.count for c in group)
        ranked = [(c.rank, c.short, c.matrices) for c in group if c.rank is not None]
        matrices = sum(n for *_, n in ranked)
        norm, weight = (sum(v**2 for v in vs) ** 0.5 for vs in ([c.norm for c in group], [c.weight for c in group]))
        made.append({
            "what": what, "tensors": len(group), "moved": sum(c.moved * c.count for c in group) / max(entries, 1),
            "norm": norm, "relative": norm / weight if weight else 0.0,
            "rank": sum(rank * n for rank, _, n in ranked) / matrices if ranked else None,
            "of": sum(short * n for _, short, n in ranked) / matrices if ranked else None,
            "signs": sum(c.signs * c.count for c in group) / max(entries, 1),
        })  # fmt: skip
    return Table.from_dicts(made)


def unmatched(old: Checkpoint, new: Any) -> list[str]:
    """One line for each tensor that only one of them has, or that has another shape in the other."""
    lines = [f"only in the first: {name}" for name in old.tensors if name not in new.tensors]
    lines += [f"only in the second: {name}" for name in new.tensors if name not in old.tensors]
    both = [name for name in old.tensors if name in new.tensors]
    return lines + [
        f"{name} is {list(old.tensors[name].shape)} in the first and {list(new.tensors[name].shape)} in the second"
        for name in both if old.tensors[name].shape != new.tensors[name].shape
    ]  # fmt: skip
