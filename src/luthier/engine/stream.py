"""Transforms, streamed: what `engine.pieces` reads, a method changes, and the output takes in place.

The bytes written depend on the inputs and the method only: not on threads, memory, shards or the order
of tensors. Memory is bounded by `memory`, whatever the number of experts; granularity `tensor` needs its
largest tensor whole, `group` its largest unit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.checkpoint.adapter import Adapter, beneath, check_factors, factorwise, put_names
from luthier.checkpoint.alike import doubts
from luthier.checkpoint.card import put_card
from luthier.checkpoint.header import CODES
from luthier.checkpoint.reader import Checkpoint, TensorInfo
from luthier.checkpoint.writer import ShardWriter, config_with_dtype, copy_sidecars, sidecars, write_folder
from luthier.engine import calibration
from luthier.engine.layout import PLAIN, Layout, Spoken
from luthier.engine.marks import still_true
from luthier.engine.onto import planned_onto, put_onto
from luthier.engine.pieces import BATCH, CHUNK, Inputs, Memory, Source, check_grain, check_shapes, where
from luthier.engine.process import one_thread_each
from luthier.engine.slices import sliced
from luthier.engine.spec import MEMORY
from luthier.engine.taking import HELD, beyond, peak, seconds
from luthier.errors import LuthierError
from luthier.flows import Group, Piece
from luthier.kit.compiled import worth
from luthier.kit.context import Context
from luthier.kit.deltas import scaled
from luthier.kit.select import RANKED, ROOM
from luthier.shapes import Transform

__all__ = ["Plan", "plan_transform", "put_transform", "run_transform", "transform_tensors"]


@dataclass(frozen=True)
class Plan:
    """What a Transform will write and need. seconds: a rough guess for one core.  notes: what to know of the result.
    kept_bytes: what it keeps on disk while it runs."""

    tensors: tuple[TensorInfo, ...]
    read_bytes: int
    write_bytes: int
    memory_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    kept_bytes: int = 0


def plan_transform(
    method: Transform, base: Source | None, experts: Sequence[Source], *, memory: int = MEMORY,
    threads: int | None = None, dtype: torch.dtype | None = None, layout: Layout = PLAIN,
    roles: Mapping[str, Any] | None = None,
) -> Plan:  # fmt: skip
    """What `run_transform` would do; reads no weights. LuthierError for inputs that do not fit.

    roles: the step's inputs that are no models.
    """
    if base is not None and method.experts_are == "adapters":
        made = plan_transform(method, None, experts, memory=memory, threads=threads, layout=layout, roles=roles)
        return planned_onto(made, base, experts[0], dtype)
    base = _beneath(method, base, experts, layout)
    spoken = Spoken(base, experts, layout)
    inputs = _prepare(method, spoken.base, spoken.experts, torch.device("cpu"), memory, threads, layout, roles or {})
    written = _written(_reference(base, experts), inputs, dtype)
    for home in [s for s in _sources(base, experts) if isinstance(s, Checkpoint)][:1]:
        sidecars(home)
    read = sum(info.nbytes for s in _sources(base, experts) for info in s.tensors.values())
    size, notes = sum(i.nbytes for i in written), (*spoken.notes, *inputs.notes, *beyond(method, inputs, memory))
    return Plan(written, read, size, peak(method, inputs), seconds(method, inputs), notes, method.keeps(inputs))


def run_transform(
    method: Transform, base: Any, experts: Sequence[Any], out: Path | str, ctx: Context, *, memory: int = MEMORY,
    threads: int | None = None, dtype: torch.dtype | None = None, card: str = "", layout: Layout = PLAIN,
) -> Path:  # fmt: skip
    """Apply `method` to checkpoints and write a Hugging Face folder, whole or not at all.

    base: a Checkpoint, or None where the method needs none or all experts are adapters, which then merge into
    an adapter.  experts: Checkpoints or what `open_expert` gives.  memory: bytes to stay below, roughly.
    threads: torch's number by default.  dtype: of the output; the base's by default.  card: the text of README.md.
    layout: slices of layers, and which vocabulary.
    Raises LuthierError, naming file and tensor, for shapes that differ and values that are not finite.
    """
    with write_folder(out) as folder:
        put_transform(
            folder, method, base, experts, ctx, memory=memory, threads=threads, dtype=dtype, card=card, layout=layout
        )
    return Path(out)


def put_transform(
    folder: Path, method: Transform, base: Any, experts: Sequence[Any], ctx: Context, *, memory: int = MEMORY,
    threads: int | None = None, dtype: torch.dtype | None = None, card: str = "", layout: Layout = PLAIN,
) -> tuple[str, ...]:  # fmt: skip
    """What `run_transform` writes, into a folder of `write_folder`; returns what a reader of it should know."""
    if base is not None and method.experts_are == "adapters":
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder) as merged:
            notes = put_transform(
                Path(merged), method, None, experts, ctx, memory=memory, threads=threads, dtype=torch.float32,
                layout=layout,
            )  # fmt: skip
            put_onto(folder, base, Path(merged), ctx, dtype, card, notes)
        return notes
    base = _beneath(method, base, experts, layout)
    spoken = Spoken(base, experts, layout)
    inputs = _prepare(method, spoken.base, spoken.experts, ctx.device, memory, threads, layout, ctx.roles)
    reference = _reference(spoken.base, spoken.experts)
    written = _written(reference, inputs, dtype)
    home = next(s for s in _sources(base, experts) if isinstance(s, Checkpoint))
    said = None if isinstance(home, Adapter) else dtype  # an adapter's config says nothing of it
    config = spoken.config(config_with_dtype(inputs.config, said) if said else dict(inputs.config))
    config = still_true(config, _sources(base, experts), method.id)
    for note in spoken.notes:
        ctx.emit("log", text=note)
    ctx = calibration.opened(method, base, experts, ctx)
    with (
        one_thread_each(),
        worth(inputs.count * len(_sources(base, experts)), len(inputs.tensors), ctx.device),
        ShardWriter(folder, written) as writer,
        _scratch(ctx, folder) as ctx,
    ):
        copy_sidecars(home, folder, config)
        spoken.put(folder)
        if card:
            put_card(folder, card, inputs.notes)
        seen = ctx.with_(survey=method.survey(inputs, ctx))

        def write(given: Piece | Group) -> None:
            for piece, result in _transformed(method, given, seen):
                writer.write(piece.name, piece.start, result)

        for _ in ctx.progress(inputs.each(write), total=inputs.steps, what=method.id):
            pass
        for info in written:
            if info.name not in inputs.tensors:
                _copy(reference, info, writer)
    if isinstance(home, Adapter):
        put_names(folder)
    return (*spoken.notes, *inputs.notes)


def transform_tensors(
    method: Transform, base: Mapping[str, Tensor] | None, experts: Sequence[Mapping[str, Tensor]], ctx: Context,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The same in memory: named tensors to named tensors, each in the dtype of the base's.

    config: the models' config.json, for a method that needs more than names and shapes.
    ctx: for a method with data, its roles `subjects` and `data` are set.  A method that merges adapters has no base
    here, since how much an adapter counts stands in its config.
    """
    held, models = None if base is None else Memory(base, config), [Memory(e, config) for e in experts]
    inputs = _prepare(method, _beneath(method, held, models), models, ctx.device, MEMORY, 1, roles=ctx.roles)
    origin = base if base is not None else experts[0]
    made = {n: t.clone() for n, t in origin.items() if not t.is_floating_point()}
    made |= {n: torch.empty(info.shape, dtype=info.dtype) for n, info in inputs.tensors.items()}
    with one_thread_each(), _scratch(calibration.given(method, len(experts), ctx)) as ctx:
        seen = ctx.with_(survey=method.survey(inputs, ctx))
        for given in inputs.pieces():
            for piece, result in _transformed(method, given, seen):
                flat = made[piece.name].view(-1)
                flat[piece.start : piece.start + result.numel()] = result.reshape(-1).to(flat.dtype)
    return {n: made[n] for n in dict.fromkeys([*origin, *made]) if n in made}


