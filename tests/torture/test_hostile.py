"""Hostile inputs: each ends in one clear line or is rightly accepted, in bounded memory and time, and leaves
nothing behind but in the output folder. The inputs are in `hostile*.py`, the children they run in `sandbox.py`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sandbox
from hostile import CASES

from luthier.cli import main

HERE = Path(__file__).parent
FULL = os.environ.get("LUTHIER_TORTURE") == "full"
NAMES = [name for name in CASES if FULL or not CASES[name].full]
HALF = re.compile(r"here/(\.?out|runs/[^/]+/steps/|runs/[^/]+/report|home/tmp/)|\.(tmp|old)-|\.part")
"""What must not stand where the command failed: an output, a part of one, or what it was made from."""


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What every case left, by name."""
    command = [sys.executable, HERE / "sandbox.py", tmp_path_factory.mktemp("hostile"), *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    found = [sandbox.Left(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr[-2000:]
    return {one.name: one for one in found}


def faults(case, left):
    """What is wrong with the way a case ended."""
    lines = left.err.splitlines()
    if left.changed:
        yield f"touched {left.changed}"
    if left.cpu > case.cpu or left.memory > case.memory:
        yield f"took {left.cpu:.1f} s and {left.memory:.0f} MiB"
    if not case.says:
        if left.code:
            yield f"was refused: {left.err[:400]}"
        return
    if left.code != 2 or len(lines) != 1 or len(lines[0]) > 1300 or not lines[0].isprintable():
        yield f"ended with {left.code} and {len(lines)} lines: {left.err[:400]}"
    elif missing := [word for word in case.says if word not in lines[0]]:
        yield f"does not say {missing}: {lines[0]}"
    if half := [path for path in left.output if HALF.search(path)]:
        yield f"left {half}"


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_input(left, name):
    assert list(faults(CASES[name], left[name])) == []


def test_the_judge_can_fail(left):
    """A judge that never finds fault would tell nothing."""
    name = next(n for n in NAMES if CASES[n].says and n in left)
    case, good = CASES[name], left[name]
    for spoilt in (
        good._replace(code=1), good._replace(err=good.err * 2), good._replace(err="luthier: no\n"),
        good._replace(err="luthier: \x1b[31m" + good.err), good._replace(changed=["secret"]),
        good._replace(output=["here/out"]), good._replace(output=["here/.out.tmp-1-00000000"]),
        good._replace(cpu=99.0), good._replace(memory=9999.0),
    ):  # fmt: skip
        assert list(faults(case, spoilt))


def test_a_report_shows_names_and_does_not_obey_them(tmp_path, monkeypatch):
    command = CASES["run: names that are programs"].make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(command) == 0
    page = (tmp_path / "runs" / "x" / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in page and "<script>alert" not in page and "<img src=x" not in page


def test_there_are_hundreds_of_them(left, tell):
    assert len(NAMES) >= 400
    cpu, most = sum(one.cpu for one in left.values()), max(left.values(), key=lambda one: one.memory)
    refused = sum(one.code == 2 for one in left.values())
    tell(f"hostile inputs: {len(left)}, {refused} refused, {cpu:.0f} s of CPU in all, "
         f"at most {max(one.cpu for one in left.values()):.1f} s and {most.memory:.0f} MiB ({most.name})")  # fmt: skip
