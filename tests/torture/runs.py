"""Small recipes for attacks on run folders, and what must hold of such a folder at any moment."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from luthier.checkpoint.reader import Checkpoint
from luthier.ledger import Record
from luthier.testing import tiny

LINES = "".join(f"the {i} quick brown foxes jump over {7 * i} lazy dogs and {i * i} cats\n" for i in range(300))


def make_home(folder: Path) -> Path:
    """Two tiny models and a book."""
    tiny.checkpoint(folder / "base")
    tiny.checkpoint(folder / "other", seed=1)
    (folder / "book.txt").write_text(LINES)
    return folder


def recipe(home: Path, kind: str, **train: Any) -> dict[str, Any]:
    """training, evaluation or ledger: a recipe that does mostly this."""
    base, other = str(home / "base"), str(home / "other")
    spec = {"steps": 10, "batch": 2, "max_length": 48, "lr": 1e-2, "save_every": 2} | train
    pair, few = {"models": [base, other], "data": "book"}, {"max_items": 8}
    steps: dict[str, Any] = {
        "training": {
            "a": {
                "use": "tune.lift", "model": base, "data": "book", "train": spec, "set": {"share": 0.1, "rank": 2},
            },
            "sum": {"use": "merge.task_arithmetic", "base": base, "experts": ["a", other]},
            "loss": {"use": "eval.perplexity", "models": ["a", "sum"], "data": "book", "set": few},
        },
        "evaluation": {
            "table": {"use": "eval.compare", **pair, "set": {"resamples": 200}},
            "loss": {"use": "eval.perplexity", **pair, "set": few},
            "words": {"use": "decode.sample", "models": base, "prompts": ["the", "fox"], "set": {"max_new_tokens": 4}},
            "mean": {"use": "merge.linear", "experts": [base, other]},
            "again": {"use": "eval.perplexity", "models": "mean", "data": "book", "set": few},
        },
        "ledger": {f"p{i}": {"use": "sos.certify", "problem": f"x^2 - {2 * i}*x + {i * i}"} for i in range(12)},
    }[kind]  # fmt: skip
    split = {"by": "window", "test": 0.2}
    book = {"book": {"source": f"text:{home}/book.txt", "split": split, "set": {"chars": 120}}}
    return {"luthier": 1, "data": {} if kind == "ledger" else book, "steps": steps}


def done(run: Path) -> dict[str, Record]:
    """The steps whose record stands, each checked: what it names is there and is what its hash says."""
    found = {}
    for path in run.glob("steps/[!.]*/record.json"):
        record = Record.from_dict(json.loads(path.read_text()))
        assert record.status == "done" and record.step == path.parent.name
        assert all((run / place).exists() for place in record.artefacts.values())
        assert content(run, record) == record.output
        found[record.step] = record
    return found


def content(run: Path, record: Record) -> str:
    if "model" in record.artefacts:
        return Checkpoint.open(run / record.artefacts["model"]).hash()
    return hashlib.sha256((run / next(iter(record.artefacts.values()))).read_bytes()).hexdigest()


def ledger(run: Path) -> list[Record]:
    """All records, from a copy of the ledger as it lies there; checked to be whole."""
    with tempfile.TemporaryDirectory() as folder:
        for file in run.glob("ledger.sqlite*"):
            shutil.copy(file, folder)
        if not (Path(folder) / "ledger.sqlite").exists():
            return []
        with closing(sqlite3.connect(Path(folder) / "ledger.sqlite")) as base:
            assert base.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            if not base.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchall():
                return []
            return [Record.from_dict(json.loads(b)) for (b,) in base.execute("SELECT body FROM records ORDER BY id")]


def check(run: Path) -> dict[str, Record]:
    """The steps that are done; every one the ledger calls done has its artefacts."""
    standing = done(run)
    for record in ledger(run):
        if record.status == "done":
            assert record.step in standing, f"{record.step} is done in the ledger only"
    return standing


def results(run: Path) -> dict[str, Any]:
    """What the steps gave, without times: equal for equal runs."""

    def timeless(history: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in json.loads(history)]

    found: dict[str, Any] = {}
    for step, record in done(run).items():
        found[step] = [record.hash, record.output, sorted(record.artefacts)]
        for path in sorted((run / "steps" / step).rglob("*")):
            if path.name == "history.json":
                found[str(path.relative_to(run))] = timeless(path.read_text())
            elif path.is_file() and path.name != "record.json":
                found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