def _transformed(method: Transform, given: Piece | Group, ctx: Context) -> Iterator[tuple[Piece, Tensor]]:
    """The method's values, piece by piece: as many as went in, lest the rest of a stretch stay unwritten."""
    result = method.transform(given, ctx)
    if isinstance(given, Piece):
        pieces, results = {given.name: given}, {given.name: result}
    else:
        pieces, results = given.pieces, result
        for name in pieces.keys() ^ results.keys():
            what = "gave nothing for" if name in pieces else "gave more than it was shown:"
            raise LuthierError(f"{what} tensor {name!r}", where=method.id)
    whole = method.granularity == "tensor" or (isinstance(given, Group) and given.unit)
    for name, piece in pieces.items():
        shape = piece.shape if whole else piece.seen
        if results[name].shape != shape:
            what = f"gave the shape {list(results[name].shape)} for {list(shape)}"
            raise LuthierError(what, where=f"{method.id}: tensor {name!r}")
        yield piece, results[name]


def _sources(base: Source | None, experts: Sequence[Source]) -> list[Source]:
    return [*([base] if base else []), *experts]


def _beneath(method: Transform, base: Any, experts: Sequence[Any], layout: Layout = PLAIN) -> Any:
    """The base, or what adapters without one change against; LuthierError for experts of another kind than asked."""
    if method.experts_are == "adapters":
        if layout != PLAIN:
            what = "merges adapters, which have no layers to pick and no vocabulary"
            raise LuthierError(what, where=method.id, do="merge without slices or tokenizer")
        check_factors(experts, method.id)
    if base is None and calibration.asks(method) and any(isinstance(e, Adapter) for e in experts):
        raise LuthierError("looks at whole models, and adapters are given", where=method.id, do="name the base")
    return beneath(base, experts, "base" in method.roles)


