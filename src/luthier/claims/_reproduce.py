"""Running claims, and the published table of their verdicts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.checkpoint.atomic import write_file
from luthier.claims import _judge
from luthier.claims._claim import Claim, claim, claims, file_of
from luthier.claims._seeds import Seeds, source, unseen_of
from luthier.errors import LuthierError

Event = Mapping[str, Any]
WORDS = ("holds", "fails", "inconclusive", "out of reach")
HEAD = """# Verdicts

What each paper claims of its method, tested here in the smallest honest experiment, against a control.
Written by `luthier reproduce`; the rules, fixed before any run, are in `luthier/claims/_judge.py`. The
interval is the 95 % interval of the mean paired difference, method minus control (turned round where
smaller is better, so that a gain is positive); effects were declared before the run. Claims that rest
on chance share a false-discovery rate of 5 %. Costs are means over the seeds.

The model of the claims about tune, eval, decode.sample and probe.depth is SmolLM2-135M-Instruct, its
weights dequantised from 4-bit Q4_1: small differences there are coarse.
"""


def reproduce(
    ids: Iterable[str] | None, folder: Path | str, seeds: Sequence[int] | None = None,
    watch: Callable[[Event], None] | None = None, budget: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the claims of these methods (None: all) and rewrite `verdicts.json` and `verdicts.md` in `folder`.

    seeds: unseen ones, other than those of the claims, which stand beside the verdict on a claim's own, and together
    with the unseen ones before them.  budget: seconds; what has no verdict or rests on changed code
    runs, shortest first, as far as the time goes.  watch: receives progress events; with a budget also
    "left", the ids that wait for the next call, and "kept", a claim whose few unseen seeds wait for more.
    Each seed is kept as soon as it is done, in `verdicts.partial.json`, so a call goes on where one was
    stopped. Verdicts of claims that do not run now are kept, and judged again with the new ones in view.
    Returns the records of the claims that ran. Raises LuthierError at the end if a claim's own code failed.
    """
    folder, wanted = Path(folder), [claim(id_) for id_ in (claims() if ids is None else ids)]
    _refuse_seen(wanted, seeds)
    records = {r["id"]: r for r in read(folder)}
    if budget is not None:
        due = [c for c in wanted if _is_due(c, records.get(c.id), seeds)]
        wanted = sorted(due, key=lambda c: _seed_minutes(c, records) * len(seeds or range(c.seeds)))
    until, say = math.inf if budget is None else time.monotonic() + budget, watch or (lambda event: None)
    broken, ran, left = [], set(), []
    for done, one in enumerate(wanted):
        work, expected = Seeds(one, folder, seeds, records.get(one.id), watch), 60 * _seed_minutes(one, records)
        if work.waiting() and time.monotonic() + expected > until:
            left.append(one.id)
            continue
        say({"kind": "progress", "step": one.id, "what": "claims", "done": done, "total": len(wanted)})
        try:
            made = work.run(until, expected)
        except Exception as fault:
            broken.append(f"{one.id} ({type(fault).__name__}: {' '.join(str(fault).split())})")
            continue
        if made is None:
            left.append(one.id)
            continue
        record = _own(records.get(one.id), made) if seeds is None else _beside(records.get(one.id), made)
        if record is None:
            say({"kind": "kept", "step": one.id, "seeds": made["seeds"]})
            continue
        ran.add(one.id)
        records[one.id] = record
        write(folder, records.values())
        work.done()
    if left:
        say({"kind": "left", "ids": left})
    if broken:
        raise LuthierError(f"{len(broken)} claims could not be run: {'; '.join(broken)}", do="mend them and try again")
    return [r for r in read(folder) if r["id"] in ran]


def _refuse_seen(wanted: Sequence[Claim], seeds: Sequence[int] | None) -> None:
    if seeds is None:
        return
    own = max((c.seeds for c in wanted), default=0)
    if wrong := sorted({n for n in seeds if n < own}):
        what = f"{', '.join(map(str, wrong))} {'is' if len(wrong) == 1 else 'are'} not unseen: 0 to {own - 1} are the"
        raise LuthierError(f"{what} claim's own", where="--seeds", do=f"give others, such as {own + 5} {own + 6}")
    if twice := sorted({n for n in seeds if list(seeds).count(n) > 1}):
        raise LuthierError(f"{', '.join(map(str, twice))} twice", where="--seeds", do="give every seed once")


