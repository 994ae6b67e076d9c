"""The `train:` and `search:` maps of a recipe as checked records. Imports no torch, so that planning stays light."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from luthier.errors import LuthierError, unknown
from luthier.fields import Count, Natural, Positive, Range, coerce, hints, thaw
from luthier.shapes import Measure

BY_ITEM = {"eval.perplexity": "nll", "eval.accuracy": "accuracy"}
"""measures of ours that candidates can be judged by, and what each gives"""
MEMORY = 512 << 20
"""Bytes a streamed transform may hold unless told otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    """A map of a step, whose values are checked like a method's fields."""

    key: ClassVar[str]
    """of the map in a step"""

    def __post_init__(self) -> None:
        for name, kind in hints(type(self)).items():
            try:
                object.__setattr__(self, name, coerce(getattr(self, name), kind))
            except LuthierError as fault:
                raise fault.at(f"{self.key}.{name}") from None
        self.check()

    def check(self) -> None:
        """LuthierError where values contradict each other."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From the map of a recipe; an unknown key names the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise unknown("field", name, known, where=cls.key)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSpec(_Spec):
    """How long, how fast and in what precision to train. Exactly one of steps, tokens, epochs is given.

    A step is one update: batch x accumulate sequences on every process. Values are checked like a
    method's fields; LuthierError names the field, or the nearest one to a name nobody knows (`of`).
    """

    steps: Count | None = None
    """updates"""
    tokens: Count | None = None
    """train until this many tokens, padding apart, have been seen"""
    epochs: Positive | None = None
    """passes over the training items of all data together, rounded up to whole steps"""
    batch: Count = 8
    """sequences in a micro-batch, on each process"""
    accumulate: Count = 1
    """micro-batches in a step"""
    lr: Positive = 1e-4
    """the highest learning rate"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """what the learning rate does after the warmup; linear and cosine end at zero"""
    warmup: Annotated[int, Range(0)] | Annotated[float, Range(0.0, 1.0)] = 0
    """linear rise of the learning rate: a whole number of steps, or a share of the training such as 0.1"""
    clip: Positive | None = 1.0
    """largest norm of the gradient over all leaves; null never clips"""
    dtype: Literal["auto", "fp32", "bf16", "bf16-mixed"] = "auto"
    """weights as they come (auto; trained in fp32 and rounded once at the end where the machine only
    emulates bf16), in fp32 or in bf16, or fp32 weights under bf16 autocast. In pure bf16 small updates
    are lost to rounding, except by methods that keep fp32 copies of what they train."""
    max_length: Count = 512
    """tokens of the longest row"""
    pack: bool = False
    """join plain texts into rows of exactly max_length tokens"""
    save_every: Count | None = None
    """steps between saves of the run; null saves only when interrupted"""
    keep: Count = 2
    """saves that are kept, the newest ones"""
    log_every: Count = 1
    """steps between entries of the history"""
    checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    draws: str | None = None
    """the name that random numbers are keyed by; trainings of one seed that share it start a new model from
    the same weights and see the same rows in the same order. null: the step's own name"""
    workers: Natural = 0
    """steps whose rows are readied ahead, each in a thread of its own; the bytes do not depend on it"""

    key: ClassVar[str] = "train"

    def check(self) -> None:
        lengths = [n for n in ("steps", "tokens", "epochs") if getattr(self, n) is not None]
        if len(lengths) != 1:
            given = " and ".join(lengths) or "no length"
            raise LuthierError(f"{given} given", where="train", do="give exactly one of steps, tokens, epochs")

    def sequences(self, world: int = 1) -> int:
        """Sequences in one step on `world` processes."""
        return self.batch * self.accumulate * world

    def planned(self, items: int, world: int = 1) -> int | None:
        """Steps that will be taken over this many training items; None when tokens decide."""
        if self.epochs is not None:
            return math.ceil(self.epochs * items / self.sequences(world))
        return self.steps

    def rate(self, step: int, done: float, after: float) -> float:
        """The learning rate of step number `step` (from 1), at which the share of the training that is
        complete goes from `done` to `after`. The first step is never at zero, nor is the last."""
        share = isinstance(self.warmup, float)
        rise = (after / self.warmup if share else step / self.warmup) if self.warmup else 1.0
        if rise < 1.0:
            return self.lr * rise
        risen = self.warmup if share else done * self.warmup / max(step - 1, 1)
        left = min(1.0, max(0.0, (1.0 - done) / (1.0 - risen))) if risen < 1.0 else 1.0
        shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
        return self.lr * shape[self.schedule]


def must_be_storage(text: str) -> None:
    """LuthierError for what names no place for trials."""
    if "://" not in text and not (text.startswith("journal:") and text != "journal:"):
        raise LuthierError(f"{text!r} is no storage", where="search.storage",
                           do="write journal:PATH or an SQL address such as sqlite:///trials.db")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpec(_Spec):
    """How long to search, and by what candidates are judged. Values are checked like a method's fields."""

    trials: Count = 50
    """candidates that a sampler proposes; methods that go through a fixed list ask for as many as they need"""
    items: Count = 32
    """training items of each data, drawn by the seed, that a candidate is judged by"""
    first: Count | None = None
    """items after which a proposed candidate may be stopped, then `factor` times as many, and so on (successive
    halving); null stops none"""
    factor: Annotated[int, Range(2)] = 3
    """of the candidates that have come as far, one in so many goes on"""
    measures: tuple[Measure, ...] = ("eval.perplexity",)  # type: ignore[assignment]
    """what is measured: likelihood, answers, or both, each on every data it can be measured on"""
    storage: str | None = None
    """where trials are kept: journal:PATH or an SQL address such as sqlite:///trials.db, which several runs may
    share; null: in the run's own folder, until the step is done"""

    key: ClassVar[str] = "search"

    def check(self) -> None:
        if not self.measures:
            raise LuthierError("names no measure", where="search.measures", do="write [eval.perplexity]")
        for id_ in (m.id for m in self.measures):
            if id_.startswith(("eval.", "probe.")) and id_ not in BY_ITEM:
                what = f"{id_} gives no value for each item"
                raise LuthierError(what, where="search.measures", do=f"take {' or '.join(BY_ITEM)}")
        if self.storage is not None:
            must_be_storage(self.storage)

    def objectives(self, data: Sequence[Any]) -> tuple[str, ...]:
        """Names of what is measured on these data, in order; none where a measure is not of ours."""
        if any(m.id not in BY_ITEM for m in self.measures):
            return ()
        every = [(source, BY_ITEM[m.id]) for m in self.measures for source in data]
        return tuple(f"{source.name} {metric}" for source, metric in every if metric == "nll" or source.scored)

    def rungs(self, items: int) -> tuple[int, ...]:
        """How many items a candidate has been judged by at each stop; the last is all of them."""
        found, at = [], self.first or items
        while at < items:
            found.append(at)
            at *= self.factor
        return (*found, items)