def _reference(base: Source | None, experts: Sequence[Source]) -> Source:
    """Whose names, order, dtype and integers the output takes."""
    return base or experts[0]


def _prepare(
    method: Transform, base: Source | None, experts: Sequence[Source], device: torch.device, memory: int,
    threads: int | None, layout: Layout = PLAIN, roles: Mapping[str, Any] | None = None,
) -> Inputs:  # fmt: skip
    """The checked inputs after slices were picked and the method's own `plan`."""
    if base is not None and method.experts_are == "adapters":
        raise LuthierError("merges adapters into an adapter", where=method.id, do="leave out the base")
    if base is None and {"base", "model"} & set(method.roles):
        raise LuthierError("needs a base", where=method.id, do="name the model the experts were tuned from")
    if not experts and "experts*" in method.roles:
        raise LuthierError("needs at least one expert", where=method.id)
    if method.takes not in (None, len(experts)):
        what = f"takes {method.takes} expert{'s' * (method.takes != 1)}, and {len(experts)} are given"
        raise LuthierError(what, where=method.id)
    if calibration.asks(method) and layout != PLAIN:
        raise LuthierError("looks at the models as they are", where=method.id, do="merge without slices or tokenizer")
    check_grain(method.granularity, method.unit, method.id)
    reference = _reference(base, experts)
    floats = {n: i for n, i in reference.tensors.items() if i.dtype.is_floating_point}
    threads = threads or torch.get_num_threads()
    each, room = HELD * (len(experts) + 1), max(1 << 16, min(ROOM, memory // (4 * RANKED)))
    memory -= room * RANKED
    threads = max(1, min(threads, memory // (CHUNK * each)))
    batch = max(CHUNK, min(BATCH, memory // (threads * each) // CHUNK * CHUNK))
    config = getattr(reference, "config", {})
    inputs = Inputs(base, tuple(experts), floats, method.granularity, method.unit, config, device, threads, batch, room,
                    roles=roles or {})  # fmt: skip
    inputs = method.plan(sliced(inputs, layout.slices, method) if layout.slices else inputs)
    if method.experts_are == "models":  # of adapters it may be one factor's alone
        scaled(method, inputs)
    for expert in experts if not inputs.reads else ():
        _check_alike(reference, expert)
    check_shapes(inputs, method.id)
    doubtful = dict.fromkeys(note for expert in experts for note in doubts(reference, expert))
    notes = (*inputs.notes, *doubtful, *factorwise(experts, method.experts_are))
    return replace(inputs, most=memory // HELD, notes=notes)


def _check_alike(reference: Source, expert: Source) -> None:
    """LuthierError unless the expert has the reference's tensors, in the same shapes."""
    config = getattr(expert, "config", {})
    for name, info in reference.tensors.items():
        other = expert.tensors.get(name)
        if other is None:
            raise LuthierError("has no such tensor", where=where(expert, name), do=f"{where(reference, name)} has it")
        if other.dtype.is_floating_point != info.dtype.is_floating_point:
            what = f"is of {CODES[other.dtype]}, {where(reference, name)} of {CODES[info.dtype]}"
            raise LuthierError(what, where=where(expert, name), do="merge models of one kind")
        if other.shape != info.shape:
            vocabulary = info.role in ("embed", "head") and other.shape[1:] == info.shape[1:]
            raise LuthierError(
                f"has the shape {list(other.shape)}, {where(reference, name)} has {list(info.shape)}",
                where=where(expert, name),
                do="set tokenizer: base, union or a model's name" if vocabulary else "merge models of one architecture",
            )
    for name, info in expert.tensors.items():
        tied = info.role == "head" and config.get("tie_word_embeddings", False)
        if name not in reference.tensors and not tied:
            raise LuthierError("is in this model only", where=where(expert, name), do="merge models of one kind")


def _written(reference: Source, inputs: Inputs, dtype: torch.dtype | None) -> tuple[TensorInfo, ...]:
    """The output's tensors: those the method plans, and the reference's integers, in the reference's order."""
    found = []
    for name in dict.fromkeys([*reference.tensors, *inputs.tensors]):
        info = inputs.tensors.get(name)
        if info is not None:
            kind = dtype or info.dtype
            found.append(info._replace(dtype=kind, nbytes=info.numel * kind.itemsize))
        elif not reference.tensors[name].dtype.is_floating_point:
            found.append(reference.tensors[name])
    return tuple(found)


def _copy(source: Source, info: TensorInfo, writer: ShardWriter) -> None:
    for start in range(0, info.numel, BATCH):
        writer.write(info.name, start, source.read_flat(info.name, start, min(BATCH, info.numel - start)))


@contextmanager
def _scratch(ctx: Context, beside: Path | None = None) -> Iterator[Context]:
    """The context with a scratch folder, which is removed however the block ends."""
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=beside) as folder:
        yield ctx.with_(scratch=Path(folder))
