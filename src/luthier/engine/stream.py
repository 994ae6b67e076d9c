"""Transforms, streamed: tensors in file order, in stretches of one canonical grid, written in place.

A method sees `Piece`s: 65,536 entries of a tensor from its first one on (granularity `element`), 64
rows (`row`) or all of it (`tensor`), in fp32, from the base and every expert. The grid and the order of
sums never change, so the bytes written depend on the inputs and the method only: not on threads,
memory, shards or the order of tensors. Memory is bounded by `memory`, whatever the number of experts;
granularity `tensor` needs its largest tensor whole.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from luthier.checkpoint.anatomy import role_of
from luthier.checkpoint.reader import Checkpoint, TensorInfo, check_finite
from luthier.checkpoint.writer import ShardWriter, config_with_dtype, copy_sidecars, write_folder
from luthier.errors import LuthierError, unknown
from luthier.flows import Piece
from luthier.kit.context import Context
from luthier.shapes import Transform

__all__ = ["Inputs", "Plan", "plan_transform", "run_transform", "transform_tensors"]

CHUNK, ROWS = 1 << 16, 64
"""The canonical grid. Changing either changes the last bits of some methods' results."""
GRAINS = ("element", "row", "tensor")
SAMPLED = 16
"""Of a sample, one chunk in so many is seen."""
BATCH = 1 << 18
"""Entries read at once, at most, unless one piece is larger."""
NS = 6.0
"""Rough time of one entry of one model on one core, all passes together: for the plan only."""

T = TypeVar("T")


