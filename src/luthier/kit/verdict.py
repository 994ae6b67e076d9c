"""Plain verdicts by a fixed rule, from paired differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LOWER_IS_BETTER = frozenset({"nll"})


def judge(contrasts: Sequence[Mapping[str, Any]]) -> str:
    """shown, refuted or not shown, from paired differences (first model minus second).

    contrasts: dicts with metric, low, high.  shown: every interval lies wholly on the good side of
    zero.  refuted: at least one lies wholly on the bad side.
    """
    sides = [_side(c) for c in contrasts]
    if sides and all(side > 0 for side in sides):
        return "shown"
    return "refuted" if any(side < 0 for side in sides) else "not shown"


def _side(contrast: Mapping[str, Any]) -> int:
    sign = -1 if contrast["metric"] in LOWER_IS_BETTER else 1
    low, high = sorted((sign * contrast["low"], sign * contrast["high"]))
    return 1 if low > 0 else -1 if high < 0 else 0


def words(contrasts: Sequence[Mapping[str, Any]]) -> str:
    """The evidence in one line: `sums accuracy +4.2 points [1.0, 7.3]; sums nll −0.120 [−0.150, −0.090]`."""
    return "; ".join(f"{c['data']} {c['metric']} {_number(c)}" for c in contrasts)


def _number(contrast: Mapping[str, Any]) -> str:
    points = contrast["metric"] == "accuracy"
    scale, form = (100, "{:+.1f}") if points else (1, "{:+.3f}")
    diff, low, high = (form.format(scale * contrast[k]).replace("-", "−") for k in ("diff", "low", "high"))
    return f"{diff}{' points' if points else ''} [{low}, {high}]"


def note(question: str, contrasts: Sequence[Mapping[str, Any]]) -> str:
    """`question -> word: evidence`, the form in which verdicts travel in the notes of a Table."""
    return f"{question} -> {judge(contrasts)}: {words(contrasts)}"
