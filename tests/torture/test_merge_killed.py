"""Merging over an old result, killed: what lies there is the old result or the new one, whole."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dying import Mortal, half_written, heard
from luthier import cli
from luthier.checkpoint import atomic, delta, writer
from luthier.engine import stream
from luthier.testing import tiny

WRITING = {m.__file__ for m in (atomic, writer, delta, stream)}


def digest(folder: Path) -> str:
    """Of every name and byte in the folder."""
    made = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        made.update(f"{path.relative_to(folder)}\0".encode() + (path.read_bytes() if path.is_file() else b""))
    return made.hexdigest()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Three models, and two recipes that merge them differently."""
    folder = tmp_path_factory.mktemp("home")
    names = [str(tiny.checkpoint(folder / name, seed=i)) for i, name in enumerate(["base", "one", "two"])]
    for scale in (0.3, 0.7):
        step = {"use": "merge.task_arithmetic", "base": names[0], "experts": names[1:], "set": {"scale": scale}}
        recipe = {"luthier": 1, "hardware": {"threads": 2}, "steps": {"sum": step}}
        (folder / f"{scale}.yaml").write_text(json.dumps(recipe))
    return folder


@pytest.fixture(scope="module")
def known(home) -> dict[str, str]:
    """The digest of each whole result."""
    for scale in (0.3, 0.7):
        assert cli.main(["merge", str(home / f"{scale}.yaml"), str(home / f"out{scale}")]) == 0
    found = {digest(home / f"out{scale}"): str(scale) for scale in (0.3, 0.7)}
    assert len(found) == 2
    return found


def test_forked(home, known, tmp_path, times, tell):
    dice, out, wanted = random.Random(3), tmp_path / "here" / "out", ["0.3"]
    mortal = Mortal(lambda: cli.main(["merge", str(home / f"{wanted[0]}.yaml"), str(out)]), WRITING)
    mortal.measure()
    tally = {"clock": 0, "line": 0, "left": 0, "ended": 0, "new": 0}
    while tally["clock"] + tally["line"] < times(10, 47):
        wanted[0] = "0.7" if known[digest(out)] == "0.3" else "0.3"
        code, how = mortal.live(dice)
        assert code in (0, -signal.SIGKILL)
        tally["ended" if code == 0 else how] += 1
        assert digest(out) in known  # byte for byte one of the two
        tally["new"] += code != 0 and known[digest(out)] == wanted[0]
        left = half_written(out.parent)
        assert len(left) <= 1  # those of earlier deaths are gone
        tally["left"] += bool(left)
    assert cli.main(["merge", str(home / f"{wanted[0]}.yaml"), str(out)]) == 0
    assert known[digest(out)] == wanted[0] and [p.name for p in out.parent.iterdir()] == ["out"]
    told = f"{tally['clock'] + tally['line']} killed, {tally['line']} of them at a line that writes"
    tell(f"merge: {told}; {tally['left']} left it half written, {tally['new']} with the new result in its place")


def test_the_command_as_a_user_starts_it(home, known, tmp_path, times, tell):
    dice, out, killed = random.Random(4), tmp_path / "out", 0
    assert cli.main(["merge", str(home / "0.3.yaml"), str(out)]) == 0
    for _ in range(times(1, 3)):
        command = [sys.executable, "-m", "luthier", "merge", home / "0.7.yaml", out]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while child.poll() is None and not half_written(tmp_path):
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        assert digest(out) in known
    assert heard(lambda: cli.main(["merge", str(home / "0.7.yaml"), str(out)])) == (0, f"{out}\n", "")
    assert known[digest(out)] == "0.7" and [p.name for p in tmp_path.iterdir()] == ["out"]
    tell(f"merge, as a command: {killed} killed")