class Source(Protocol):
    """What weights are read from: a Checkpoint, or an expert that looks like one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_flat(self, name: str, start: int, count: int) -> Tensor: ...


@dataclass(frozen=True)
class Inputs:
    """What a Transform's `plan` and `survey` are given.

    tensors: name → TensorInfo of what is transformed, in file order.  config: the output's config.json.
    """

    base: Source | None
    experts: tuple[Source, ...]
    tensors: Mapping[str, TensorInfo]
    granularity: str = "element"
    config: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    batch: int = BATCH

    @property
    def count(self) -> int:
        """Entries in all tensors together."""
        return sum(info.numel for info in self.tensors.values())

    def only(self, name: str) -> Inputs:
        """The same inputs, but for one tensor."""
        return replace(self, tensors={name: self.tensors[name]})

    def pieces(self, sample: bool = False) -> Iterator[Piece]:
        """All pieces in the canonical order, or with `sample` every 16th."""
        return self.each(lambda piece: piece, sample)

    def each(self, work: Callable[[Piece], T], sample: bool = False) -> Iterator[T]:
        """work(piece) for every piece, in the canonical order, computed by several threads."""
        for results in _ordered(partial(self._work, work), self._stretches(sample), self.threads):
            yield from results

    def _work(self, work: Callable[[Piece], T], stretch: tuple[TensorInfo, int, int, int]) -> list[T]:
        return [work(piece) for piece in self._read(*stretch)]

    def _stretches(self, sample: bool) -> Iterator[tuple[TensorInfo, int, int, int]]:
        """(tensor, start, count, entries a piece): whole pieces, read at once."""
        seen = 0
        for info in self.tensors.values():
            unit = _unit(info, self.granularity)
            step = unit if sample else max(1, self.batch // unit) * unit
            for start in range(0, info.numel, step):
                if not sample or seen % SAMPLED == 0:
                    yield info, start, min(step, info.numel - start), unit
                seen += 1

    def _read(self, info: TensorInfo, start: int, count: int, unit: int) -> Iterator[Piece]:
        sources = [self.base, *self.experts] if self.base else self.experts
        read = [s.read_flat(info.name, start, count) for s in sources]
        for at in range(0, count, unit):
            values = []
            for source, flat in zip(sources, read, strict=True):
                part = flat[at : at + unit].to(device=self.device, dtype=torch.float32)
                if not math.isfinite(float(part.sum())):  # sums overflow, too: the exact test decides
                    check_finite(info.name, part, where=_where(source, info.name))
                values.append(_shaped(part, info, self.granularity))
            base = values.pop(0) if self.base else None
            yield Piece(info.name, info.role, info.shape, info.depth, start + at, base, tuple(values))


@dataclass(frozen=True)
class Plan:
    """What a Transform will write and need. seconds: a rough guess for one core."""

    tensors: tuple[TensorInfo, ...]
    read_bytes: int
    write_bytes: int
    memory_bytes: int
    seconds: float


def plan_transform(
    method: Transform, base: Source | None, experts: Sequence[Source], *, memory: int = 1 << 30,
    threads: int | None = None, dtype: torch.dtype | None = None,
) -> Plan:  # fmt: skip
    """What `run_transform` would do; reads no weights. LuthierError for inputs that do not fit."""
    inputs = _prepare(method, base, experts, torch.device("cpu"), memory, threads)
    written = _written(_reference(base, experts), inputs, dtype)
    read = sum(info.nbytes for s in _sources(base, experts) for info in s.tensors.values())
    widest = max((_unit(i, inputs.granularity) for i in inputs.tensors.values()), default=0)
    held = inputs.threads * max(inputs.batch, widest) * 8 * (len(experts) + 1)
    return Plan(written, read, sum(i.nbytes for i in written), held, inputs.count * (len(experts) + 1) * NS / 1e9)


def run_transform(
    method: Transform, base: Any, experts: Sequence[Any], out: Path | str, ctx: Context, *, memory: int = 1 << 30,
    threads: int | None = None, dtype: torch.dtype | None = None, card: str = "",
) -> Path:  # fmt: skip
    """Apply `method` to checkpoints and write a Hugging Face folder, whole or not at all.

    base: a Checkpoint, or None where the method needs none.  experts: Checkpoints or what `open_expert`
    gives.  memory: bytes to stay below, roughly.  threads: torch's number by default.  dtype: of the
    output; the base's by default.  card: the text of README.md.
    Raises LuthierError, naming file and tensor, for shapes that differ and values that are not finite.
    """
    inputs = _prepare(method, base, experts, ctx.device, memory, threads)
    reference = _reference(base, experts)
    written = _written(reference, inputs, dtype)
    home = next(s for s in _sources(base, experts) if isinstance(s, Checkpoint))
    config = config_with_dtype(inputs.config, dtype) if dtype else dict(inputs.config)
    with _one_thread_each(), write_folder(out) as folder, ShardWriter(folder, written) as writer:
        copy_sidecars(home, folder, config)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        seen = ctx.with_(survey=method.survey(inputs, ctx))

        def write(piece: Piece) -> None:
            writer.write(piece.name, piece.start, _transformed(method, piece, seen))

        pieces = sum(-(-i.numel // _unit(i, inputs.granularity)) for i in inputs.tensors.values())
        for _ in ctx.progress(inputs.each(write), total=pieces, what=method.id):
            pass
        for info in written:
            if info.name not in inputs.tensors:
                _copy(reference, info, writer)
    return Path(out)


def transform_tensors(
    method: Transform, base: Mapping[str, Tensor] | None, experts: Sequence[Mapping[str, Tensor]], ctx: Context
) -> dict[str, Tensor]:
    """The same in memory: named tensors to named tensors, each in the dtype of the base's."""
    held = None if base is None else Memory(base)
    inputs = _prepare(method, held, [Memory(e) for e in experts], ctx.device, 1 << 30, 1)
    origin = base if base is not None else experts[0]
    made = {n: torch.empty(t.shape, dtype=t.dtype) if n in inputs.tensors else t.clone() for n, t in origin.items()}
    seen = ctx.with_(survey=method.survey(inputs, ctx))
    for piece in inputs.pieces():
        result = _transformed(method, piece, seen).reshape(-1)
        made[piece.name].view(-1)[piece.start : piece.start + result.numel()] = result.to(made[piece.name].dtype)
    return {n: made[n] for n in origin if n in inputs.tensors or not origin[n].is_floating_point()}


def _transformed(method: Transform, piece: Piece, ctx: Context) -> Tensor:
    """The method's values for a piece: as many as went in, lest the rest of a stretch stay unwritten."""
    result = method.transform(piece, ctx)
    given = piece.base if piece.base is not None else piece.experts[0]
    if result.shape != given.shape:
        raise LuthierError(
            f"gave the shape {list(result.shape)} for {list(given.shape)}", where=f"{method.id}: tensor {piece.name!r}"
        )
    return result


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


