"""Runs killed at any moment: what was done is not done again, and the end is that of a calm run."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import runs

import luthier
from dying import Mortal, fork, half_written, kill_after
from luthier import ledger, recipe_run, report
from luthier.checkpoint import atomic, delta, lora, writer
from luthier.engine import runner, saved
from luthier.ledger import Ledger, Record

WRITING = {m.__file__ for m in (atomic, delta, lora, writer, runner, saved, ledger, recipe_run, report)}
KINDS = {"training": (2, 20), "evaluation": (2, 40), "ledger": (2, 40)}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return runs.make_home(tmp_path_factory.mktemp("home"))


class Chain:
    """One run folder, through as many lives as it takes."""

    def __init__(self, recipe: dict, folder: Path, events: Path):
        self.recipe, self.folder, self.events = recipe, folder, events
        self.standing: dict[str, Record] = {}
        self.trained = 0
        """the last training step after which a save was due"""

    def body(self) -> None:
        """Runs in a child; what it starts and keeps is on the disk before it goes on."""
        said = os.open(self.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def watch(event) -> None:
            if event["kind"] in ("step", "kept"):
                os.write(said, f"{event['kind']} {event['step']}\n".encode())
            if event["kind"] == "progress" and event["what"] == "train":
                os.write(said, f"train {event['done']}\n".encode())

        luthier.run(self.recipe, folder=self.folder, watch=watch)
        if "a" in self.recipe["steps"]:  # a training, of which there is most to draw
            report.build(self.folder)

    def look(self) -> None:
        """After a life: nothing that stood was lost, nothing that was done was done again."""
        said = [line.split() for line in self.events.read_text().splitlines()] if self.events.exists() else []
        self.events.unlink(missing_ok=True)
        for kind, step in said:
            assert kind != "step" or step not in self.standing, f"{step} was done, and was done again"
            assert kind != "train" or int(step) > self.trained, f"training step {step} was saved, and was done again"
        self.trained = max([self.trained, *(int(n) for kind, n in said if kind == "train" and int(n) % 2 == 0)])
        now = runs.check(self.folder)
        for step, record in self.standing.items():
            assert now[step] == record
        self.standing = now

    def end(self, calm: dict) -> None:
        """The run came to its end."""
        assert runs.results(self.folder) == calm
        records = runs.ledger(self.folder)
        assert Counter(r.step for r in records) == Counter(list(self.recipe["steps"]))  # one record a step
        assert {r.step: r for r in records} == self.standing
        assert half_written(self.folder) == [] and list(self.folder.glob("work/*")) == []
        lines = (self.folder / "ledger.jsonl").read_text().splitlines()
        assert len(lines) == len(records)
        assert "a" not in self.standing or "</html>" in (self.folder / "report.html").read_text()[-20:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_and_ends_as_a_calm_one(kind, home, tmp_path, times, tell):
    dice, recipe, wanted = random.Random(kind), runs.recipe(home, kind), times(*KINDS[kind])
    chain = Chain(recipe, tmp_path / "calm", tmp_path / "events")
    mortal = Mortal(lambda: chain.body(), WRITING)
    mortal.measure()
    chain.look()
    calm = runs.results(chain.folder)
    chain.end(calm)
    kills, left, longest = Counter(), 0, 0
    while kills.total() < wanted:
        chain, before = Chain(recipe, tmp_path / "run", tmp_path / "events"), kills.total()
        while True:
            code, how = mortal.live(dice, 0.6 if kills.total() < wanted else 9)
            assert code in (0, -signal.SIGKILL)
            left += bool(half_written(chain.folder))
            chain.look()
            if code == 0:
                break
            kills[how] += 1
        chain.end(calm)
        longest = max(longest, kills.total() - before)
        shutil.rmtree(chain.folder)
    told = f"{kills.total()} killed, {kills['line']} of them at a line that writes; {left} left something half written"
    tell(f"{kind} in a run: {told}; at most {longest} deaths in one run")


def test_killed_inside_the_ledgers_own_writes(tmp_path, times, tell):
    """Nothing but records, as fast as they go: each one told of is there."""
    dice, folder, left = random.Random(5), tmp_path / "run", 0
    acknowledged = tmp_path / "told"
    record = {"run": "r", "base": "p", "hash": "h", "status": "failed", "use": "sos.certify", "shape": "Certify"}

    def write() -> None:
        said, book = os.open(acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT), Ledger(folder)
        for i in range(10**6):
            book.add(Record(step=f"{os.getpid()}-{i}", seed=i, notes=("x" * dice.randrange(9000),), **record))
            os.write(said, f"{os.getpid()}-{i}\n".encode())

    for _ in range(times(2, 13)):
        pid = fork(write)
        kill_after(pid, dice.uniform(0.02, 0.15))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        left += bool(half_written(folder))
        names = [r.step for r in runs.ledger(folder)]
        told = acknowledged.read_text().split() if acknowledged.exists() else []
        assert len(set(names)) == len(names) and set(told) <= set(names) and len(names) <= len(told) + times(2, 13)
    tell(f"ledger alone: {times(2, 13)} killed, {left} inside a transaction, {len(names)} records written and whole")
