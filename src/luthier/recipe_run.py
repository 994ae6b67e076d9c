"""Runs a recipe: what is done is kept, what broke goes on, every attempt is in the ledger.

A step's hash covers its resolved keys, the content of its inputs, the source of its methods and the
version of this package; never the hardware. The layout of a run folder is in `luthier.ledger`.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import ledger
from luthier.checkpoint.atomic import discard, sweep, write_file
from luthier.errors import LuthierError, unknown
from luthier.flows import Table
from luthier.ledger import Ledger, Record
from luthier.recipe import Recipe, load
from luthier.recipe_inputs import Inputs, Watch, sources
from luthier.recipe_plan import done, plan
from luthier.recipe_steps import Step


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    recipe: Recipe
    records: Mapping[str, Record]
    """the record of every step, by step"""
    kept: tuple[str, ...] = ()
    """steps that had been done before and were not repeated"""

    def path(self, step: str) -> Path:
        """The folder of what a step gave; of a model, ready for `from_pretrained`."""
        self.record(step)
        return self.folder / "steps" / step

    def record(self, step: str) -> Record:
        if step not in self.records:
            raise unknown("step", step, self.records)
        return self.records[step]

    def table(self, step: str) -> Table:
        """The table of a Measure step."""
        return Table.from_json((self.path(step) / "table.json").read_text())


def run(
    source: str | Path | Mapping[str, Any] | Recipe, *, folder: str | Path | None = None, fresh: bool = False,
    sets: Sequence[str] = (), watch: Watch | None = None,
) -> Run:  # fmt: skip
    """Run a recipe: the name of a shipped one, a path, or a map in the recipe grammar.

    folder: `runs/NAME` unless given.  fresh: forget what was done there.  sets: "step.key=value".
    watch: called with events; `kind` is plan, step, kept, progress, metrics, log, done.
    Raises LuthierError for everything a user can mend, before anything has started where it can be known.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        do = "start it without the launcher, or train with luthier.engine.trainer.train under it"
        raise LuthierError("a recipe runs in one process", do=do)
    recipe = source if isinstance(source, Recipe) else load(source, sets)
    place = Path(folder) if folder is not None else Path("runs") / recipe.name
    with ledger.only_one(place):
        if fresh:
            for name in ("steps", "work", "cache"):
                discard(place / name)
        for name in ("", "steps", "cache"):  # what a killed run was writing
            sweep(place / name)
        return _Running(recipe, place, watch or (lambda event: None)).go()


