"""The process in which planted faults are tried: reads a task from stdin, writes one JSON line a fault.

Started by `testing.mutants` with a copy of the package in front of the import path. It loads what is
heavy once and forks for each fault, so a trial costs the checks and little more.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

ROOM = 10
"""A trial may take this many times the CPU time of the file as it is, plus as many seconds."""


def main() -> None:
    task = json.loads(sys.stdin.read())
    _load_what_is_heavy()
    target = Path(task["target"])
    before = _children_seconds()
    fault = _forked(task, None)
    if fault:
        _say({"fault": fault})
        return
    limit = int(ROOM * (_children_seconds() - before)) + ROOM
    sound = target.read_text(encoding="utf-8")
    for i, mutant in enumerate(task["mutants"]):
        target.write_text(mutant["text"], encoding="utf-8")
        _say({"i": i, "caught": _forked(task, limit)})
    target.write_text(sound, encoding="utf-8")


def _load_what_is_heavy() -> None:
    """Everything but luthier itself, which each fork imports anew with the fault in it."""
    import pytest  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)


def _forked(task: dict[str, Any], seconds: int | None) -> str:
    """What noticed the fault in the file as it stands now, "" if nothing did."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        if seconds:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os.write(write, noticed(task["id"], task["golden"]).encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said if status == 0 else "crash or endless loop"


def noticed(id_: str, vectors: str) -> str:
    """The first test that fails: golden vectors, then the contract, quick checks first."""
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
        return pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=no", vectors]) != 0


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _say(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
