"""Run folders that somebody else filled: their ledger, records, tables and histories."""

import json
import sqlite3
from pathlib import Path

from hostile import case, recipe

RECORD = {
    "run": "x", "step": "a", "base": "a", "hash": "0" * 16, "status": "done", "use": "eval.perplexity",
    "shape": "Measure", "seed": 0, "artefacts": {"table": "steps/a/table.json"},
}  # fmt: skip
TABLE = {"columns": ["model", "data", "metric", "value"], "rows": [["m", "d", "nll", 1.0]], "notes": []}


def run(change=None, table=None, ledger=None, body=None, verb="report"):
    """A run folder with one record, then a report of it."""

    def make(here: Path):
        place = here / "runs" / "x"
        (place / "steps" / "a").mkdir(parents=True)
        (place / "recipe.yaml").write_text("luthier: 1\n")
        (place / "steps" / "a" / "table.json").write_text(table if table is not None else json.dumps(TABLE))
        if ledger is not None:
            (place / "ledger.sqlite").write_bytes(ledger)
            return [verb, "x"]
        base = sqlite3.connect(place / "ledger.sqlite")
        base.execute("CREATE TABLE records (id INTEGER PRIMARY KEY, step TEXT, hash TEXT, status TEXT, use TEXT, "
                     "started TEXT, seconds REAL, body TEXT NOT NULL)")  # fmt: skip
        text = body if body is not None else json.dumps(RECORD | (change or {}))
        base.execute("INSERT INTO records (step, status, body) VALUES ('a', 'done', ?)", (text,))
        base.commit()
        base.close()
        return [verb, "x"]

    return make


case("run: whole and good", run())
case("run: a ledger of noise", run(ledger=bytes(range(256)) * 20), "ledger.sqlite")
case("run: an empty ledger", run(ledger=b""))
case("run: a ledger with other columns", run(ledger=b"SQLite format 3\0" + bytes(84)), "ledger.sqlite")
case("run: a record that is no JSON", run(body="{"), "ledger.sqlite", "record")
case("run: a record that is a list", run(body="[]"), "ledger.sqlite", "record")
case("run: a record 100,000 lists deep", run(body="[" * 100_000 + "]" * 100_000), "ledger.sqlite", "record")
case("run: a record without its step", run(body='{"run": "x"}'), "ledger.sqlite", "record")
case("run: artefacts a list", run({"artefacts": ["table"]}), "ledger.sqlite", "record")
for what, path in {"relative": "../../../secret", "absolute": "/etc/passwd", "NUL": "a\0b"}.items():
    case(
        f"run: a table by a path that is {what}", run({"artefacts": {"table": path}}), "ledger.sqlite", "makes no sense"
    )
for what, path in {
    "missing": "steps/a/no.json",
    "too long": "x" * 5000, "a folder": "steps",
}.items():  # fmt: skip
    case(f"run: a table by a path that is {what}", run({"artefacts": {"table": path}}), "table")
case(
    "run: a model outside",
    run({"artefacts": {"model": "../../../here"}, "config": {"base": "smollm2"}}),
    "makes no sense",
)
case("run: a history that is a table", run({"artefacts": {"history": "steps/a/table.json"}}), "history")
for what, table in {
    "cut": "{", "a list": "[]", "without rows": '{"columns": ["a"]}', "of rows that do not fit":
    '{"columns": ["a"], "rows": [[1, 2]], "notes": []}', "deep": "[" * 100_000 + "]" * 100_000,
}.items():  # fmt: skip
    case(f"run: a table that is {what}", run(table=table), "table.json")
case("run: names that are programs", run(table=json.dumps(TABLE | {
    "rows": [["<script>alert(1)</script>", "d", "nll", 1.0]], "notes": ["<img src=x onerror=alert(1)>"]})))  # fmt: skip
case("run: nowhere", lambda here: ["report", "../../../etc"], "unknown run")
case("run: a name of 5000 letters", lambda here: ["report", "x" * 5000], "unknown run")


def forged(here: Path):
    """A step's folder that claims to be done, with a path that leads out."""
    step = here / "runs" / "r" / "steps" / "a"
    step.mkdir(parents=True)
    (step / "record.json").write_text(json.dumps(RECORD | {"artefacts": {"certificate": "../../../../secret"}}))
    return recipe("luthier: 1\nsteps:\n  a: {use: sos.certify, problem: x^2}\n", "run")(here)


case("run: a record that claims to be done", forged, "exists and was not written by Luthier")