class _Running:
    def __init__(self, recipe: Recipe, folder: Path, watch: Watch):
        self.recipe, self.folder, self.watch = recipe, folder, watch
        self.inputs = Inputs(recipe, folder, watch)
        self.ledger = Ledger(folder)
        self.records: dict[str, Record] = {}
        self.kept: list[str] = []

    def go(self) -> Run:
        self.inputs.open()
        made = plan(self.recipe, self.inputs)
        self.flops = {s.name: s.flops for s in made.steps}
        write_file(self.folder / "recipe.yaml", self.recipe.to_yaml())
        write_file(self.folder / "plan.json", json.dumps(made.as_dict(), indent=1))
        self.watch({"kind": "plan", "plan": made})
        made.must_work()
        for step in self.recipe.steps.values():
            self.records[step.name] = self._step(step)
        self.ledger.export(self.folder / "ledger.jsonl")
        return Run(self.folder, self.recipe, self.records, tuple(self.kept))

    def _step(self, step: Step) -> Record:
        digest = self.inputs.hash(step)
        kept = done(self.folder, step.name, digest)
        if kept:
            self.kept.append(step.name)
            self.watch({"kind": "kept", "step": step.name, "record": kept})
            if not any(r.hash == digest and r.status == "done" for r in self.ledger.records(step.name)):
                self.ledger.add(kept)  # killed between the last two writes
            _forget(self.folder / "work", step.name)
        else:
            kept = self._do(step, digest)
        self.inputs.finished(step.name, kept)
        return kept

    def _do(self, step: Step, digest: str) -> Record:
        from luthier.engine import runner

        self.watch({"kind": "step", "step": step.name, "use": step.use, "shape": step.shape})
        started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
        made: list[Record] = []

        def record(status: str, notes: tuple[str, ...], **rest: Any) -> Record:
            return self._record(step, digest, status, started, time.perf_counter() - clock, notes, **rest)

        def seal(folder: Path, outcome: Any) -> None:
            output = self.inputs.content(folder, outcome.artefacts)
            made.append(record("done", (*self.inputs.notes(step), *outcome.notes), outcome=outcome, output=output))
            (folder / "record.json").write_text(made[0].to_json(), encoding="utf-8")

        try:
            runner.execute(self.inputs.job(step, digest), self._told(step, digest), seal)
        except LuthierError as fault:
            self._broke(record("failed", (str(fault),)))
            raise fault.at(f"{step.where} (step {step.name})") from None
        except KeyboardInterrupt:
            self._broke(record("interrupted", ()))
            raise
        except Exception as fault:
            self._broke(record("failed", (f"{type(fault).__name__}: {fault}",)))
            raise
        self.ledger.add(made[0])
        _forget(self.folder / "work", step.name)
        self.watch({"kind": "done", "step": step.name, "record": made[0]})
        return made[0]

    def _told(self, step: Step, digest: str) -> Any:
        """The step's context; what it says of trials goes into the ledger, too."""
        context = self.inputs.context(step)
        watch = context.watch
        known: set[str] = set()
        if step.shape == "Study":
            known |= {r.step for r in self.ledger.records() if r.hash == digest and r.status == "trial"}

        def heard(event: Mapping[str, Any]) -> None:
            if event["kind"] == "trial" and f"{step.name}#{event['number']}" not in known:
                known.add(f"{step.name}#{event['number']}")
                self._broke(self._trial(step, digest, event))
            watch(event)

        return context.with_(watch=heard)

    def _trial(self, step: Step, digest: str, event: Mapping[str, Any]) -> Record:
        ended = datetime.datetime.now(datetime.UTC)
        seen = {**event["values"], "items": event["items"], "trial": event["number"], "stopped": event["stopped"]}
        return Record(
            run=self.folder.name, step=f"{step.name}#{event['number']}", base=step.base, hash=digest, status="trial",
            use=step.use, shape=step.shape, seed=step.seed, vary=event["params"],
            config=json.loads(event["candidate"] or "{}"), metrics=seen, seconds=event["seconds"],
            started=(ended - datetime.timedelta(seconds=event["seconds"])).isoformat(timespec="seconds"),
        )  # fmt: skip

    def _broke(self, record: Record) -> None:
        """A ledger that cannot be written must not hide the fault itself."""
        with suppress(LuthierError):
            self.ledger.add(record)

    def _record(
        self, step: Step, digest: str, status: str, started: datetime.datetime, seconds: float,
        notes: tuple[str, ...], outcome: Any = None, output: str | None = None,
    ) -> Record:  # fmt: skip
        base = Path("steps") / step.name
        return Record(
            run=self.folder.name, step=step.name, base=step.base, hash=digest, status=status, use=step.use,
            shape=step.shape, seed=step.seed, vary=dict(step.vary), config=step.config(),
            inputs=self.inputs.named(step), sources=sources(step),
            output=output,
            metrics={**outcome.metrics, "flops": self.flops[step.name]} if outcome else {},
            artefacts={k: str(base / v) if v else str(base) for k, v in outcome.artefacts.items()} if outcome else {},
            machine=ledger.machine(str(self.inputs.device)), versions=ledger.versions(),
            started=started.isoformat(timespec="seconds"), seconds=seconds, notes=notes,
        )  # fmt: skip


def _forget(work: Path, step: str) -> None:
    """Remove the training checkpoints of a step, those of earlier attempts under other settings too."""
    for left in work.glob(f"{step}-*"):
        if len(left.name) == len(step) + 17:
            shutil.rmtree(left, ignore_errors=True)
