"""Pieces: what a Transform sees of its inputs, read stretch by stretch on one canonical grid.

A piece is 65,536 entries of a tensor from its first one on (granularity `element`), 64 rows (`row`), all
of it (`tensor`), or the whole tensors of one anatomical unit together (`group`; tensors of no unit as for
`element`), in fp32, from the base and every expert. The grid and the order never change: not with threads,
memory, shards or the order of tensors in the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from luthier.checkpoint.anatomy import UNITS, belongs, role_of
from luthier.checkpoint.reader import TensorInfo, check_finite
from luthier.engine.held import Memory, Source, Stored, as_stored
from luthier.engine.process import in_order
from luthier.errors import LuthierError, unknown
from luthier.flows import Group, Piece
from luthier.kit.select import ROOM

__all__ = ["BATCH", "CHUNK", "Inputs", "Memory", "Source", "check_grain", "check_shapes", "where"]

CHUNK, ROWS = 1 << 16, 64
"""The canonical grid. Changing either changes the last bits of some methods' results."""
GRAINS = ("element", "row", "tensor", "group")
SAMPLED, ENOUGH, THIN = 16, 32, 17
"""A sample sees one piece in at most so many, as long as there are enough of them; of that one entry in so many, which
divides no usual width, so that all columns are seen."""
BATCH = 1 << 18
"""Entries read at once, at most, unless one piece is larger."""

T = TypeVar("T")
Read = tuple[int | None, str]
"""A tensor of a model: the expert's index, None for the base, and the tensor's name there."""


