"""Running claims, and the published table of their verdicts."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier.catalogue import cards, code_hash, source_hash
from luthier.checkpoint.atomic import write_file
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

The model of the claims about tune, eval, decode.sample and probe.depth is SmolLM2-135M-Instruct, its
weights dequantised from 4-bit Q4_1: small differences there are coarse.
"""


def reproduce(
    ids: Iterable[str] | None, folder: Path | str, seeds: Sequence[int] | None = None,
    watch: Callable[[Event], None] | None = None, budget: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the claims of these methods (None: all) and rewrite `verdicts.json` and `verdicts.md` in `folder`.

    seeds: other seeds than those of the claim, such as unseen ones; a verdict on the claim's own seeds stays and
    the new one stands beside it.  budget: seconds; claims without a verdict or whose files have changed
    run, shortest first, as far as the time goes.  watch: receives progress events; with a budget also
    "left", the ids that wait for the next call.
    Each seed is kept as soon as it is done, in `verdicts.partial.json`, so a call goes on where one was
    stopped. Verdicts of claims that do not run now are kept, and judged again with the new ones in view.
    Returns the records of the claims that ran. Raises LuthierError at the end if a claim's own code failed.
    """
    folder, wanted = Path(folder), [claim(id_) for id_ in (claims() if ids is None else ids)]
    records = {r["id"]: r for r in read(folder)}
    if budget is not None:
        wanted = sorted((c for c in wanted if _is_due(c, records)), key=lambda c: _seed_minutes(c, records) * c.seeds)
    until = math.inf if budget is None else time.monotonic() + budget
    broken, ran, left = [], set(), []
    for done, one in enumerate(wanted):
        if watch:
            watch({"kind": "progress", "step": one.id, "what": "claims", "done": done, "total": len(wanted)})
        try:
            made = _Seeds(one, folder, seeds, watch).run(until, 60 * _seed_minutes(one, records))
        except Exception as fault:
            broken.append(f"{one.id} ({type(fault).__name__}: {' '.join(str(fault).split())})")
            continue
        if made is None:
            left.append(one.id)
            continue
        ran.add(one.id)
        records[one.id] = _beside(records.get(one.id), made, one)
        write(folder, records.values())
    if watch and left:
        watch({"kind": "left", "ids": left})
    if broken:
        raise LuthierError(f"{len(broken)} claims could not be run: {'; '.join(broken)}", do="mend them and try again")
    return [r for r in read(folder) if r["id"] in ran]


def _is_due(one: Claim, records: Mapping[str, Mapping[str, Any]]) -> bool:
    return one.id not in records or is_stale(records[one.id])


def _seed_minutes(one: Claim, records: Mapping[str, Mapping[str, Any]]) -> float:
    """About how long one seed takes: as measured last, else as the claim says."""
    last = records.get(one.id)
    return last["minutes"] / max(1, len(last["seeds"])) if last else one.minutes / one.seeds


def _beside(old: Mapping[str, Any] | None, made: dict[str, Any], one: Claim) -> dict[str, Any]:
    """The new record; one on other seeds stands beside a verdict on the claim's own seeds."""
    own = list(range(one.seeds))
    if old is None or old["seeds"] != own or made["seeds"] == own or old["source"] != made["source"]:
        return made
    return {**old, "unseen": {k: made[k] for k in ("seeds", "reason", "contrasts", "observations", "cost", "date")}}


class _Seeds:
    """One claim's seeds, each kept once it is done."""

    def __init__(self, one: Claim, folder: Path, seeds: Sequence[int] | None, watch: Callable[[Event], None] | None):
        self.one, self.watch, self.path = one, watch, folder / "verdicts.partial.json"
        self.numbers = list(range(one.seeds) if seeds is None else seeds)
        kept = self._all().get(one.id, {})
        same = kept.get("source") == source(one.id)
        self.seen: dict[int, Any] = {int(k): v for k, v in kept["seen"].items()} if same else {}
        self.seconds: float = kept["seconds"] if same else 0.0

    def run(self, until: float, expected: float) -> dict[str, Any] | None:
        """The record, not yet judged; None if the next seed would end after `until` (expected: its seconds)."""
        reason = ""
        with tempfile.TemporaryDirectory(prefix="luthier-claim-") as temp:
            ctx = Context(step=f"claim.{self.one.id}", cache=Path(temp), watch=self.watch)
            try:
                for seed in [n for n in self.numbers if n not in self.seen]:
                    began = time.monotonic()
                    if began + expected > until:
                        return None
                    self.seen[seed] = dict(self.one.run(seed, ctx.with_(seed=seed)))
                    expected = time.monotonic() - began
                    self.seconds += expected
                    self._keep({"source": source(self.one.id), "seen": self.seen, "seconds": self.seconds})
            except OutOfReach as far:
                reason = str(far) or "out of reach here"
        record = self._record(reason)
        self._keep(None)
        return record

    def _record(self, reason: str) -> dict[str, Any]:
        one, observations = self.one, {n: self.seen[n] for n in self.numbers if n in self.seen}
        found = [] if reason else _judge.contrasts(one, list(observations.values()))
        return {
            "id": one.id, "sentence": one.sentence, "control": one.control, "relation": one.relation,
            "effect": one.effect, "unit": one.unit, "seeds": self.numbers, "reason": reason, "contrasts": found,
            "observations": observations, "cost": _cost(observations.values()),
            "minutes": round(self.seconds / 60, 3), "source": source(one.id),
            "versions": {"python": platform.python_version(), **{n: version(n) for n in PACKAGES}},
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip

    def _all(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def _keep(self, entry: dict[str, Any] | None) -> None:
        every = {k: v for k, v in self._all().items() if k != self.one.id} | ({self.one.id: entry} if entry else {})
        if every:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, json.dumps(every))
        else:
            self.path.unlink(missing_ok=True)


def source(id_: str) -> str:
    """Hash of what a verdict rests on: the method's code and the claim's."""
    method = source_hash(id_) if id_ in cards() else ""
    return hashlib.sha256(f"{method} {code_hash(file_of(id_))}".encode()).hexdigest()[:16]


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
    records = sorted(records, key=lambda r: r["id"])
    judged = _judge.judge_table(records)
    again = _judge.judge_table([{**r, **r.get("unseen", {})} for r in records])
    for one, other in zip(judged, again, strict=True):
        if "unseen" in one:
            one["unseen"] = {**one["unseen"], "verdict": other["verdict"]}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "verdicts.json", json.dumps({"verdicts": judged}, indent=1, allow_nan=False) + "\n")
    write_file(folder / "verdicts.md", page(judged))


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
    shown = f"{_numbers(r)} {r['unit']} against {r['control']} ({asked} {r['effect']:g})"
    return shown + (f"; on unseen seeds **{r['unseen']['verdict']}**: {_numbers(r['unseen'])}" if "unseen" in r else "")


def _numbers(r: Mapping[str, Any]) -> str:
    several = len(r["contrasts"]) > 1
    parts = [
        (f"{c['control'].removeprefix('control').strip('/') or 'control'}: " if several else "")
        + f"{c['mean']:+.3g} [{c['low']:+.3g}, {c['high']:+.3g}]"
        for c in r["contrasts"]
    ]
    return "; ".join(parts)


def _spent(r: Mapping[str, Any]) -> str:
    parts = [f"{value:,.0f} {name}" for name, value in r["cost"].items()]
    changed = ["of an earlier source"] if is_stale(r) else []
    return ", ".join([f"{len(r['seeds'])} seed{'s' * (len(r['seeds']) > 1)}", *parts, r["date"], *changed])


def is_stale(r: Mapping[str, Any]) -> bool:
    """Whether the method's or the claim's file has changed since the verdict, so that it should be rerun."""
    return not file_of(r["id"]).exists() or source(r["id"]) != r["source"]
