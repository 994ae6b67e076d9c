"""Planted faults: small wrong changes to a method's file, and the share of them that its tests notice.

Contract checks and golden vectors of one method run against each changed file, in a process of its
own, on a copy of the package: the tree is never edited. A fault nobody notices is reported with its
line; it either needs a test or changes nothing that matters.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier import catalogue
from luthier.errors import LuthierError
from luthier.testing import golden
from luthier.testing.faults import Mutant, plant

GOAL = 0.95


@dataclass(frozen=True)
class Hunt:
    """What became of the planted faults of one method."""

    id: str
    tried: int
    survivors: tuple[Mutant, ...]
    by: dict[str, int]
    """how many each check caught, the first that noticed"""

    @property
    def share(self) -> float:
        """The share of faults that were noticed."""
        return 1.0 - len(self.survivors) / self.tried if self.tried else 1.0

    def lines(self) -> list[str]:
        """The result for people: the share, then each fault nobody noticed."""
        head = (
            f"{self.id}: {self.tried - len(self.survivors)} of {self.tried} planted faults noticed ({self.share:.0%})"
        )
        return [head, *(f"  line {m.line}: {m.what}" for m in self.survivors)]


def hunt(id_: str, limit: int | None = None, watch: Callable[[str], None] | None = None) -> Hunt:
    """Plant faults in the method's file, one at a time, and see which the tests notice.

    limit: try at most this many, spread evenly over the file.  watch: receives one line a fault.
    Raises LuthierError if the tests fail on the file as it is, or the platform cannot fork.
    """
    if not hasattr(os, "fork"):
        raise LuthierError("planted faults need os.fork", do="use Linux or macOS")
    entry = catalogue.card(id_)
    mutants = plant(entry.path.read_text(encoding="utf-8"))
    if limit is not None and len(mutants) > limit:
        mutants = [mutants[i * len(mutants) // limit] for i in range(limit)]
    survivors, by = [], {}
    with tempfile.TemporaryDirectory(prefix="luthier-mutants-") as temp:
        target = _overlay(Path(temp), entry)
        for i, caught in _trials(id_, Path(temp), target, mutants):
            if not caught:
                survivors.append(mutants[i])
            else:
                by[caught] = by.get(caught, 0) + 1
            if watch:
                watch(f"{i + 1}/{len(mutants)} line {mutants[i].line}: {mutants[i].what}: {caught or 'NOT NOTICED'}")
    return Hunt(id_, len(mutants), tuple(survivors), by)


def _overlay(where: Path, entry: catalogue.Card) -> Path:
    """Copy the package, and the method's own package if it is another one; the method's file in the copy."""
    for top in dict.fromkeys(("luthier", entry.module.split(".")[0])):
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            raise LuthierError(f"cannot find the source of {top}", where=entry.id)
        origin = Path(spec.origin)
        if origin.name == "__init__.py":
            shutil.copytree(origin.parent, where / top, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, where / origin.name)
    parts = entry.module.split(".")
    return where.joinpath(*parts[:-1], f"{parts[-1]}.py")


def _trials(id_: str, overlay: Path, target: Path, mutants: list[Mutant]) -> Iterator[tuple[int, str]]:
    """(index, what noticed it or "") of each mutant, as they finish."""
    vectors = golden.file_of(id_)
    task: dict[str, Any] = {
        "id": id_, "target": str(target), "golden": str(vectors) if vectors.exists() else "",
        "mutants": [asdict(m) for m in mutants],
    }  # fmt: skip
    env = {
        **os.environ, "PYTHONPATH": f"{overlay}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(
            [sys.executable, "-m", "luthier.testing.trials"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=env, cwd=golden.ROOT,
        )  # fmt: skip
        assert run.stdin and run.stdout
        run.stdin.write(json.dumps(task))
        run.stdin.close()
        for line in run.stdout:
            result = json.loads(line)
            if "fault" in result:
                raise LuthierError(f"the tests fail without a planted fault: {result['fault']}", where=id_)
            yield result["i"], result["caught"]
        if run.wait():
            said.seek(0)
            raise LuthierError(f"the trials broke off: {' '.join(said.read().split())[-300:]}", where=id_)
