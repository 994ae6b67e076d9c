"""Pieces: what a Transform sees of its inputs, read stretch by stretch on one canonical grid.

A piece is 65,536 entries of a tensor from its first one on (granularity `element`), 64 rows (`row`), all
of it (`tensor`), or the whole tensors of one anatomical unit together (`group`), in fp32, from the base
and every expert. The grid and the order never change: not with threads, memory, shards or the order of
tensors in the files.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from luthier.checkpoint.anatomy import UNITS, belongs, role_of
from luthier.checkpoint.reader import TensorInfo, check_finite
from luthier.errors import unknown
from luthier.flows import Group, Piece

__all__ = ["BATCH", "CHUNK", "Inputs", "Memory", "Source", "check_grain", "where"]

CHUNK, ROWS = 1 << 16, 64
"""The canonical grid. Changing either changes the last bits of some methods' results."""
GRAINS = ("element", "row", "tensor", "group")
SAMPLED = 16
"""Of a sample, one stretch in so many is seen."""
BATCH = 1 << 18
"""Entries read at once, at most, unless one piece is larger."""

T = TypeVar("T")


class Source(Protocol):
    """What weights are read from: a Checkpoint, or an expert that looks like one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_flat(self, name: str, start: int, count: int) -> Tensor: ...


class Memory:
    """Named tensors that look like a checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        places = {name: role_of("llama", name) for name in tensors}
        last = max((layer for _, layer in places.values() if layer is not None), default=0)
        self.tensors = {
            n: TensorInfo(n, t.dtype, tuple(t.shape), Path("memory"), 0, t.numel() * t.element_size(), role, layer,
                          None if layer is None else layer / max(last, 1))
            for (n, t), (role, layer) in zip(self._held.items(), places.values(), strict=True)
        }  # fmt: skip

    def read_flat(self, name: str, start: int, count: int) -> Tensor:
        return self._held[name].view(-1)[start : start + count]


