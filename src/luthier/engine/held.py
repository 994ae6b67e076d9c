"""What weights are read from: a checkpoint or what looks like one, such as tensors in memory; and a piece of them
that is held as it was stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from luthier.checkpoint.anatomy import role_of
from luthier.checkpoint.reader import TensorInfo
from luthier.flows import Piece
from luthier.kit.compiled import flat, kernels


class Source(Protocol):
    """What weights are read from: a Checkpoint, or an expert that looks like one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_flat(self, name: str, start: int, count: int) -> Tensor: ...


class Memory:
    """Named tensors that look like a checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None):
        self.config = dict(config or {})
        self._held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        places = {name: role_of(self.config.get("model_type", "llama"), name) for name in tensors}
        last = max((layer for _, layer in places.values() if layer is not None), default=0)
        self.tensors = {
            n: TensorInfo(n, t.dtype, tuple(t.shape), Path("memory"), 0, t.numel() * t.element_size(), role, layer,
                          None if layer is None else layer / max(last, 1))
            for (n, t), (role, layer) in zip(self._held.items(), places.values(), strict=True)
        }  # fmt: skip

    def read_flat(self, name: str, start: int, count: int) -> Tensor:
        return self._held[name].view(-1)[start : start + count]


class Stored(Piece):
    """A Piece in bfloat16, for compiled kernels; its fp32 values are made when a method asks for them.

    bits: of the base and the experts; base_at says which of them is the base's.
    """

    def __init__(
        self, info: TensorInfo, rows: bool, start: int, bits: list[np.ndarray], base_at: int | None,
        which: tuple[int, ...] | None,
    ):  # fmt: skip
        experts = list(bits)
        base = None if base_at is None else experts.pop(base_at)
        seen = (-1, *info.shape[-1:]) if rows else (-1,)
        self.__dict__.update(
            name=info.name, role=info.role, shape=info.shape, depth=info.depth, start=start, which=which,
            stored=(seen, base, experts),
        )  # fmt: skip

    @cached_property
    def base(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        seen, base, _ = self.__dict__["stored"]
        return None if base is None else _wide(seen, base)

    @cached_property
    def experts(self) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        seen, _, experts = self.__dict__["stored"]
        return tuple(_wide(seen, bits) for bits in experts)


def _wide(seen: tuple[int, ...], bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16).float().view(seen)


def as_stored(read: Sequence[Tensor], device: torch.device) -> list[np.ndarray] | None:
    """Values that were read as bits of bfloat16, if compiled kernels can take them so and all are finite."""
    if not (compiled := kernels()) or device.type != "cpu" or any(part.dtype != torch.bfloat16 for part in read):
        return None
    arrays = [flat(part) for part in read]
    return arrays if all(map(compiled.finite, arrays)) else None
