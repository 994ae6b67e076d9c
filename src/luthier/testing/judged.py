"""A Study's doors over a plain function, for tests and claims whose candidates need no checkpoint on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.engine.finished import Body, Done
from luthier.engine.search import Trials, text_of
from luthier.flows import Space, Table
from luthier.kit.context import Context
from luthier.shapes import Study, Transform

Judge = Callable[[Any], Sequence[float]]


class Judged:
    """A `flows.Evaluate` and `flows.Budget`. judge: what a candidate is worth, lower is better, one number an
    objective.  base: what the base is worth.  folder: where trials are kept."""

    def __init__(
        self, judge: Judge, objectives: Sequence[str], base: Sequence[float], trials: int, ctx: Context, folder: Path
    ):  # fmt: skip
        self.objectives, self.trials, self._judge, self._ctx = tuple(objectives), trials, judge, ctx
        self._trials = Trials(folder / "trials.log", "judged", owner="judged")
        self.base = Body(-1, (), "", {1: tuple(base)}, False, 0.0, 0, {}).done(0, {})

    def proposals(self, sampler: str, **asked: Any) -> Iterator[Any]:
        return self._trials.proposals(self.trials, sampler, self._ctx, **asked)

    @property
    def finished(self) -> list[Done]:
        return [d for d in self._trials.finished() if not d.stopped]

    def __call__(self, candidate: Transform, proposal: Any = None) -> tuple[float, ...]:
        values = tuple(float(v) for v in self._judge(candidate))
        if proposal is None:
            return self._trials.note(text_of(candidate), {1: values}, 0.0, 0).values
        return proposal.tell(text_of(candidate), {1: values}, False, 0.0, 0).values

    def table(
        self, chosen: Transform, notes: Sequence[str] = (), beside: Callable[[Any], Mapping[str, Any]] | None = None
    ) -> Table:
        rows = [dict(zip(self.objectives, self.base.values, strict=True)) | {"chosen": False, "candidate": ""}]
        for done in self.finished:
            head = dict(zip(self.objectives, done.values, strict=True))
            rest = {"chosen": done.candidate == text_of(chosen), "candidate": done.candidate}
            rows.append(head | rest | (dict(beside(done)) if beside else {}))
        return Table.from_dicts(rows, notes)


def search(
    method: Study, judge: Judge, objectives: Sequence[str], base: Sequence[float], trials: int, space: Space,
    seed: int = 0, folder: Path | None = None,
) -> tuple[Table, list[Done]]:  # fmt: skip
    """The table, and every trial that was judged in the order proposed."""
    ctx = Context(seed=seed, step="judged")
    with tempfile.TemporaryDirectory(prefix="luthier-judged-") as place:
        doors: Any = Judged(judge, objectives, base, trials, ctx, folder or Path(place))
        method.fits(space, doors.objectives)
        return method.study(space, doors, doors, ctx), doors.finished
