"""Studies: candidates judged in memory on training items, every one a row of the table, the best one carried out.

A candidate is a Transform with all its fields. It is made in memory from the base and the experts, which are held
there in the dtype of the computation: that many bytes a study needs. What was judged before, here or by another
process that shares the storage, is not judged again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier import __version__
from luthier.engine.compose import composed, held, model_of
from luthier.engine.finished import BROKEN
from luthier.engine.search import Done, Trials, text_of
from luthier.engine.spec import SearchSpec
from luthier.engine.subject import Subject_, load_tokenizer
from luthier.engine.trunk import Trunk
from luthier.errors import LuthierError
from luthier.flows import Item, Scalar, Space, Table
from luthier.kit.context import Context
from luthier.kit.metrics import BY_TOKENS, HIGHER
from luthier.kit.precision import working
from luthier.shapes import Study, Transform

COLUMNS = ("trial", "state", "items", "parameters", "seconds", "chosen", "candidate")


@dataclass(frozen=True)
class Some:
    """A `flows.Data` of a few training items: what a candidate is judged by. rest: training items beside them."""

    inner: Any
    test: Sequence[Item]
    train: Sequence[Item]

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def scored(self) -> bool:
        return self.inner.scored

    def score(self, item: Item, output: str) -> float:
        return self.inner.score(item, output)


def run_study(
    method: Study, base: Any, experts: Sequence[Any], data: Sequence[Any], spec: SearchSpec, ctx: Context,
    folder: Path, threads: int | None = None,
) -> tuple[Table, Transform]:  # fmt: skip
    """The table of all trials and the candidate that was chosen. folder: where the trials are kept unless spec says.

    Raises LuthierError for models that do not fit together, for data without training items, and where Optuna
    is not installed.
    """
    depths = [1 + max(i.layer for i in m.tensors.values() if i.layer is not None) for m in (base, *experts)]
    space = Space(depths[0], tuple(depths[1:]), tuple(Path(e.path).name for e in experts))
    method.fits(space, spec.objectives(data))
    evaluator = Evaluator(method, base, experts, data, spec, ctx, folder, threads)
    method.fits(space, evaluator.objectives)
    table = method.study(space, evaluator, evaluator, ctx.with_(roles={**ctx.roles, "data": list(data)}))
    evaluator.tell_all()
    chosen = table.where(chosen=True)
    if len(chosen) != 1:
        raise LuthierError(f"chose {len(chosen)} candidates", where=method.id)
    return table, Transform.from_value(json.loads(chosen[0]["candidate"]))


@dataclass
class Sums:
    """A candidate's values so far, as weighted sums an objective."""

    items: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        metric = row["metric"]
        value = 1.0 - row["value"] if metric in HIGHER else row["value"]
        weight = float(row["tokens"]) if metric in BY_TOKENS else 1.0
        of = self.sums.setdefault(f"{row['data']} {metric}", [0.0, 0.0])
        of[0] += value * weight
        of[1] += weight

    def values(self) -> dict[str, float]:
        return {name: total / weight for name, (total, weight) in self.sums.items()}