@dataclass(frozen=True)
class Inputs:
    """What a Transform's `plan` and `survey` are given.

    tensors: name → TensorInfo of what is to be written, in file order: at first what base and experts
    have.  config: the output's config.json.  unit: of granularity `group`, what is shown together:
    attention, mlp or layer.  reads: of outputs that are not made from the tensors of the same name in
    the base and every expert, what they are made from: (the expert's index or None for the base, name).
    roles: the step's inputs that are no models.  notes: what a reader of the output should know, one line each;
    a `plan` adds its own, and they stand in the model card and the report.  same: outputs that are the one tensor
    they are made from, unchanged; in memory nothing is computed for them.  room: for `kit.select.largest`.
    most: entries of all models that all threads together may hold, if it is not one stretch that is more.
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
    room: int = ROOM
    reads: Mapping[str, tuple[Read, ...]] = field(default_factory=dict)
    roles: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    same: frozenset[str] = frozenset()
    most: float = math.inf
    _made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        """Entries in all tensors together."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def held(self) -> int:
        """Entries a thread holds at once, of all models together, at most."""
        return max(map(self._weight, self._shown()), default=0)

    @property
    def steps(self) -> int:
        """How many pieces, or groups, there are."""
        spans = ((infos, *self._spans(infos[0])) for infos in self._shown())
        return sum(1 if self.united(infos[0]) else -(-count // piece) for infos, piece, _, count in spans)

    def only(self, *names: str) -> Inputs:
        """The same inputs, but for some tensors."""
        return replace(self, tensors={name: self.tensors[name] for name in names})

    def at_once(self, name: str) -> bool:
        """Whether one piece shows all of a tensor, so that `transform` can look at it without a survey."""
        info = self.tensors[name]
        return self.united(info) or info.numel <= _entries(info, self.granularity)

    def giving(self, made: Mapping[str, str | Sequence[Read]], config: Mapping[str, Any] | None = None) -> Inputs:
        """The same inputs with other outputs, for a `plan` that takes layers away, moves or joins them.

        made: the output's name → its name in the base and every expert, or what it is made from, as
        (the expert's index or None for the base, name there): a Piece's base is the first of the base's, its
        experts are the others in that order.  config: what changes in config.json.
        LuthierError for a tensor that is not there.
        """
        reads = {n: tuple((m, r) for m in self._models) if isinstance(r, str) else tuple(r) for n, r in made.items()}
        first = {n: self._info(*r[0]) for n, r in reads.items()}
        family = (config or {}).get("model_type", self.config.get("model_type", "llama"))
        places = {n: role_of(family, n) for n in made}
        last = max((layer for _, layer in places.values() if layer is not None), default=0)
        tensors = {
            n: first[n]._replace(name=n, role=role, layer=layer, depth=None if layer is None else layer / max(last, 1))
            for n, (role, layer) in places.items()
        }
        return replace(self, tensors=tensors, reads=reads, config={**self.config, **(config or {})}, _made={})

    def made_from(self, name: str) -> list[tuple[Source, TensorInfo]]:
        """Where an output's values come from, in the order of the reads."""
        if name not in self._made:  # it is asked for four times, and a model may have many tensors
            reads = self.reads.get(name) or [(model, name) for model in self._models]
            self._made[name] = [(self._model(model), self._info(model, there)) for model, there in reads]
        return self._made[name]

    def _model(self, model: int | None) -> Source:
        if model is None and self.base:
            return self.base
        if model is None or not 0 <= model < len(self.experts):
            raise LuthierError("there is no base" if model is None else f"there is no expert {model}")
        return self.experts[model]

    def _info(self, model: int | None, name: str) -> TensorInfo:
        return _there(self._model(model), name)

    def _base_at(self, name: str) -> int | None:
        """Which of the values an output is made from is a Piece's base."""
        models = [model for model, _ in self.reads[name]] if name in self.reads else [None] * bool(self.base)
        return models.index(None) if None in models else None

    def pieces(self, sample: bool = False) -> Iterator[Any]:
        """All pieces (groups, with granularity `group`) in the canonical order; with `sample` some entries of some."""
        return self.each(lambda piece: piece, sample)

    def each(self, work: Callable[[Any], T], sample: bool = False) -> Iterator[T]:
        """work(piece) for every piece, in the canonical order, computed by several threads."""
        weigh = lambda stretch: self._weight(stretch.infos)  # noqa: E731
        for results in in_order(partial(self._work, work), self._stretches(sample), self.threads, weigh, self.most):
            yield from results

    def _work(self, work: Callable[[Any], T], stretch: Stretch) -> list[T]:
        if self.united(stretch.infos[0]):
            return [work(self._group(stretch.infos, {info.name: self._whole(info) for info in stretch.infos}))]
        if self.granularity == "group":
            return [work(self._group(stretch.infos, {piece.name: piece})) for piece in self._pieces(stretch)]
        return [work(piece) for piece in self._pieces(stretch)]

    def _stretches(self, sample: bool) -> Iterator[Stretch]:
        skip = self._skipped() if sample else 1
        for number, stretch in enumerate(self._grid(sample)):
            if number % skip == 0:
                yield stretch

    def _skipped(self) -> int:
        """Of the pieces of a sample, one in so many."""
        if self.granularity in ("tensor", "group"):
            return SAMPLED
        pieces = sum(-(-info.numel // _entries(info, self.granularity)) for info in self.tensors.values())
        return min(SAMPLED, max(1, pieces // ENOUGH))

    def _grid(self, sample: bool) -> Iterator[Stretch]:
        """Several pieces at once, or some entries of one for a sample; a unit whole."""
        for infos in self._shown():
            piece, step, count = self._spans(infos[0])
            step, thin = (piece, THIN) if sample and self.granularity != "group" else (step, 1)
            for start in range(0, count, max(1, step)):
                yield Stretch(infos, start, min(step, count - start), piece, thin)

    def _spans(self, info: TensorInfo) -> tuple[int, int, int]:
        """Of one tensor the entries of a piece, those that are read at once at most, and all that it is made from."""
        count = max(self.made_from(info.name)[0][1].numel, self.united(info))
        whole = self.granularity == "tensor" or self.united(info)
        piece = max(1, count) if whole else _entries(info, self.granularity)
        return piece, min(count, max(1, self.batch // piece) * piece), count

    def _weight(self, infos: tuple[TensorInfo, ...]) -> int:
        return sum(self._spans(i)[1] * len(self.made_from(i.name)) for i in infos)

    def _shown(self) -> Iterator[tuple[TensorInfo, ...]]:
        """What is shown together: a unit's tensors by name, where its first one lies; any other tensor alone."""
        found: dict[Any, list[TensorInfo]] = {}
        for name, info in self.tensors.items():
            found.setdefault(info.layer if self.united(info) else name, []).append(info)
        yield from (tuple(sorted(infos, key=lambda i: i.name)) for infos in found.values())

    def united(self, info: TensorInfo) -> bool:
        """Whether it is shown whole, with the other tensors of its unit."""
        return self.granularity == "group" and belongs(info.role, info.layer, self.unit)

    def _pieces(self, stretch: Stretch) -> Iterator[Piece]:
        info, (start, count, step, thin) = stretch.infos[0], stretch[1:]
        if self.granularity == "tensor":
            yield self._whole(info)
            return
        made_from = self.made_from(info.name)
        read = [source.read_flat(there.name, start, count) for source, there in made_from]
        if thin == 1 and (bits := as_stored(read, self.device)):
            rows, base_at, which = self.granularity == "row", self._base_at(info.name), self._which(info.name)
            for at in range(0, count, step):
                yield Stored(info, rows, start + at, [part[at : at + step] for part in bits], base_at, which)
        elif thin > 1:
            yield self._piece(info, start, made_from, [flat[::thin].contiguous() for flat in read], thin=True)
        else:
            for at in range(0, count, step):
                yield self._piece(info, start + at, made_from, [flat[at : at + step] for flat in read])

    def _group(self, infos: tuple[TensorInfo, ...], pieces: Mapping[str, Piece]) -> Group:
        return Group(self.unit if self.united(infos[0]) else "", infos[0].layer, infos[0].depth, pieces)

    def _whole(self, info: TensorInfo) -> Piece:
        made_from = self.made_from(info.name)
        read = [source.read_flat(there.name, 0, there.numel) for source, there in made_from]
        return self._piece(info, 0, made_from, read, "tensor")

    @property
    def _models(self) -> list[int | None]:
        return [*([None] if self.base else []), *range(len(self.experts))]

    def _piece(
        self, info: TensorInfo, start: int, made_from: Sequence[tuple[Source, TensorInfo]], read: Sequence[Tensor],
        by: str = "", thin: bool = False,
    ) -> Piece:  # fmt: skip
        values, by = [], by or self.granularity
        for (source, there), flat in zip(made_from, read, strict=True):
            part = flat.to(device=self.device, dtype=torch.float32)
            if not math.isfinite(float(part.sum())):  # sums overflow, too: the exact test decides
                check_finite(there.name, part, where=where(source, there.name))
            values.append(part.view(1, -1) if thin and by == "row" else _shaped(part, there, by))
        base_at = self._base_at(info.name)
        base = None if base_at is None else values.pop(base_at)
        return Piece(info.name, info.role, info.shape, info.depth, start, base, tuple(values), self._which(info.name))

    def _which(self, name: str) -> tuple[int, ...] | None:
        return tuple(m for m, _ in self.reads[name] if m is not None) if name in self.reads else None


class Stretch(NamedTuple):
    """What a thread reads at once: `count` entries of a tensor from `start`, in pieces of `step`; or whole tensors.

    thin: of a sample, where one entry in so many makes up a piece.
    """

    infos: tuple[TensorInfo, ...]
    start: int
    count: int
    step: int
    thin: int = 1


def check_grain(granularity: str, unit: str, method: str) -> None:
    """LuthierError for a granularity or a unit nobody streams."""
    if granularity not in GRAINS:
        raise unknown("granularity", granularity, GRAINS, where=method)
    if granularity == "group" and unit not in UNITS:
        raise unknown("unit", unit, UNITS, where=method)


def check_shapes(inputs: Inputs, method: str) -> None:
    """LuthierError for an output made in stretches from tensors of another shape than its own."""
    for name, info in inputs.tensors.items():
        for source, there in inputs.made_from(name):
            if inputs.granularity != "tensor" and there.shape != info.shape and not inputs.united(info):
                what = f"has the shape {list(there.shape)}, {name!r} is to have {list(info.shape)}"
                do = f"{method} needs granularity tensor or group to change shapes"
                raise LuthierError(what, where=where(source, there.name), do=do)


def where(source: Any, name: str) -> str:
    """File and tensor, for an error."""
    file = source.tensors[name].file if name in source.tensors else getattr(source, "path", "expert")
    return f"{file}: tensor {name!r}"


def _there(source: Source, name: str) -> TensorInfo:
    if name not in source.tensors:
        raise LuthierError("there is no such tensor", where=where(source, name))
    return source.tensors[name]


def _entries(info: TensorInfo, granularity: str) -> int:
    """Entries of a piece."""
    if granularity in ("element", "group"):
        return CHUNK
    whole = granularity == "tensor" or len(info.shape) < 2
    return max(1, info.numel if whole else ROWS * list(info.shape)[-1])


def _shaped(part: Tensor, info: TensorInfo, granularity: str) -> Tensor:
    shape = (-1, *info.shape[-1:]) if granularity == "row" else info.shape
    return part if granularity in ("element", "group") else part.view(shape)
