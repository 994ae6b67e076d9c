"""The report of a run: one self-contained HTML file, fed from the ledger and the step folders only.

`summary` gathers what every view of a run shows (terminal, HTML, README), so that they cannot differ.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.certificate_export import claim_of
from luthier.checkpoint.atomic import write_file
from luthier.checkpoint.card import OURS, family_of, loading
from luthier.errors import LuthierError
from luthier.flows import Certificate, Table
from luthier.ledger import Ledger, Record

VERDICTS = ("shown", "not shown", "refuted")


@dataclass(frozen=True)
class Verdict:
    """A plain answer to a question of the recipe. word: shown, not shown or refuted."""

    question: str
    word: str
    why: str


@dataclass(frozen=True)
class Summary:
    """What a run showed. rows: one a model, {column: cell text}; measures: the raw rows of its tables."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]
    measures: tuple[Mapping[str, Any], ...]
    verdicts: tuple[Verdict, ...]
    records: tuple[Record, ...]
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    studies: Mapping[str, Table] = field(default_factory=dict)
    """the trials of every search, by step"""


def summary(folder: Path) -> Summary:
    """Gather a run folder. Raises LuthierError where there is no run."""
    if not (folder / "ledger.sqlite").exists():
        raise LuthierError("no run here", where=str(folder), do="name a folder under runs/, or run a recipe first")
    done = {r.step: r for r in Ledger(folder).records() if r.status == "done"}
    done = {step: r for step, r in done.items() if (folder / "steps" / step).is_dir()}  # --fresh takes them away
    records = tuple(done.values())
    found = {r.step: _table(folder, r) for r in records if "table" in r.artefacts}
    studies = {step: table for step, table in found.items() if done[step].shape == "Study"}
    tables = list(found.values())
    measures = tuple(row for step, table in found.items() if step not in studies for row in table.dicts())
    paired = [m for m in measures if "against" in m]
    columns, rows = _rows(paired or [m for m in measures if m.get("layer") is None], done)
    histories = {
        step: _history(folder, r) for step, r in done.items() if "history" in r.artefacts
    }  # fmt: skip
    verdicts = tuple(v for table in tables for v in map(_verdict, table.notes) if v)
    verdicts += tuple(_proof(folder, r) for r in records if "certificate" in r.artefacts)
    notes = tuple(dict.fromkeys(n for r in records for n in r.notes))
    notes += tuple(n for table in tables for n in table.notes if not _verdict(n))
    notes = tuple(dict.fromkeys(notes))
    return Summary(folder.name, columns, rows, measures, verdicts, records, histories, notes, studies)


def _table(folder: Path, record: Record) -> Table:
    try:
        return Table.from_json(_read(folder, record, "table"))
    except LuthierError as fault:
        raise fault.at(record.artefacts["table"]) from None


def _history(folder: Path, record: Record) -> list[dict[str, Any]]:
    try:
        made = json.loads(_read(folder, record, "history"))
    except (RecursionError, ValueError):
        made = None
    if not isinstance(made, list) or not all(isinstance(entry, dict) for entry in made):
        raise LuthierError("this is no history", where=record.artefacts["history"], do=f"do {record.step} again")
    return made


def _read(folder: Path, record: Record, what: str) -> str:
    try:
        return (folder / record.artefacts[what]).read_text(encoding="utf-8")
    except (OSError, ValueError) as fault:
        why = getattr(fault, "strerror", None) or "it is no text"
        raise LuthierError(f"the {what} of step {record.step!r} cannot be read ({why})", where=str(folder)) from None


def _proof(folder: Path, record: Record) -> Verdict:
    """Is it a sum of squares, or as large as claimed? Only a proof shows or refutes that."""
    made = Certificate.from_json(_read(folder, record, "certificate"))
    word = {"exact": "shown", "not_sos": "refuted"}.get(made.status, "not shown")
    claim = claim_of(made, 100)
    question = f"is {claim}?" if ">=" in claim else f"is {claim} a sum of squares?"
    return Verdict(f"{record.step}: {question}", word, made.reason)


def _verdict(note: str) -> Verdict | None:
    """A note of the form `question? -> word: why`, as `kit.verdict` writes it."""
    question, arrow, answer = note.partition(" -> ")
    word, colon, why = answer.partition(": ")
    return Verdict(question, word, why) if arrow and colon and word in VERDICTS else None


def _rows(
    measures: Sequence[Mapping[str, Any]], done: Mapping[str, Record]
) -> tuple[tuple[str, ...], tuple[dict[str, str], ...]]:
    models = list(dict.fromkeys(m["model"] for m in measures if "model" in m))
    kinds = list(dict.fromkeys((m["data"], m["metric"]) for m in measures if "metric" in m))
    rows = []
    for model in models:
        row = {"model": model}
        for data, metric in kinds:
            hit = next((m for m in measures if (m["model"], m["data"], m["metric"]) == (model, data, metric)), None)
            row[f"{data} {metric}"] = cell(hit) if hit else ""
        rows.append(row | cost(done.get(model)))
    columns = ("model", *(f"{d} {m}" for d, m in kinds), "cost")
    return columns, tuple(rows)


def cell(row: Mapping[str, Any]) -> str:
    """`mean`; where the row is paired `mean diff [low, high]`, and what healing brought back. Accuracies in percent."""
    percent = row["metric"] == "accuracy"
    scale, form = (100, "{:.1f}") if percent else (1, "{:.3f}")
    mean = form.format(scale * (row["mean"] if "mean" in row else row["value"])) + ("%" if percent else "")
    if row.get("diff") is None or row["model"] == row.get("against"):
        return mean
    diff, low, high = (
        ("+" if row[k] >= 0 else "−") + form.format(abs(scale * row[k])) for k in ("diff", "low", "high")
    )
    back = "" if row.get("recovered") is None else f"  recovered {100 * row['recovered']:.0f}%"
    return f"{mean}  {diff} [{low}, {high}]{back}"


