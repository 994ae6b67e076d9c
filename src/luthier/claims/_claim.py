"""What a claim is, and where claims are found."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.errors import LuthierError, unknown

HERE = Path(__file__).parent


class OutOfReach(Exception):
    """Raised by a claim's `run`: the smallest honest experiment does not fit here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says of a method, and the smallest honest experiment about it."""

    id: str
    """the method's id"""
    sentence: str
    """the claim in one plain sentence, as tested here"""
    control: str
    """what the method is paired with, in words"""
    effect: float
    """the least difference that counts (`above`, `below`), or the greatest that is let pass (`within`)"""
    run: Callable[[int, Any], Mapping[str, float]]
    """(seed, ctx) -> the paired observations of that seed"""
    relation: Literal["above", "below", "within"] = "above"
    """the method's value lies above or below the control's by `effect`, or within `effect` of it"""
    unit: str = ""
    seeds: int = 5
    """how many paired seeds, from 0: fewer give no verdict, and fewer than 5 none where they agree to the bit"""
    minutes: float = 1.0
    """about how long all seeds take on two cores"""
    source: str = ""
    """where the paper says it: section or table"""

    def __post_init__(self) -> None:
        if self.effect < 0 or self.seeds < 1:
            raise LuthierError("a claim's effect is at least 0 and its seeds at least 1", where=self.id)


def claims() -> list[str]:
    """The ids of the methods whose claim is written."""
    return sorted(p.stem.replace("_", ".", 1) for p in HERE.glob("[!_]*.py"))


def claim(id_: str) -> Claim:
    """The claim of one method; the error for an unknown id names the nearest right one."""
    if id_ not in claims():
        raise unknown("claim", id_, claims())
    return importlib.import_module(f"luthier.claims.{id_.replace('.', '_', 1)}").CLAIM


def file_of(id_: str) -> Path:
    """`tune.lift` -> claims/tune_lift.py"""
    return HERE / f"{id_.replace('.', '_', 1)}.py"
