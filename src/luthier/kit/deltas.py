"""Changes of experts against a base, and the one number that belongs to each expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.flows import Piece
from luthier.kit.compiled import flat, kernels
from luthier.kit.schedule import at


def changes(piece: Piece) -> list[Tensor]:
    """What every expert changed: its values minus the base's, fp32, in recipe order; tensors of their own."""
    if (compiled := kernels()) and piece.stored:
        _, base, experts = piece.stored
        moved = [np.empty(piece.seen, dtype=np.float32) for _ in experts]
        for bits, change_N in zip(experts, moved, strict=True):
            compiled.difference(bits, base, change_N.ravel())
        return [torch.from_numpy(change_N) for change_N in moved]
    assert piece.base is not None  # the engine has refused a missing base before the first piece
    return [expert_N - piece.base for expert_N in piece.experts]


def add(piece: Piece, change_N: Tensor, scale: float) -> Tensor:
    """The base with a scaled change added."""
    if (compiled := kernels()) and piece.stored:
        out_N = np.empty(piece.seen, dtype=np.float32)
        compiled.shifted(piece.stored[1], flat(change_N), np.float32(scale), out_N.ravel())
        return torch.from_numpy(out_N)
    assert piece.base is not None
    return torch.add(piece.base, change_N, alpha=scale)


def summed(piece: Piece, weights: Sequence[float]) -> Tensor:
    """The experts' values times their weights, added up from zero in recipe order, fp32."""
    if (compiled := kernels()) and piece.stored:
        total_N = np.zeros(piece.seen, dtype=np.float32)
        for weight, bits in zip(weights, piece.stored[2], strict=True):
            compiled.accumulate(bits, np.float32(weight), total_N.ravel())
        return torch.from_numpy(total_N)
    total_N = torch.zeros_like(piece.experts[0])
    for weight, expert_N in zip(weights, piece.experts, strict=True):
        total_N.add_(expert_N, alpha=weight)
    return total_N


def each(schedules: Sequence[Any] | None, default: Any, piece: Any, count: int) -> list[float]:
    """The number of each of `count` experts at this tensor: its own schedule's value, or the default's.

    piece: anything with `name` and `depth`, a `flows.Piece` or a tensor's record in a checkpoint.
    """
    which = getattr(piece, "which", None)
    if schedules and which is not None:
        schedules = [schedules[i] for i in which]
    if not schedules:
        return [at(default, piece.name, piece.depth)] * count if count else []
    return [at(schedule, piece.name, piece.depth) for schedule in schedules]


def one_each(field: str, schedules: Sequence[Any] | None, inputs: Any) -> None:
    """Refuse, before anything is read, a list that is not one entry an expert or misses a tensor.

    inputs: what a Transform's `plan` is given.  Raises LuthierError naming the field.
    """
    if schedules is None:
        return
    if len(schedules) != len(inputs.experts):
        raise LuthierError(
            f"{len(schedules)} numbers for {len(inputs.experts)} experts", where=field, do="give one for each expert"
        )
    for tensor in inputs.tensors.values():
        try:
            each(schedules, None, tensor, len(schedules))
        except LuthierError as fault:
            raise fault.at(field) from None


def scaled(method: Any, inputs: Any) -> None:
    """Refuse, before anything is read, a `scale` that misses a tensor: it multiplies what is added to each."""
    scale = getattr(method, "scale", 1.0)
    for tensor in inputs.tensors.values() if not isinstance(scale, float) else ():
        try:
            at(scale, tensor.name, tensor.depth)
        except LuthierError as fault:
            raise fault.at("scale") from None


def shares(field: str, schedules: Sequence[Any] | None, inputs: Any) -> None:
    """`one_each`, of weights that are divided by their sum: none below 0, and one above it at every tensor."""
    one_each(field, schedules, inputs)
    for tensor in inputs.tensors.values() if schedules is not None else ():
        values = each(schedules, None, tensor, len(inputs.experts))
        if min(values) < 0 or max(values) == 0:
            what = f"the weights are {values} at {tensor.name}"
            raise LuthierError(what, where=field, do="give none below 0 and at least one above it")
