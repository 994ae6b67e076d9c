"""The process in which planted faults are tried: reads a task from stdin, writes one JSON line a fault.

Started by `testing.mutants` with a copy of the package in front of the import path. It loads what is
heavy once and forks for each fault, so a trial costs the checks and little more. The file as it is has to
pass before the first fault and after the last.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

ROOM, SECONDS = 3, 10
"""A trial may take this many times the CPU time of the file as it is, imports included, plus these seconds."""


def main() -> None:
    task = json.loads(sys.stdin.read())
    target = Path(task["target"])
    _load(["pytest", "torch", "transformers.models.llama.modeling_llama"])
    before = _children_seconds()
    sound = _forked(task, None)
    if sound["noticed"]:
        _say({"fault": sound["noticed"]})
        return
    _load(sound["modules"])
    limit = int(ROOM * (_children_seconds() - before)) + SECONDS
    text = target.read_text(encoding="utf-8")
    for i, mutant in enumerate(task["mutants"]):
        target.write_text(mutant["text"], encoding="utf-8")
        _say({"i": i, "caught": _forked(task, limit)["noticed"]})
    target.write_text(text, encoding="utf-8")
    if noise := _forked(task, limit)["noticed"]:  # then what failed may have been anything
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


def _forked(task: dict[str, Any], seconds: int | None) -> dict[str, Any]:
    """What noticed the fault in the file as it stands now, "" if nothing did, and the modules it took."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        if seconds:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        result = {"noticed": noticed(task["id"], task["golden"])}
        with os.fdopen(write, "w") as pipe:
            json.dump(result if seconds else result | {"modules": _foreign()}, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if status == 0 else {"noticed": "crash or endless loop"}


def noticed(id_: str, vectors: str) -> str:
    """The first test that fails: golden vectors, then the contract, quick checks first."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        if vectors and _golden(vectors):
            return "golden"
        from luthier import catalogue
        from luthier.testing import checks_for, run_check

        for check in checks_for(catalogue.card(id_)):
            try:
                run_check(id_, check)
            except Exception:
                return check.name
    except BaseException as fault:
        return f"import ({type(fault).__name__})"
    return ""


def _golden(vectors: str) -> bool:
    """Whether the golden vectors fail."""
    import pytest

    with contextlib.redirect_stdout(io.StringIO()):
        return pytest.main(["-qx", "-pno:cacheprovider", "--no-header", "--tb=no", "--assert=plain", vectors]) != 0


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _say(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