class Evaluator:
    """A `flows.Evaluate` and `flows.Budget` in one."""

    def __init__(
        self, method: Study, base: Any, experts: Sequence[Any], data: Sequence[Any], spec: SearchSpec, ctx: Context,
        folder: Path, threads: int | None,
    ):  # fmt: skip
        self.spec, self.ctx, self.id = spec, ctx, method.id
        self.threads = threads or torch.get_num_threads()
        self._data = [_drawn(source, spec.items, ctx) for source in data]
        name = _name(method, base, experts, self._data, spec, ctx)
        owner = f"{platform.node()}:{folder.resolve()}"
        self._trials = Trials(spec.storage or folder / "trials.log", name, owner)
        self.items = max(len(some.test) for some in self._data)
        self.rungs = spec.rungs(self.items)
        dtype = working(next(i.dtype for i in base.tensors.values() if i.dtype.is_floating_point), ctx.device)
        self._base, self._experts = held(base, dtype), [held(e, dtype) for e in experts]
        self._tokenizer = load_tokenizer(Path(base.path))
        several = (self._base, *self._experts)
        self.trunk = Trunk(m.read_flat(n, 0, i.numel).view(i.shape) for m in several for n, i in m.tensors.items())
        self.objectives: tuple[str, ...] = ()
        self._told: set[int] = set()
        self.base = self._first()

    @property
    def trials(self) -> int:
        return self.spec.trials

    def proposals(
        self, sampler: str, first: Sequence[Any] = (), scalar: Any = None, size: int | None = None,
        population: int | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """See `flows.Budget.proposals`."""
        return self._trials.proposals(self.spec.trials, sampler, self.ctx, first, scalar, size, population)

    @property
    def finished(self) -> list[Done]:
        """All trials that were seen through, in the order proposed; the base's own is not among them."""
        return [d for d in self._trials.finished() if not d.stopped and d.candidate]

    def __call__(self, candidate: Transform, proposal: Any = None) -> tuple[float, ...] | None:
        """See `flows.Evaluate`."""
        text = text_of(candidate)
        known = self._seen(text, proposal)
        if known:
            if proposal is not None:
                self._put(proposal, text, known.rungs, known.stopped, 0.0, known.parameters)
            return None if known.stopped else known.values
        began = time.perf_counter()
        with ExitStack() as kept:
            try:
                model, tokenizer = kept.enter_context(self.open(candidate))
            except LuthierError as fault:
                if proposal is None or not self.finished:  # then what is asked for may not be possible at all
                    raise
                self.ctx.emit("log", text=f"trial {proposal.ordinal} cannot be built ({fault}); it counts as the worst")
                broken = {self.items: (BROKEN,) * len(self.objectives)}
                return self._put(proposal, text, broken, False, time.perf_counter() - began, 0).values
            self.trunk.grow(model)
            rungs, stopped = self._judged(model, tokenizer, proposal)
            parameters = sum(p.numel() for p in model.parameters())
        done = self._put(proposal, text, rungs, stopped, time.perf_counter() - began, parameters)
        return None if stopped else done.values

    def _seen(self, text: str, proposal: Any) -> Done | None:
        """What has been found of a candidate, here or by another process: all of it, or what it was stopped at, if
        it would be stopped there again."""
        every = [d for d in self._trials.finished() if d.candidate == text]
        whole = next((d for d in every if not d.stopped), None)
        if whole or proposal is None:
            return whole
        return next((d for d in every if self._behind(d.values, d.items, proposal.scalar)), None)

    @contextmanager
    def open(self, candidate: Transform) -> Iterator[tuple[Any, Any]]:
        """See `flows.Evaluate`."""
        tensors, config = composed(candidate, self._base, self._experts, self.ctx, self.threads)
        yield model_of(tensors, config, self.ctx.device), self._tokenizer

    def table(self, chosen: Transform, notes: Sequence[str] = (), beside: Any = None) -> Table:
        """See `flows.Evaluate`."""
        rows, taken = [], text_of(chosen)
        listed: set[str] = set()
        for done in [self.base, *(d for d in self._trials.finished() if d.candidate)]:
            if done.ordinal < 0 and done.candidate in listed:  # two processes looked at it at once
                continue
            listed |= {done.candidate} if done.ordinal < 0 else set()
            best = done.candidate == taken and not done.stopped and not any(r["chosen"] for r in rows)
            head = {"trial": len(rows), "state": "stopped" if done.stopped else "whole", "items": done.items}
            rest = {"parameters": done.parameters, "seconds": done.seconds, "chosen": best, "candidate": done.candidate}
            more = beside(done) if beside and done.candidate else {}
            rows.append(head | dict(zip(self.objectives, done.values, strict=True)) | rest | more)
        if not any(row["chosen"] for row in rows):
            raise LuthierError("the chosen candidate was never judged", where=self.id)
        judged = [row for row in rows if row["seconds"]]  # what was judged before takes no time and no look
        looked = sum(min(row["items"], len(some.test)) for row in judged for some in self._data)
        many, took = "s" * (len(rows) != 2), sum(row["seconds"] for row in rows)
        cost = f"{len(rows) - 1} candidate{many}, {looked} looks at an item, {took:.0f} s"
        return Table.from_dicts(rows, (*notes, cost))

    def _first(self) -> Done:
        """The base's own values, with which the objectives become known."""
        known = next((d for d in self._trials.finished() if not d.candidate), None)
        began = time.perf_counter()
        tensors = {n: self._base.read_flat(n, 0, i.numel).view(i.shape) for n, i in self._base.tensors.items()}
        sums = Sums()
        model = model_of(tensors, self._base.config, self.ctx.device)
        self.trunk.grow(model)
        self._look(model, self._tokenizer, sums, self.items if known is None else 1)
        self.objectives = tuple(sums.values())
        if known is not None:
            return known
        seconds, parameters = time.perf_counter() - began, sum(p.numel() for p in model.parameters())
        return self._put(None, "", {sums.items: tuple(sums.values().values())}, False, seconds, parameters)

    def _judged(self, model: Any, tokenizer: Any, proposal: Any) -> tuple[dict[int, tuple[float, ...]], bool]:
        """Values after each rung, and whether the candidate was stopped there."""
        found: dict[int, tuple[float, ...]] = {}
        sums = Sums()
        for rung in self.rungs if proposal is not None else (self.items,):
            self._look(model, tokenizer, sums, rung, proposal)
            values = sums.values()
            found[rung] = tuple(values[name] for name in self.objectives)
            if rung < self.items and proposal is not None and self._behind(found[rung], rung, proposal.scalar):
                return found, True
        return found, False

    def _look(self, model: Any, tokenizer: Any, sums: Sums, upto: int, proposal: Any = None) -> None:
        subject = Subject_("candidate", model, tokenizer)
        parts = [Some(d.inner, d.test[sums.items : upto], d.train) for d in self._data]
        parts = [part for part in parts if part.test]
        quiet = self.ctx.with_(watch=None)
        with torch.inference_mode():
            for measure in self.spec.measures:
                if proposal is not None:
                    proposal.alive()
                for row in measure.measure([subject], parts, quiet).dicts():
                    sums.add(row)
        sums.items = upto
        if not sums.sums:
            raise LuthierError("nothing could be measured on these data", where=self.id, do="see search.measures")

    def _behind(self, values: tuple[float, ...], rung: int, scalar: Scalar) -> bool:
        """Whether it is not among the best at this rung: asynchronous successive halving."""
        others = sorted(scalar(d.rungs[rung]) for d in self._trials.finished() if rung in d.rungs)
        if len(others) < self.spec.factor:
            return False
        return scalar(values) > others[(len(others) + 1) // self.spec.factor - 1]

    def _put(
        self, proposal: Any, text: str, rungs: Any, stopped: bool, seconds: float, parameters: int
    ) -> Done:  # fmt: skip
        if proposal is not None:
            done = proposal.tell(text, rungs, stopped, seconds, parameters)
        else:
            done = self._trials.note(text, rungs, seconds, parameters)
        self._tell(done, here=True)
        return done

    def _tell(self, done: Done, here: bool) -> None:
        self._told.add(done.number)
        self.ctx.emit(
            "trial", number=done.number, params=dict(done.params), items=done.items, stopped=done.stopped,
            seconds=done.seconds, candidate=done.candidate, here=here,
            values=dict(zip(self.objectives, done.values, strict=True)),
        )  # fmt: skip

    def tell_all(self) -> None:
        """Of the trials that others made, too, and of those that we died over."""
        for done in self._trials.finished():
            if done.number not in self._told:
                self._tell(done, here=False)


def _name(
    method: Study, base: Any, experts: Sequence[Any], data: Sequence[Some], spec: SearchSpec, ctx: Context
) -> str:  # fmt: skip
    """What makes two searches the same one: everything but how long, and where it is kept."""
    science = {k: v for k, v in spec.to_dict().items() if k not in ("trials", "storage")}
    sources = []
    for some in data:
        content = some.inner.hash() if hasattr(some.inner, "hash") else some.name
        sources.append([content, [item.id for item in (*some.test, *some.train)]])
    parts = [__version__, method.to_dict(), science, ctx.seed, [m.hash() for m in (base, *experts)], sources]
    return f"{method.id} {hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}"


def _drawn(source: Any, count: int, ctx: Context) -> Some:
    """`count` training items with something to predict, and the others. All searches of a recipe judge by the same:
    they are drawn by seed and source."""
    generator = ctx.with_(step="search").rng("items", source.name)
    order = torch.randperm(len(source.train), generator=generator).tolist()
    usable = [source.train[i] for i in order]
    usable = [item for item in usable if item.prompt is None or item.answer is not None]
    if not usable:
        raise LuthierError("has no training items to judge by", where=f"data {source.name!r}",
                           do="give its split a train count")  # fmt: skip
    return Some(source, usable[:count], usable[count:])
