"""Two processes at one folder at the same time: one is refused or waits, and what lies there is whole."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import runs

import luthier
from dying import begun, half_written, heard
from luthier import cli
from luthier.checkpoint import atomic

REFUSED = "another run is at work in this folder; wait for it, or give another --folder"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Models, two recipes and two merges."""
    folder = runs.make_home(tmp_path_factory.mktemp("home"))
    for seed, name in enumerate(("evaluation", "other")):
        (folder / f"{name}.yaml").write_text(json.dumps(runs.recipe(folder, "evaluation") | {"seed": seed}))
    for scale in (0.3, 0.7):
        step = {"use": "merge.task_arithmetic", "base": str(folder / "base"), "experts": [str(folder / "other")]}
        recipe = {"luthier": 1, "steps": {"sum": {**step, "set": {"scale": scale}}}}
        (folder / f"{scale}.yaml").write_text(json.dumps(recipe))
    return folder


def together(*lives: list[str], real: bool, apart: float = 0.0) -> list[tuple[int, str, str]]:
    """(exit code, what it said, what it complained of) of commands that run at the same time."""
    if real:
        command = [sys.executable, "-m", "luthier"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen([*command, *words], **pipes) for words in lives]
        return [(child.wait(), *said) for child in started for said in [child.communicate()]]
    ends = []
    for words in lives:
        ends.append(begun(lambda words=words: cli.main(words)))
        time.sleep(apart)
    return [end() for end in ends]


def refused(ended: list[tuple[int, str, str]], folder: Path) -> int:
    """How many were refused, by one line; the others came to their end without a complaint."""
    for code, _, complaint in ended:
        assert (code, complaint) in ((0, ""), (2, f"luthier: {folder}: {REFUSED}\n"))
    assert any(code == 0 for code, *_ in ended)
    return sum(code == 2 for code, *_ in ended)


def test_one_recipe_twice_in_one_folder(home, tmp_path, times, tell):
    """First the commands as a user starts them, then children."""
    dice, turned, real, rounds = random.Random(2), Counter(), times(1, 4), times(1, 16)
    luthier.run(home / "evaluation.yaml", folder=tmp_path / "calm")
    for number in range(rounds):
        folder = tmp_path / f"run{number}"
        words = ["run", str(home / "evaluation.yaml"), "--folder", str(folder)]
        ended = together(words, words, real=number < real, apart=dice.random())
        turned["commands" if number < real else "children"] += refused(ended, folder)
        assert runs.results(folder) == runs.results(tmp_path / "calm")
        done = [r for r in runs.ledger(folder) if r.status == "done"]
        assert Counter(r.step for r in done) == Counter(list(runs.check(folder)))  # one record a step
        assert half_written(folder) == [] and "</html>" in (folder / "report.html").read_text()[-20:]
    tell(f"at once, one recipe: {rounds} times, {real} of them commands; refused {dict(turned)}")


def test_two_recipes_in_one_folder(home, tmp_path, times, tell):
    """Their steps have the same names; what lies there is of whoever had the folder last."""
    dice, turned, rounds, folder = random.Random(3), 0, times(1, 12), tmp_path / "run"
    names = ("evaluation", "other")
    for name in names:
        luthier.run(home / f"{name}.yaml", folder=tmp_path / name)
    words = {name: ["run", str(home / f"{name}.yaml"), "--folder", str(folder), "--no-report"] for name in names}
    for _ in range(rounds):
        turned += refused(together(*words.values(), real=False, apart=dice.random()), folder)
        runs.check(folder)
        for name in names:
            assert heard(lambda name=name: cli.main(words[name]))[::2] == (0, "")
            assert runs.results(folder) == runs.results(tmp_path / name)
            runs.check(folder)
        shutil.rmtree(folder)
    tell(f"at once, two recipes: {rounds} times, {turned} refused")


@pytest.mark.parametrize("over", [False, True], ids=["nothing", "an old result"])
def test_two_merges_into_one_folder(over, home, tmp_path, times, tell):
    for scale in (0.3, 0.7):
        assert cli.main(["merge", str(home / f"{scale}.yaml"), str(tmp_path / f"{scale}")]) == 0
    known, out = [snapshot(tmp_path / f"{scale}") for scale in (0.3, 0.7)], tmp_path / "here" / "out"
    complained, rounds, won = 0, times(3, 40), Counter()
    for number in range(rounds):
        shutil.rmtree(out.parent, ignore_errors=True)
        if over:
            shutil.copytree(tmp_path / "0.3", out)
        lives = [["merge", str(home / f"{scale}.yaml"), str(out)] for scale in (0.3, 0.7)]
        for code, said, complaint in together(*lives, real=number > 37):
            assert (code, said, complaint) == (0, f"{out}\n", "") or (code == 2 and complaint.count("\n") == 1)
            complained += code == 2
        won[known.index(snapshot(out))] += 1
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert complained == 0
    tell(f"at once, two merges over {'an old result' if over else 'nothing'}: {rounds} times, won {dict(won)}")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_writers_of_one_new_folder_meet_at_the_rename(tmp_path, monkeypatch):
    """The second sees no folder, and finds one as it renames its own."""
    out, exists = tmp_path / "out", Path.exists
    with monkeypatch.context() as patch, atomic.write_folder(out) as one:
        (one / "a").write_text("one")
        with atomic.write_folder(out) as two:
            (two / "a").write_text("two")
        asked = iter([False])  # as if the question had been put a moment earlier
        patch.setattr(Path, "exists", lambda self: next(asked, True) if self == out else exists(self))
    assert (out / "a").read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["out"]