def _is_due(one: Claim, record: Mapping[str, Any] | None, seeds: Sequence[int] | None) -> bool:
    """Whether the claim's own seeds, or these unseen ones, have not run on the code as it is."""
    if seeds is not None:
        return not {*seeds} <= {*unseen_of(record, source(one.id)).get("seeds", [])}
    return record is None or not record["seeds"] or is_stale(record)


def _seed_minutes(one: Claim, records: Mapping[str, Mapping[str, Any]]) -> float:
    """About how long one seed takes: as measured last, else as the claim says."""
    last = records.get(one.id, {})
    return last["minutes"] / len(last["seeds"]) if last.get("seeds") else one.minutes / one.seeds


def _own(old: Mapping[str, Any] | None, made: dict[str, Any]) -> dict[str, Any]:
    """The record of the claim's own seeds; what unseen ones said stays beside it, with its own source."""
    return {**made, **({"unseen": old["unseen"]} if old and "unseen" in old else {})}


def _beside(old: Mapping[str, Any] | None, made: dict[str, Any]) -> dict[str, Any] | None:
    """The record with what unseen seeds said, beside the verdict on the claim's own seeds or the lack of one.

    None if unseen seeds of an earlier source were more: the new ones wait until they are as many.
    """
    nothing = {"seeds": [], "contrasts": [], "also": [], "observations": {}, "cost": {}, "minutes": 0.0, "reason": ""}
    record = old or {**made, **nothing}
    if len(record.get("unseen", {}).get("observations", {})) > len(made["observations"]):
        return None
    names = ("seeds", "reason", "contrasts", "also", "observations", "cost", "minutes", "source", "versions", "date")
    return {**record, "unseen": {k: made[k] for k in names}}


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
            one["unseen"] |= {"verdict": other["verdict"], "short": other["short"]}
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
    asked = {"above": "at least", "below": "at least", "within": "within"}[r["relation"]]
    shown = r["reason"] or r.get("short", "")
    if r["contrasts"]:
        lacks = f"{shown}: " if shown else ""
        shown = f"{lacks}{_numbers(r)} {r['unit']} against {r['control']} ({asked} {r['effect']:g})"
    for a in r.get("also", []):
        shown += f"; not judged, {a['name']}: {a['mean']:+.3g} [{a['low']:+.3g}, {a['high']:+.3g}]"
    return shown + (_unseen(r, r["unseen"]) if "unseen" in r else "")


def _unseen(r: Mapping[str, Any], u: Mapping[str, Any]) -> str:
    lacks, old = u["reason"] or u.get("short", ""), " of an earlier source" if u["source"] != _now(r["id"]) else ""
    said = "; ".join(filter(None, (lacks, _numbers(u))))
    return f"; on unseen seeds{old} **{u['verdict']}**: {said}"


def _numbers(r: Mapping[str, Any]) -> str:
    several = len(r["contrasts"]) > 1
    parts = [
        (f"{c['control'].removeprefix('control').strip('/') or 'control'}: " if several else "")
        + f"{c['mean']:+.3g} [{c['low']:+.3g}, {c['high']:+.3g}]"
        for c in r["contrasts"]
    ]
    return "; ".join(parts)


def _spent(r: Mapping[str, Any]) -> str:
    count = len(r["seeds"])
    parts = [f"{value:,.0f} {name}" if value >= 100 else f"{value:.3g} {name}" for name, value in r["cost"].items()]
    if parts and count > 1:
        parts[0] = f"each {parts[0]}"
    changed = ["of an earlier source"] if is_stale(r) and count else []
    return ", ".join([f"{count} seed{'s' * (count != 1)}", *parts, r["date"], *changed])


def is_stale(r: Mapping[str, Any]) -> bool:
    """Whether the code that a verdict rests on has changed since, so that it should be rerun."""
    return _now(r["id"]) != r["source"]


def _now(id_: str) -> str:
    return source(id_) if file_of(id_).exists() else ""
