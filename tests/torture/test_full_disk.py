"""A disk that fills up on the way: one line that says so, the old result whole, and with room the same command goes on.

The disk is a tmpfs of a few MiB, so these need the right to mount one. A ballast file leaves so much room
that the command breaks off early, late, or not at all.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs

import luthier
from dying import Mortal, half_written, heard
from luthier import cli, ledger, recipe_run, report
from luthier.checkpoint import atomic, delta, lora, writer
from luthier.engine import runner, saved
from luthier.testing import tiny

WRITING = {m.__file__ for m in (atomic, delta, lora, writer, runner, saved, ledger, recipe_run, report)}
SIZE = 6 << 20


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return runs.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def room(disk: Path) -> int:
    free = os.statvfs(disk)
    return free.f_bavail * free.f_frsize


def leave(disk: Path, nbytes: int) -> None:
    """Take all room of the disk but so much."""
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(max(0, room(disk) - nbytes)))


def make_room(disk: Path) -> None:
    (disk / "ballast").unlink()


def anew(disk: Path, *folders: Path) -> None:
    """The disk as it was before the attack: copies of these folders, nothing else."""
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in folders:
        shutil.copytree(folder, disk / folder.name)


def is_one_line(complaint: str, disk: Path) -> bool:
    """It says that the disk is full, where, and what to do."""
    lines = complaint.splitlines()
    assert len(lines) == 1 and lines[0].startswith("luthier: "), complaint
    assert str(disk) in lines[0] and "disk" in lines[0] and "free" in lines[0], complaint
    assert not any(word in lines[0] for word in ("Error", "Errno", "--debug")), complaint
    return "the disk is full" in lines[0]


def sizes(need: int, count: int) -> list[int]:
    """From no room at all to a little more than enough."""
    return [0, *(need * i // (count - 1) for i in range(1, count - 1)), need + (64 << 10)]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def litter(folder: Path) -> list[Path]:
    """Half output; SQLite's own log is none, which it keeps as long as it cannot be worked into the ledger."""
    return [path for path in half_written(folder) if path.name != "ledger.sqlite-wal"]


