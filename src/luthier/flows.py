"""What flows between methods: small frozen records, and the doors through which a method sees the world."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier.certificate import Certificate as Certificate
from luthier.errors import LuthierError
from luthier.trials import Budget as Budget
from luthier.trials import Evaluate as Evaluate
from luthier.trials import Proposal as Proposal
from luthier.trials import Scalar as Scalar
from luthier.trials import Space as Space

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """What an Objective returns.

    total: a scalar that carries the gradient, the mean over `count` units (usually label tokens).
    terms: named parts of it, detached, for the log.  The trainer weights batches by `count`, so
    accumulation and ranks give the loss of the global batch.
    """

    total: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    count: int = 1


@dataclass(frozen=True)
class Item:
    """One piece of data. Either `text` (plain), or `prompt` and `answer`, or `messages` (chat turns).

    id: a hash of the content; splits and overlaps are decided by it.
    meta: what the source knows besides (the generator's entry, file, line, family).
    """

    id: str
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


class Data(Protocol):
    """A named source, split once and for all into train and test items that share no id."""

    @property
    def name(self) -> str: ...

    @property
    def train(self) -> Sequence[Item]: ...

    @property
    def test(self) -> Sequence[Item]: ...

    @property
    def scored(self) -> bool:
        """Whether answers can be scored, so that accuracy has a meaning."""
        ...

    def score(self, item: Item, output: str) -> float:
        """The score in [0, 1] of a model's raw output, after the source's own answer extraction."""
        ...


class Subject(Protocol):
    """A model that a Measure or Decode may open: named, loaded only while it is looked at."""

    @property
    def name(self) -> str: ...

    def open(self) -> AbstractContextManager[tuple[nn.Module, Any]]:
        """The model in eval mode on the context's device, and its tokenizer."""
        ...


@dataclass(frozen=True)
class Table:
    """Rows under named columns: what a Measure or Study returns. Values are plain scalars."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()

    def dicts(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def where(self, **match: Any) -> list[dict[str, Any]]:
        """The rows whose named columns have these values."""
        return [d for d in self.dicts() if all(d[k] == v for k, v in match.items())]

    @classmethod
    def from_dicts(cls, dicts: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> Table:
        columns = tuple(dict.fromkeys(k for d in dicts for k in d))
        return cls(columns, tuple(tuple(d.get(c) for c in columns) for d in dicts), tuple(notes))

    def to_json(self) -> str:
        return json.dumps({"columns": self.columns, "rows": self.rows, "notes": self.notes}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Read back what `to_json` gave; LuthierError for anything else."""
        try:
            raw = json.loads(text)
            made = cls(tuple(raw["columns"]), tuple(tuple(r) for r in raw["rows"]), tuple(raw["notes"]))
            made.dicts()
        except (KeyError, RecursionError, TypeError, ValueError) as fault:
            raise LuthierError(f"this is no table ({type(fault).__name__})") from None
        return made


@dataclass(frozen=True)
class Trace:
    """What decoding leaves: per prompt the new tokens and text, and what they cost.

    forwards: forward passes of the host, a batch counted once.  cache_bytes: the largest cache held.
    """

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    forwards: int
    cache_bytes: int = 0
    stopped: tuple[str, ...] = ()
    """why each row ended: "eos", "stop" or "length" """


@dataclass(frozen=True)
class Piece:
    """What a Transform sees at once: the same stretch of one tensor, from the base and every expert.

    base: the base's values in fp32, None where the recipe has no base.  experts: theirs, in recipe
    order, fp32; the shape is flat for `element`, (rows, columns) for `row`, whole for `tensor`.
    depth: the layer's place in [0, 1], None outside the layers.  start: offset of the first element.
    which: the experts' numbers in the recipe, where an output is made from some of them only.
    stored: where compiled kernels can take them, the values as they were read, bits of bfloat16: the shape they are
    seen in, the base's, the experts'. `base` and `experts` are then made when they are asked for.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    depth: float | None
    start: int
    base: Tensor | None
    experts: tuple[Tensor, ...]
    which: tuple[int, ...] | None = None
    stored: tuple[tuple[int, ...], Any, Sequence[Any]] | None = None

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.experts if self.stored is None else self.stored[2])

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape of `base` and of each expert."""
        if self.stored is None:
            return tuple((self.base if self.base is not None else self.experts[0]).shape)
        (first, *rest), _, experts = self.stored
        return (experts[0].size // math.prod(rest) if first < 0 else first, *rest)


@dataclass(frozen=True)
class Group:
    """What a Transform of granularity `group` sees at once: the whole tensors of one anatomical unit.

    unit: attention, mlp or layer; "" for a tensor that is part of none, which comes alone, in flat stretches.
    pieces: name → Piece with its whole tensor, or its stretch, ordered by name.
    layer and depth: None outside the layers.
    """

    unit: str
    layer: int | None
    depth: float | None
    pieces: Mapping[str, Piece]


@dataclass(frozen=True)
class Remap:
    """A leaf's entries have moved: new[i] = old[source[i]], or zero where source[i] is -1.

    The trainer applies it to every tensor of optimizer state that has the leaf's shape.
    """

    leaf: Tensor
    source: Tensor


@dataclass(frozen=True)
class Scaling:
    """What a Rule says of one parameter; None leaves the engine's default."""

    init_std: float | None = None
    multiplier: float = 1.0
    lr: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True)
class Param:
    """A parameter as a Rule sees it."""

    name: str
    role: str
    shape: tuple[int, ...]
    depth: float | None


class Ctx(Protocol):
    """A method's only door to the world. The concrete one is `kit.context.Context`."""

    @property
    def seed(self) -> int: ...

    @property
    def step(self) -> str: ...

    @property
    def survey(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def scratch(self) -> Path | None:
        """Of a Transform: a folder for what is as large as a model; it is gone when the output is written."""
        ...

    def key(self, *item: Any) -> int:
        """A 63-bit number that depends on (seed, step name, item) and nothing else."""
        ...

    def rng(self, *item: Any, device: Any = "cpu") -> torch.Generator:
        """A fresh generator keyed by (seed, step name, item)."""
        ...

    def role(self, name: str, default: Any = None) -> Any:
        """A role of the recipe step that is not an argument of the verb, such as `paired_to`."""
        ...

    def progress(self, items: Any, total: int | None = None, what: str = "") -> Iterator[Any]:
        """Iterate, reporting each item to whoever watches."""
        ...

    def emit(self, kind: str, **values: Any) -> None:
        """Report an event: "log" with a text, "metrics" with numbers."""
        ...

    def cached(self, name: str, key: Mapping[str, Any], make: Any) -> Any:
        """A map of tensors, made once for all steps of a run that ask with an equal key."""
        ...

    def fitted(self, name: str, key: Mapping[str, Any], training: Any) -> Any:
        """The same of the weights of a small network that is trained now. training: see `engine.drawn.Training`."""
        ...
