"""The fixed rules by which a claim's observations become a verdict.

With d = method - control of each seed (negated where the claim says `below`), its mean and its 95 %
interval by the paired t distribution, against the effect e that was declared before the run:

    above, below   holds if mean >= e and the interval lies above 0; fails if it lies below e
    within         holds if the interval lies inside [-e, e]; fails if it lies outside

and `inconclusive` otherwise. Against several controls a claim holds if it holds against each, and fails
if it fails against one. Fewer seeds than the claim declares give no verdict: it is inconclusive. Where
at least five seeds agree to the bit nothing is random, and the mean is the interval. Over the whole
table the Benjamini-Hochberg rule keeps the expected share of false ones among those that hold, and
that a random draw could have made hold, at 5 %: a claim it does not let pass is inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.claims._claim import Claim
from luthier.errors import LuthierError
from luthier.kit.stats import benjamini_hochberg, paired_t

RATE = 0.05
LEVEL = 0.95
LEAST = 5
"""seeds that must agree before their agreement is taken for more than chance"""


def contrasts(claim: Claim, observations: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """One dict a control: its name, mean difference, interval, and the p-value of the claim's opposite.

    p is one-sided: of a mean difference of at most 0, or (`within`) of one beyond the bounds. It is
    None where the seeds agree to the bit, so that there is nothing random to guard against (`too_few` sees to it
    that they are enough to say so).
    """
    names = [k for k in observations[0] if k.startswith("control")]
    if not names or any("method" not in o or any(n not in o for n in names) for o in observations):
        raise LuthierError('observations need "method" and "control" at every seed', where=f"claim {claim.id}")
    return [_contrast(claim, name, observations) for name in names]


def _contrast(claim: Claim, name: str, observations: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    sign = -1.0 if claim.relation == "below" else 1.0
    diffs = [sign * (float(o["method"]) - float(o[name])) for o in observations]
    if not all(map(math.isfinite, diffs)):
        raise LuthierError(f"{name} or method is not finite", where=f"claim {claim.id}")
    found = {"control": name, "mean": diffs[0], "low": diffs[0], "high": diffs[0], "p": None}
    if len(set(diffs)) > 1:
        interval = paired_t(diffs, LEVEL)
        found |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
        if claim.relation == "within":
            found["p"] = max(
                _above_zero([claim.effect + d for d in diffs]), _above_zero([claim.effect - d for d in diffs])
            )
        else:
            found["p"] = _above_zero(diffs)
    return found


def also(observations: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """One dict an `also/` key: its name, mean and interval; none from a single seed."""
    names = [k for k in observations[0] if k.startswith("also/")] if len(observations) > 1 else []
    found = [(n.removeprefix("also/"), paired_t([float(o[n]) for o in observations], LEVEL)) for n in names]
    return [{"name": name, "mean": t.mean, "low": t.low, "high": t.high} for name, t in found]


def _above_zero(diffs: Sequence[float]) -> float:
    """One-sided p-value of a mean of at most 0."""
    interval = paired_t(diffs)
    return interval.p / 2 if interval.mean > 0 else 1 - interval.p / 2


def judge(relation: str, effect: float, found: Sequence[Mapping[str, Any]], adjusted: float | None = None) -> str:
    """holds, fails or inconclusive, for the contrasts of one claim.

    adjusted: its p-value after the correction over the table, None where nothing is random.
    """
    words = [_word(relation, effect, c) for c in found]
    if "fails" in words:
        return "fails"
    passes = adjusted is None or adjusted <= RATE
    return "holds" if passes and set(words) == {"holds"} else "inconclusive"


def _word(relation: str, effect: float, c: Mapping[str, Any]) -> str:
    if relation == "within":
        holds = -effect <= c["low"] and c["high"] <= effect
        fails = c["low"] > effect or c["high"] < -effect
    else:
        holds = c["mean"] >= effect and c["low"] > 0
        fails = c["high"] < effect
    return "holds" if holds else "fails" if fails else "inconclusive"


def too_few(r: Mapping[str, Any]) -> str:
    """Why the seeds of a record do not make a verdict; empty if they do."""
    seen, needed = len(r["seeds"]), r.get("needed", LEAST)
    if seen < needed:
        return f"{seen} of {needed} seeds"
    alike = seen < LEAST and any(c["p"] is None for c in r["contrasts"])
    return f"{seen} seeds agree, which may be chance: {LEAST} are needed" if alike else ""


def judge_table(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with their `verdict`, each judged with all others in view; `short` says what seeds are lacking."""
    short = {r["id"]: "" if r.get("reason") else too_few(r) for r in records}
    ps = {r["id"]: _largest(r["contrasts"]) for r in records if not (r.get("reason") or short[r["id"]])}
    noisy = [id_ for id_, p in ps.items() if p is not None]
    adjusted = dict(zip(noisy, benjamini_hochberg([ps[i] for i in noisy]), strict=True))  # type: ignore[misc]
    judged = []
    for r in records:
        p, lacks = adjusted.get(r["id"]), short[r["id"]]
        found = "inconclusive" if lacks else judge(r["relation"], r["effect"], r["contrasts"], p)
        word = "out of reach" if r.get("reason") else found
        judged.append({**r, "adjusted_p": p, "short": lacks, "verdict": word})
    return judged


def _largest(found: Sequence[Mapping[str, Any]]) -> float | None:
    return max((c["p"] for c in found if c["p"] is not None), default=None)