def test_merging(home, disk, tmp_path, times, tell):
    for name, scale in (("old", 0.3), ("new", 0.7)):
        step = {"use": "merge.task_arithmetic", "base": str(home / "base"), "experts": [str(home / "other")]}
        recipe = {"luthier": 1, "steps": {"sum": {**step, "set": {"scale": scale}}}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
        assert cli.main(["merge", str(tmp_path / f"{name}.yaml"), str(tmp_path / name / "out")]) == 0
    old, new = (snapshot(tmp_path / name / "out") for name in ("old", "new"))
    words = ["merge", str(tmp_path / "new.yaml"), str(disk / "out")]
    broke, count = 0, times(6, 60)
    for free in sizes(sum(map(len, new.values())) + (64 << 10), count):
        anew(disk, tmp_path / "old" / "out")
        leave(disk, free)
        code, said, complaint = heard(lambda: cli.main(words))
        if code:
            assert code == 2 and is_one_line(complaint, disk) and said == ""
            assert snapshot(disk / "out") == old and {p.name for p in disk.iterdir()} == {"out", "ballast"}
        make_room(disk)
        broke += code != 0
        assert cli.main(words) == 0 and snapshot(disk / "out") == new
    assert 0 < broke < count
    tell(f"full disk, merge: {count} sizes, {broke} too small")


@pytest.mark.parametrize("verb", ["export", "extract"])
def test_converting(home, disk, tmp_path, verb):
    """A file or folder in a model's place: the old one stands until the new one is whole."""
    out = "out.gguf" if verb == "export" else "out"
    inputs = {"export": [str(home / "base")], "extract": [str(home / "other"), str(home / "base")]}[verb]
    more = {"export": ["--type", "f16"], "extract": []}[verb]
    assert cli.main([verb, *inputs, str(tmp_path / out), *more]) == 0
    new = sum(map(len, snapshot(tmp_path).values()))
    broke = 0
    for free in sizes(new, 5):
        anew(disk)
        leave(disk, free)
        code, said, complaint = heard(lambda: cli.main([verb, *inputs, str(disk / out), *more]))
        if code:
            assert code == 2 and is_one_line(complaint, disk) and said == ""
            assert {p.name for p in disk.iterdir()} == {"ballast"}
        broke += code != 0
    assert 0 < broke < 5


class Attack:
    """A run over a finished run of another recipe, on a disk that fills up."""

    def __init__(self, kind: str, home: Path, disk: Path, folder: Path):
        self.disk, self.run = disk, disk / "run"
        few = {"steps": 2} if kind == "training" else {}
        first, second = (runs.recipe(home, kind, **few) | {"seed": seed} for seed in (0, 1))
        folder.mkdir()
        (folder / "run.yaml").write_text(json.dumps(second))
        self.first = luthier.run(first, folder=folder / "old" / "run").folder
        self.old = runs.results(self.first)
        self.words = ["run", str(folder / "run.yaml"), "--folder", str(self.run), "--no-report"]
        self.mortal = Mortal(lambda: cli.main(self.words), WRITING)
        anew(disk, self.first)
        self.mortal.measure()
        self.new = runs.results(self.run)

    def strike(self, free: int, arm: Callable[[], None]) -> tuple[bool, int]:
        """(whether it said that the disk is full, how many new steps were done before)."""
        anew(self.disk, self.first)
        if free:
            leave(self.disk, free)

        def live() -> int:
            arm()
            return cli.main(self.words)

        code, said, complaint = heard(live)
        full, kept = False, 0
        if code:
            assert code == 2
            full, kept = is_one_line(complaint, self.disk), self.look()
        (self.disk / "ballast").unlink(missing_ok=True)
        assert heard(lambda: cli.main(self.words))[::2] == (0, "")  # with room it goes on
        assert runs.results(self.run) == self.new and set(runs.check(self.run)) == set(self.mended())
        assert half_written(self.run) == [] and list(self.run.glob("work/*")) == []
        return full, kept

    def of(self, step: str, results: dict) -> dict:
        return {name: v for name, v in results.items() if name == step or name.startswith(f"steps/{step}/")}

    def mended(self) -> set[str]:
        return {r.step for r in runs.ledger(self.run) if r.status == "done"}

    def look(self) -> int:
        """Every step's result is the old one or the new one, whole."""
        standing, now = runs.check(self.run), runs.results(self.run)
        assert set(standing) == {step for step in self.old if "/" not in step}
        for step in standing:
            files = [
                {n: v for n, v in of.items() if n.startswith(f"steps/{step}/")} for of in (now, self.old, self.new)
            ]
            assert (now[step], files[0]) in ((self.old[step], files[1]), (self.new[step], files[2]))
        assert litter(self.disk) == [] and {p.name for p in self.disk.iterdir()} == {"run", "ballast"}
        return sum(now[step] == self.new[step] for step in standing)


def test_running(home, disk, tmp_path, times, tell):
    """Too small from the start, as the plan may say; or filled up by others on the way, wherever that is."""
    dice, count, small = random.Random(8), times(2, 24), [1, 1 << 13, 1 << 15, 1 << 17][: times(1, 4)]
    for kind in ["training", "evaluation", "ledger"][: times(1, 3)]:
        attack = Attack(kind, home, disk, tmp_path / kind)
        early = sum(attack.strike(free, lambda: None)[0] for free in small)
        full = kept = 0
        for _ in range(count):
            nbytes = dice.choice([0, 1 << 13, 1 << 15])
            broke, done = attack.strike(0, attack.mortal.at_a_line(dice, lambda n=nbytes: leave(disk, n)))
            full, kept = full + broke, kept + done
        assert early and full
        tell(f"full disk, run ({kind}): {early} of {len(small)} sizes too small to begin with; filled up on the way "
             f"{count} times, too much {full} times, {kept} steps done before it and kept")  # fmt: skip


def test_reporting(home, disk, tmp_path, times, tell):
    run = luthier.run(runs.recipe(home, "training"), folder=tmp_path / "run").folder
    report.build(run)
    page = (run / "report.html").read_bytes()
    (run / "steps" / "a.changes.json").unlink()
    count, broke = times(2, 20), 0
    for free in sizes(len(page), count):
        anew(disk, run)
        leave(disk, free)
        code, said, complaint = heard(lambda: cli.main(["report", str(disk / "run")]))
        if code:
            assert code == 2 and is_one_line(complaint, disk) and said == ""
            assert (disk / "run" / "report.html").read_bytes() == page and litter(disk) == []
        broke += code != 0
        make_room(disk)
        assert heard(lambda: cli.main(["report", str(disk / "run")]))[::2] == (0, "")
    assert 0 < broke < count
    tell(f"full disk, report: {count} sizes, {broke} too small")


def test_output_that_cannot_be_written():
    command = [sys.executable, "-m", "luthier", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "luthier: output: the disk is full; free some space, try again\n")


def test_saving_from_python(disk):
    """A live model, whose tensors and tokenizer are written by libraries with errors of their own."""
    from luthier.checkpoint.writer import save_model
    from luthier.errors import LuthierError

    model, tokenizer = tiny.llama(), tiny.tokenizer()
    save_model(disk / "out", model, tokenizer, "card")
    old = snapshot(disk / "out")
    for free in sizes(sum(map(len, old.values())), 12):
        leave(disk, free)
        try:
            save_model(disk / "out", model, tokenizer, "card")
        except LuthierError as fault:
            assert "the disk is full" in str(fault) and str(disk / "out") in str(fault)
        assert snapshot(disk / "out") == old and {p.name for p in disk.iterdir()} == {"out", "ballast"}
        make_room(disk)
