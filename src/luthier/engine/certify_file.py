"""Certificates for a file of problems: each result is a line of the output the moment it is there.

A line of the output is a JSON object with the `key` of its problem and settings; a problem whose key stands
there is not done again. Whenever the run is stopped, at most the line that was being written is torn: it is
cut off when the file is opened next, and its problem is done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier.engine.certify import certify
from luthier.engine.certify_pool import Lost, answers
from luthier.engine.certify_scale import undecided
from luthier.errors import LuthierError, unknown
from luthier.flows import Certificate
from luthier.kit.problem import KEYS, problem

BEGIN = b'{"key": "'


def problems(path: Path) -> Iterator[dict[str, Any]]:
    """{line, name, problem} of each line that holds one, or {line, error}: text, or JSON with the KEYS and a name."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as fault:
        raise LuthierError(f"cannot be read ({fault.strerror})", where=str(path)) from None
    for number, line in enumerate(lines, start=1):
        line = line.strip("\ufeff \t\r\f\v")
        if not line or line.startswith("#"):
            continue
        try:
            yield {"line": number, **_problem(line)}
        except LuthierError as fault:
            yield {"line": number, "name": None, "problem": line, "error": str(fault)}


def _problem(line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"name": None, "problem": line}
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise LuthierError(f"not JSON ({fault})") from None
    for key in found:
        if key not in (*KEYS, "name"):
            raise unknown("key", key, (*KEYS, "name"))
    return {"name": found.pop("name", None), "problem": found}


class Results:
    """The output file, locked and open at its end. keys: {key: whether it was stopped before it had a verdict}."""

    def __init__(self, path: Path):
        self.path, self.keys, self.cut = path, {}, 0
        try:
            self.file = open(path, "a+b", buffering=0)  # noqa: SIM115, it lives as long as this
        except OSError as fault:
            raise LuthierError(f"cannot be written ({fault.strerror})", where=str(path)) from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise LuthierError(
                "another process is writing to it", where=str(path), do="wait, or name another"
            ) from None
        try:
            self._read()
        except BaseException:
            self.file.close()
            raise

    def _read(self) -> None:
        at, whole = 0, True
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                row, whole = _row(line), line.endswith(b"\n")
                if row:
                    self.keys[row["key"]] = "stopped" in row
                elif not whole and line[: len(BEGIN)] == BEGIN[: len(line)]:
                    os.truncate(self.path, at)
                    self.cut = len(line)
                else:
                    what = "is no result of luthier certify; nothing was changed"
                    raise LuthierError(what, where=f"{self.path}:{number}", do="name another file")
                at += len(line)
        if not whole and not self.cut:
            self.write(b"\n")

    def write(self, data: bytes) -> None:
        while data:
            data = data[self.file.write(data) :]

    def add(self, row: Mapping[str, Any]) -> None:
        self.keys[row["key"]] = "stopped" in row
        self.write(json.dumps(row, allow_nan=False).encode() + b"\n")

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of each whole line of an output; a line that is a certificate itself counts as a row."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as fault:
        raise LuthierError(f"cannot be read ({fault.strerror})", where=str(path)) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if row is None and number == len(lines) and line.startswith(BEGIN):
            return  # it is being written
        if not isinstance(row, dict) or not ({"key", "status"} & set(row)):
            raise LuthierError("is no result of luthier certify", where=f"{path}:{number}")
        yield number, row if "key" in row else {"certificate": row}


def run(
    path: Path, out: Path, use: str, fields: Mapping[str, Any], jobs: int, seconds: float | None = None,
    again: bool = False, watch: Callable[[dict[str, Any], int, int], None] = lambda row, done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Do what `out` lacks of the problems in `path`. Returns {"todo", "kept", "cut"}.

    again: those that were stopped, by the time or by the death of their process, are done again.  watch: gets
    each new row, how many there are, and how many there will be.
    """
    with Results(out) as results:
        todo, kept = {}, set()
        for each in problems(path):
            text = json.dumps([use, dict(fields), each["name"], each["problem"]], sort_keys=True, default=str)
            key = hashlib.sha256(text.encode()).hexdigest()[:24]
            if key in results.keys and not (again and results.keys[key]):
                kept.add(key)
            else:
                todo.setdefault(key, {"key": key, **each, "use": use, "fields": dict(fields)})
        for done, (task, answer) in enumerate(answers(todo.values(), attempt, warm, min(jobs, len(todo)), seconds), 1):
            row = {name: task[name] for name in ("key", "line", "name")} | _said(task, answer)
            results.add(row)
            watch(row, done, len(todo))
        return {"todo": len(todo), "kept": len(kept), "cut": results.cut}


def _said(task: Mapping[str, Any], answer: Any) -> dict[str, Any]:
    if not isinstance(answer, Lost):
        return answer
    try:
        made = undecided(problem(task["problem"]), str(answer))
    except LuthierError as fault:
        return {"error": str(fault)}
    return {"problem": task["problem"], "certificate": made.data(), "stopped": str(answer)}


def warm() -> None:
    """One small problem, so that everything is imported, or is said to be missing."""
    certify("x^2 + 1")


def attempt(task: Mapping[str, Any]) -> dict[str, Any]:
    """The end of a row for one task, whatever happens; runs in a process of its own."""
    began = time.perf_counter()
    if "error" in task:
        return {"error": task["error"]}
    given = task["problem"]
    try:
        asked = problem(given)
    except LuthierError as fault:
        return {"error": str(fault)}
    try:
        text = given.get("polynomial") if isinstance(given, dict) and not asked.constrained else given
        made = certify(text, use=task["use"], **task["fields"])
    except LuthierError as fault:
        return {"error": str(fault)}
    except BaseException as fault:  # a panic of the solver is no Exception
        made = undecided(asked, f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}")
    seconds = round(time.perf_counter() - began, 3)
    return {"problem": given, "seconds": seconds, "certificate": json.loads(made.to_json())}


def recheck(row: Mapping[str, Any]) -> tuple[str, str]:
    """("proven", "refused" or "no proof"; why) of a row: by the verifier, and whether it is about its problem."""
    if "certificate" not in row:
        return "no proof", str(row.get("error", "a row without a certificate"))
    try:
        made = Certificate.from_json(json.dumps(row["certificate"]))
    except LuthierError as fault:
        return "refused", str(fault)
    if made.status not in ("exact", "not_sos"):
        return "no proof", f"{made.status}: {made.reason}"
    why = made.refusal()
    if why is None and "problem" in row and not _same(row["problem"], made):
        why = "the certificate is about another problem"
    return ("proven", f"{made.status}: {made.reason}") if why is None else ("refused", why)


def _same(given: Any, made: Certificate) -> bool:
    try:
        asked = undecided(problem(given), "")
    except LuthierError:
        return False
    return all(getattr(asked, name) == getattr(made, name) for name in ("variables", "polynomial", "nonneg", "zero"))