def cost(record: Record | None) -> dict[str, str]:
    if record is None:
        return {"cost": "none"}
    parts = []
    if "steps" in record.metrics:
        parts.append(f"{record.metrics['steps']} steps")
    if "tokens" in record.metrics:
        parts.append(f"{record.metrics['tokens']:,} tokens".replace(",", " "))
    parts.append(f"{record.seconds:.0f} s" if record.seconds >= 1 else f"{record.seconds:.1f} s")
    return {"cost": ", ".join(parts)}


def verdicts(folder: Path) -> tuple[Verdict, ...]:
    """The answers to the run's questions, in the order of the recipe."""
    return summary(folder).verdicts


def markdown(folder: Path) -> str:
    """The table and the verdicts for a README."""
    s = summary(folder)
    lines = ["| " + " | ".join(s.columns) + " |", "|" + " --- |" * len(s.columns)]
    lines += ["| " + " | ".join(row.get(c, "") for c in s.columns) + " |" for row in s.rows]
    lines += ["", *(f"- {v.question} **{v.word}**: {v.why}" for v in s.verdicts)]
    return "\n".join(lines)


def build(folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path."""
    from jinja2 import Environment, PackageLoader

    from luthier import report_figures as draw
    from luthier.report_studies import sections

    s = summary(folder)
    paired = [m for m in s.measures if m.get("low") is not None and m.get("high") is not None]
    figures = []
    if s.histories:
        figures.append(
            (
                "Training",
                "Pale lines are trainings; the strong ones are smoothed, over repeats a mean.",
                draw.curves(s.histories),
            )
        )
        flops = {r.step: r.metrics["flops_per_token"] for r in s.records if "flops_per_token" in r.metrics}
        if any("@" in name for name in s.histories) and flops.keys() >= s.histories.keys():
            text = "The same losses against what they cost: means over the repeats, matrix products counted."
            figures.append(("Loss against cost", text, draw.costs(s.histories, flops)))
    if paired:
        text = "Paired differences to the reference on the same items, with intervals. Green is better, red worse."
        figures.append(("Differences", text, draw.differences(paired)))
    deep = [m for m in s.measures if m.get("layer") is not None]
    if deep:
        text = (
            "What was measured layer by layer, counted from 0; a ring is a value off the scale, at its end. Where"
            " layers were skipped, the change to the whole model, with its standard error."
        )
        figures.append(("By depth", text, draw.depth(deep)))
    kinds = [m for m in s.measures if m.get("class") not in (None, "all") and m["metric"] == "accuracy"]
    if kinds:
        text = "Right answers in percent, class by class. A class may have one true answer only: compare them together."
        figures.append(("By class", text, draw.classes(kinds)))
    moved = _changes(folder, s.records)
    if moved:
        text = "How far each matrix moved from the base, as a share of its norm, by layer and role; one scale for all."
        figures.append(("Where the changes lie", text, draw.layers(moved)))
    page = Environment(loader=PackageLoader("luthier", "."), autoescape=True).get_template("report.html.j2")
    text = page.render(
        s=s, paired=paired, figures=figures, searches=sections(s.studies), load=_load_lines(folder, s),
        recipe=(folder / "recipe.yaml").read_text(), plan=_json(folder / "plan.json"),
        minutes=sum(r.seconds for r in s.records) / 60,
        peak=max((r.metrics.get("peak_rss", 0) for r in s.records), default=0) / 2**30, escape=html.escape,
    )  # fmt: skip
    return write_file(folder / "report.html", text)


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _load_lines(folder: Path, s: Summary) -> tuple[str, str]:
    """What it takes to load the models, and the lines that load the last one."""
    paths = {r.step: folder / r.artefacts["model"] for r in s.records if "model" in r.artefacts}
    families = {step: family_of(path) for step, path in paths.items()}
    if not paths:
        return "", ""
    ours = [step for step, family in families.items() if family == OURS]
    note = "Every model here is a plain checkpoint; Luthier is not needed to use it."
    if ours:
        note = f"{', '.join(ours)}: of Luthier's own decoder, which transformers knows once luthier.model is imported."
    last = list(paths)[-1]
    return note, loading(families[last], str(paths[last]))


def _changes(folder: Path, records: Sequence[Record]) -> dict[str, dict[str, dict[int, float]]]:
    """Relative change by role and layer of each model made from a base; kept beside the step once computed. Where
    layers came or went, those of one number are no longer the same layer, and nothing is shown."""
    from luthier.checkpoint.reader import Checkpoint
    from luthier.checkpoint.resolve import resolve
    from luthier.engine.changes import by_layer, changes

    found = {}
    for record in records:
        name = record.config.get("base") or record.config.get("model")
        if "model" not in record.artefacts or not isinstance(name, str):
            continue
        here = folder / record.artefacts["model"]
        kept = here.parent / f"{here.name}.changes.json"
        if not kept.exists() or json.loads(kept.read_text())["hash"] != record.hash:
            step = next((r for r in records if r.base == name and "model" in r.artefacts), None)
            old = Checkpoint.open(folder / step.artefacts["model"]) if step else resolve(name)
            new = Checkpoint.open(here)
            rows = by_layer(changes(old, new)) if old.tensors.keys() == new.tensors.keys() else {}
            write_file(kept, json.dumps({"hash": record.hash, "layers": rows}))
        raw = json.loads(kept.read_text())["layers"]
        found[record.step] = {role: {int(k): v for k, v in layers.items()} for role, layers in raw.items()}
    return {k: v for k, v in found.items() if v}