def _sources(base: Source | None, experts: Sequence[Source]) -> list[Source]:
    return [*([base] if base else []), *experts]


def _reference(base: Source | None, experts: Sequence[Source]) -> Source:
    """Whose names, order, dtype and integers the output takes."""
    return base or experts[0]


def _prepare(
    method: Transform, base: Source | None, experts: Sequence[Source], device: torch.device, memory: int,
    threads: int | None,
) -> Inputs:  # fmt: skip
    """The checked inputs after the method's own `plan`."""
    if base is None and "base" in method.roles:
        raise LuthierError("needs a base", where=method.id, do="name the model the experts were tuned from")
    if not experts and "experts*" in method.roles:
        raise LuthierError("needs at least one expert", where=method.id)
    if method.granularity not in GRAINS:
        raise unknown("granularity", method.granularity, GRAINS, where=method.id)
    reference = _reference(base, experts)
    for expert in experts:
        _check_alike(reference, expert)
    floats = {n: i for n, i in reference.tensors.items() if i.dtype.is_floating_point}
    threads = threads or torch.get_num_threads()
    room = memory // (threads * 8 * (len(experts) + 1))  # raw bytes and fp32 of every model
    batch = max(CHUNK, min(BATCH, room // CHUNK * CHUNK))
    config = getattr(reference, "config", {})
    return method.plan(
        Inputs(base, tuple(experts), floats, method.granularity, config, device=device, threads=threads, batch=batch)
    )


def _check_alike(reference: Source, expert: Source) -> None:
    """LuthierError unless the expert has the reference's tensors, in the same shapes."""
    config = getattr(expert, "config", {})
    for name, info in reference.tensors.items():
        other = expert.tensors.get(name)
        if other is None:
            raise LuthierError("has no such tensor", where=_where(expert, name), do=f"{_where(reference, name)} has it")
        if other.shape != info.shape:
            vocabulary = info.role in ("embed", "head") and other.shape[1:] == info.shape[1:]
            raise LuthierError(
                f"has the shape {list(other.shape)}, {_where(reference, name)} has {list(info.shape)}",
                where=_where(expert, name),
                do="merge models of one vocabulary" if vocabulary else "merge models of one architecture",
            )
    for name, info in expert.tensors.items():
        tied = info.role == "head" and config.get("tie_word_embeddings", False)
        if name not in reference.tensors and not tied:
            raise LuthierError("is in this model only", where=_where(expert, name), do="merge models of one kind")


def _where(source: Any, name: str) -> str:
    file = source.tensors[name].file if name in source.tensors else getattr(source, "path", "expert")
    return f"{file}: tensor {name!r}"


def _written(reference: Source, inputs: Inputs, dtype: torch.dtype | None) -> tuple[TensorInfo, ...]:
    """The output's tensors: what the method left in, and the reference's integers, in file order."""
    found = []
    for name, info in reference.tensors.items():
        if name in inputs.tensors:
            kind = dtype or info.dtype
            found.append(info._replace(dtype=kind, nbytes=info.numel * kind.itemsize))
        elif not info.dtype.is_floating_point:
            found.append(info)
    return tuple(found)


def _unit(info: TensorInfo, granularity: str) -> int:
    """Entries of a piece."""
    if granularity == "element":
        return CHUNK
    whole = granularity == "tensor" or len(info.shape) < 2
    return max(1, info.numel if whole else ROWS * list(info.shape)[-1])


def _shaped(part: Tensor, info: TensorInfo, granularity: str) -> Tensor:
    if granularity == "element":
        return part
    return part.view(info.shape if granularity == "tensor" else (-1, *info.shape[-1:]))


def _copy(source: Source, info: TensorInfo, writer: ShardWriter) -> None:
    for start in range(0, info.numel, BATCH):
        writer.write(info.name, start, source.read_flat(info.name, start, min(BATCH, info.numel - start)))


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


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """The pool has the cores: torch's own threads would wait for one another at every small kernel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