@dataclass(frozen=True)
class Inputs:
    """What a Transform's `plan` and `survey` are given.

    tensors: name → TensorInfo of what is transformed, in file order.  config: the output's config.json.
    unit: of granularity `group`, what is shown together: attention, mlp or layer.
    """

    base: Source | None
    experts: tuple[Source, ...]
    tensors: Mapping[str, TensorInfo]
    granularity: str = "element"
    unit: str = "layer"
    config: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    batch: int = BATCH

    @property
    def count(self) -> int:
        """Entries in all tensors together."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def widest(self) -> int:
        """Entries a thread holds of each model at once, at most."""
        return max((s.count for s in self._stretches(False)), default=0)

    @property
    def steps(self) -> int:
        """How many pieces, or groups, there are."""
        return sum(-(-s.count // s.step) for s in self._stretches(False))

    def only(self, name: str) -> Inputs:
        """The same inputs, but for one tensor."""
        return replace(self, tensors={name: self.tensors[name]})

    def pieces(self, sample: bool = False) -> Iterator[Any]:
        """All pieces (groups, with granularity `group`) in the canonical order, or with `sample` every 16th."""
        return self.each(lambda piece: piece, sample)

    def each(self, work: Callable[[Any], T], sample: bool = False) -> Iterator[T]:
        """work(piece) for every piece, in the canonical order, computed by several threads."""
        for results in _ordered(partial(self._work, work), self._stretches(sample), self.threads):
            yield from results

    def _work(self, work: Callable[[Any], T], stretch: Stretch) -> list[T]:
        if self.granularity == "group":
            return [work(self._group(stretch.infos))]
        return [work(piece) for piece in self._pieces(stretch)]

    def _stretches(self, sample: bool) -> Iterator[Stretch]:
        every = self._groups() if self.granularity == "group" else self._grid(sample)
        yield from (s for n, s in enumerate(every) if not sample or n % SAMPLED == 0)

    def _grid(self, sample: bool) -> Iterator[Stretch]:
        """Several pieces at once, or one of a sample."""
        for info in self.tensors.values():
            piece = _entries(info, self.granularity)
            step = piece if sample else max(1, self.batch // piece) * piece
            for start in range(0, info.numel, step):
                yield Stretch((info,), start, min(step, info.numel - start), piece)

    def _groups(self) -> Iterator[Stretch]:
        """The tensors of a unit by name, where its first one lies; those of no unit alone."""
        found: dict[Any, list[TensorInfo]] = {}
        for info in self.tensors.values():
            found.setdefault(info.layer if self._in_unit(info) else info.name, []).append(info)
        for infos in found.values():
            count = sum(info.numel for info in infos)
            yield Stretch(tuple(sorted(infos, key=lambda i: i.name)), 0, count, max(1, count))

    def _in_unit(self, info: TensorInfo) -> bool:
        return belongs(info.role, info.layer, self.unit)

    def _pieces(self, stretch: Stretch) -> Iterator[Piece]:
        info = stretch.infos[0]
        read = [s.read_flat(info.name, stretch.start, stretch.count) for s in self._sources]
        for at in range(0, stretch.count, stretch.step):
            yield self._piece(info, stretch.start + at, [flat[at : at + stretch.step] for flat in read])

    def _group(self, infos: tuple[TensorInfo, ...]) -> Group:
        pieces = {i.name: self._piece(i, 0, [s.read_flat(i.name, 0, i.numel) for s in self._sources]) for i in infos}
        return Group(self.unit if self._in_unit(infos[0]) else "", infos[0].layer, infos[0].depth, pieces)

    @property
    def _sources(self) -> list[Source]:
        return [*([self.base] if self.base else []), *self.experts]

    def _piece(self, info: TensorInfo, start: int, read: Sequence[Tensor]) -> Piece:
        values = []
        for source, flat in zip(self._sources, read, strict=True):
            part = flat.to(device=self.device, dtype=torch.float32)
            if not math.isfinite(float(part.sum())):  # sums overflow, too: the exact test decides
                check_finite(info.name, part, where=where(source, info.name))
            values.append(_shaped(part, info, self.granularity))
        base = values.pop(0) if self.base else None
        return Piece(info.name, info.role, info.shape, info.depth, start, base, tuple(values))


class Stretch(NamedTuple):
    """What a thread reads at once: `count` entries of a tensor from `start`, in pieces of `step`; or whole tensors."""

    infos: tuple[TensorInfo, ...]
    start: int
    count: int
    step: int


def check_grain(granularity: str, unit: str, method: str) -> None:
    """LuthierError for a granularity or a unit nobody streams."""
    if granularity not in GRAINS:
        raise unknown("granularity", granularity, GRAINS, where=method)
    if granularity == "group" and unit not in UNITS:
        raise unknown("unit", unit, UNITS, where=method)


def where(source: Any, name: str) -> str:
    """File and tensor, for an error."""
    file = source.tensors[name].file if name in source.tensors else getattr(source, "path", "expert")
    return f"{file}: tensor {name!r}"


def _entries(info: TensorInfo, granularity: str) -> int:
    """Entries of a piece."""
    if granularity == "element":
        return CHUNK
    whole = granularity == "tensor" or len(info.shape) < 2
    return max(1, info.numel if whole else ROWS * list(info.shape)[-1])


def _shaped(part: Tensor, info: TensorInfo, granularity: str) -> Tensor:
    if granularity == "element":
        return part
    return part.view((-1, *info.shape[-1:]) if granularity == "row" else info.shape)


def _ordered(work: Callable[[Any], T], items: Iterable[Any], threads: int) -> Iterator[T]:
    """work(item) in order, by several threads which run only a little ahead."""
    if threads == 1:
        yield from map(work, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[T]] = deque(pool.submit(work, item) for item in islice(items, threads + 1))
        while ahead:
            done = ahead.popleft().result()
            ahead.extend(pool.submit(work, item) for item in islice(items, 1))
            yield done
