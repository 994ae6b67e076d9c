"""The process in which planted faults are tried: reads a task from stdin, writes one JSON line a fault.

Started by `testing.mutants` with a copy of the package in front of the import path. It loads what is
heavy once and forks for each fault, so a trial costs the checks and little more; golden vectors and then
checks run in the order of what they cost for each fault they noticed so far, and a trial ends with the
first that notices. The file as it is has to pass before the first fault and after the last.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOM, SECONDS, IDLE = 3, 10, 10
"""A test may take this many times what it takes on the file as it is, plus these seconds of CPU time; and so many times
that by the clock, for those that wait for what never comes."""


def main() -> None:
    task = json.loads(sys.stdin.read())
    target = Path(task["target"])
    _load(["pytest", "torch", "transformers.models.llama.modeling_llama"])
    sound = _forked(task)
    if sound["noticed"]:
        _say({"fault": sound["noticed"]})
        return
    _load(sound["modules"])
    text, times = target.read_text(encoding="utf-8"), Counter[str]()
    task["seconds"] = sound["seconds"]
    for i, mutant in enumerate(task["mutants"]):
        target.write_text(mutant["text"], encoding="utf-8")
        task["cost"] = {test: seconds / (1 + times[test]) for test, seconds in sound["seconds"].items()}
        found = _forked(task)
        times[found.get("test", "")] += 1
        _say({"i": i, "caught": found["noticed"]})
    target.write_text(text, encoding="utf-8")
    if noise := _forked(task)["noticed"]:  # then what failed may have been anything
        _say({"fault": noise})


def _load(names: list[str]) -> None:
    """Import what every trial would, but luthier itself: each fork imports that anew, with the fault in it."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()  # a collection in a fork would walk, and so copy, everything that was loaded before it


def _foreign() -> list[str]:
    """The modules loaded so far that are neither luthier's nor tests."""
    ours = ("luthier", "test", "toys", "conftest", "golden", "contracts", "__main__", "_pytest", "py.")
    return [n for n, m in sys.modules.items() if not n.startswith(ours) and getattr(m, "__spec__", None)]


def _forked(task: dict[str, Any]) -> dict[str, Any]:
    """What noticed the fault in the file as it stands now, "" if nothing did; the first time also the modules
    it took and the seconds of each test."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        tests = Tests(task.get("seconds", {}), task.get("cost", {}))
        result = {"noticed": tests.noticed(task["id"], task["golden"]), "test": tests.failed}
        if not tests.known:
            result |= {"modules": _foreign(), "seconds": tests.seconds}
        with os.fdopen(write, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if status == 0 else {"noticed": "crash or endless loop"}


class Tests:
    """The tests of one method, in the order of their cost so far as it is known. Is a plugin of pytest, too.

    known: seconds of each test on the file as it is; where they are known the process ends when a test takes far
    more.  seconds: what each test that ran took.  failed: the first one that noticed something.
    """

    def __init__(self, known: dict[str, float], cost: dict[str, float]):
        self.known, self.cost, self.failed = known, cost, ""
        self.seconds: dict[str, float] = {}
        self._begins("")  # imports and collection

    def noticed(self, id_: str, vectors: str) -> str:
        """What fails first, golden vectors or a check by its name; "" if nothing does."""
        import torch

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        try:
            return "golden" if vectors and self._golden(vectors) else self._contract(id_)
        except BaseException as fault:
            return f"import ({type(fault).__name__})"

    def _golden(self, vectors: str) -> bool:
        """Whether the golden vectors fail."""
        import pytest

        quiet = ["-qx", "-pno:cacheprovider", "--no-header", "--tb=no", "--assert=plain"]
        with contextlib.redirect_stdout(io.StringIO()):
            return pytest.main([*quiet, vectors], plugins=[self]) != 0

    def _contract(self, id_: str) -> str:
        from luthier import catalogue
        from luthier.testing import checks_for, run_check

        for check in sorted(checks_for(catalogue.card(id_)), key=lambda c: self.cost.get(c.name, 0.0)):
            self._begins(check.name)
            began = time.perf_counter()
            try:
                run_check(id_, check)
            except Exception:
                self.failed = check.name
                return check.name
            self.seconds[check.name] = time.perf_counter() - began
        return ""

    def _begins(self, test: str) -> None:
        if self.known:
            seconds = ROOM * self.known.get(test, 0.0) + SECONDS
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.setitimer(signal.ITIMER_REAL, IDLE * seconds)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._begins(nodeid)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.cost.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = report.nodeid


def _say(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
