"""Running claims, and the published table of their verdicts."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier.catalogue import cards, source_hash
from luthier.claims import _judge
from luthier.claims._claim import Claim, OutOfReach, claim, claims, file_of
from luthier.errors import LuthierError
from luthier.kit.context import Context

Event = Mapping[str, Any]
PACKAGES = ("luthier", "torch", "transformers")
WORDS = ("holds", "fails", "inconclusive", "out of reach")
HEAD = """# Verdicts

What each paper claims of its method, tested here in the smallest honest experiment, against a control.
Written by `luthier reproduce`; the rules, fixed before any run, are in `luthier/claims/_judge.py`. The
interval is the 95 % interval of the mean paired difference, method minus control (turned round where
smaller is better, so that a gain is positive); effects were declared before the run. Claims that rest
on chance share a false-discovery rate of 5 %.
"""


def reproduce(
    ids: Iterable[str] | None, folder: Path | str, seeds: Sequence[int] | None = None,
    watch: Callable[[Event], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the claims of these methods (None: all) and rewrite `verdicts.json` and `verdicts.md` in `folder`.

    seeds: other seeds than those of the claim, such as unseen ones.  watch: receives progress events.
    Verdicts of claims that do not run now are kept, and judged again with the new ones in view. The
    files are rewritten after each claim, so an interrupted call loses no more than one. Returns the
    records of the claims that ran. Raises LuthierError at the end if a claim's own code failed.
    """
    folder, wanted = Path(folder), [claim(id_) for id_ in (claims() if ids is None else ids)]
    records = {r["id"]: r for r in read(folder)}
    broken = []
    for done, one in enumerate(wanted):
        if watch:
            watch({"kind": "progress", "step": one.id, "what": "claims", "done": done, "total": len(wanted)})
        try:
            records[one.id] = run(one, seeds, watch)
        except Exception as fault:
            broken.append(f"{one.id} ({type(fault).__name__}: {' '.join(str(fault).split())})")
            continue
        write(folder, records.values())
    if broken:
        raise LuthierError(f"{len(broken)} claims could not be run: {'; '.join(broken)}", do="mend them and try again")
    ran = {one.id for one in wanted}
    return [r for r in read(folder) if r["id"] in ran]


def run(one: Claim, seeds: Sequence[int] | None = None, watch: Callable[[Event], None] | None = None) -> dict[str, Any]:
    """The record of one claim's run, not yet judged."""
    numbers = list(range(one.seeds) if seeds is None else seeds)
    began, observations, reason = time.perf_counter(), {}, ""
    with tempfile.TemporaryDirectory(prefix="luthier-claim-") as temp:
        ctx = Context(step=f"claim.{one.id}", cache=Path(temp), watch=watch)
        try:
            for seed in numbers:
                observations[seed] = dict(one.run(seed, ctx.with_(seed=seed)))
        except OutOfReach as far:
            reason = str(far) or "out of reach here"
    found = [] if reason else _judge.contrasts(one, list(observations.values()))
    return {
        "id": one.id, "sentence": one.sentence, "control": one.control, "relation": one.relation,
        "effect": one.effect, "unit": one.unit, "seeds": numbers, "reason": reason, "contrasts": found,
        "observations": observations, "cost": _cost(observations.values()),
        "minutes": round((time.perf_counter() - began) / 60, 3), "source": source(one.id),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in PACKAGES}},
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def source(id_: str) -> str:
    """Hash of what a verdict rests on: the method's file and the claim's."""
    method = source_hash(id_) if id_ in cards() else ""
    return hashlib.sha256(method.encode() + file_of(id_).read_bytes()).hexdigest()[:16]


def _cost(observations: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum over the seeds of every `cost/` entry."""
    total: dict[str, float] = {}
    for seen in observations:
        for key, value in seen.items():
            if key.startswith("cost/"):
                total[key.removeprefix("cost/")] = total.get(key.removeprefix("cost/"), 0) + float(value)
    return total


def read(folder: Path) -> list[dict[str, Any]]:
    """The records in `folder`, none if there is no table yet."""
    path = Path(folder) / "verdicts.json"
    return json.loads(path.read_text(encoding="utf-8"))["verdicts"] if path.exists() else []


def write(folder: Path, records: Iterable[dict[str, Any]]) -> None:
    """Judge the records together and write both files, each whole or not at all."""
    judged = _judge.judge_table(sorted(records, key=lambda r: r["id"]))
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "verdicts.json", json.dumps({"verdicts": judged}, indent=1, allow_nan=False) + "\n")
    _replace(folder / "verdicts.md", page(judged))


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(f"{path.suffix}.part{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def page(judged: Sequence[Mapping[str, Any]]) -> str:
    """The table of verdicts in Markdown."""
    tally = ", ".join(f"{sum(r['verdict'] == w for r in judged)} {w}" for w in WORDS)
    lines = [
        HEAD,
        f"{len(judged)} claims: {tally}.",
        "",
        "| method | claim | verdict | difference | cost |",
        "|---|---|---|---|---|",
    ]
    for r in judged:
        cells = (f"`{r['id']}`", r["sentence"], f"**{r['verdict']}**", _evidence(r), _spent(r))
        lines.append("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _evidence(r: Mapping[str, Any]) -> str:
    if r["reason"]:
        return r["reason"]
    asked = {"above": "at least", "below": "at least", "within": "within"}[r["relation"]]
    several = len(r["contrasts"]) > 1
    parts = [
        (f"{c['control'].removeprefix('control').strip('/') or 'control'}: " if several else "")
        + f"{c['mean']:+.3g} [{c['low']:+.3g}, {c['high']:+.3g}]"
        for c in r["contrasts"]
    ]
    return f"{'; '.join(parts)} {r['unit']} against {r['control']} ({asked} {r['effect']:g})"


def _spent(r: Mapping[str, Any]) -> str:
    parts = [f"{value:,.0f} {name}" for name, value in r["cost"].items()]
    changed = ["of an earlier source"] if is_stale(r) else []
    return ", ".join([f"{len(r['seeds'])} seed{'s' * (len(r['seeds']) > 1)}", *parts, r["date"], *changed])


def is_stale(r: Mapping[str, Any]) -> bool:
    """Whether the method's or the claim's file has changed since the verdict, so that it should be rerun."""
    return not file_of(r["id"]).exists() or source(r["id"]) != r["source"]
