"""The contract suite: checks that every method the catalogue finds has to pass, ours and other packages'.

`checks_for(card)` lists the checks of one method: those of `testing.card`, which all shapes share, the
reductions, and those of its shape, from `testing.<shape>` (such as `testing.transform`), which exports

    checks(card) -> list[Check]           what this shape promises
    outcome(method, given) -> dict        what the method does to a fixed tiny input: tensors, numbers, text
    PEERS: {name: f(method, given)}       outcomes by independent code, for `reduces_to`

A check fails by raising; nothing in a check depends on the order in which checks run.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from luthier import catalogue
from luthier.catalogue import Card

__all__ = [
    "KNOWN_FAILURES", "Check", "Outcome", "Report", "cases", "checks_for", "must", "run_check", "run_method",
    "shape_of",
]  # fmt: skip

KNOWN_FAILURES: dict[tuple[str, str], str] = {}
"""{(method id, check): reason}. The suite fails as soon as one of them starts to pass."""


@dataclass(frozen=True)
class Check:
    """One promise of a method. `run` raises when it is broken."""

    name: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Outcome:
    """What running one check gave. fault: empty when it passed."""

    check: str
    passed: bool
    seconds: float
    fault: str = ""


@dataclass(frozen=True)
class Report:
    """What `run_method` found: contract checks, golden vectors, and planted faults if asked for."""

    id: str
    outcomes: tuple[Outcome, ...]
    mutants: Any = None
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return all(o.passed for o in self.outcomes)


def must(holds: Any, says: str) -> None:
    """Raise AssertionError with this text unless `holds`; unlike `assert` it survives `python -O`."""
    if not holds:
        raise AssertionError(says)


def shape_of(entry: Card) -> ModuleType | None:
    """The module with the checks of this method's shape, None while nobody has written it."""
    name = f"luthier.testing.{entry.shape.lower()}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def checks_for(entry: Card) -> list[Check]:
    """Every check of one method. Listing them does not import the method."""
    from luthier.testing import card as for_all
    from luthier.testing.reduction import check_reduction

    own = shape_of(entry)
    listed = for_all.checks(entry)
    if own:
        listed += [Check("reduction", lambda: check_reduction(entry, own)), *own.checks(entry)]
    return listed


def run_check(id_: str, check: Check) -> None:
    """Run one check; where a failure is known, raise if it passes."""
    reason = KNOWN_FAILURES.get((id_, check.name))
    if reason is None:
        check.run()
        return
    try:
        check.run()
    except Exception:
        return
    raise AssertionError(f"{id_} now passes {check.name!r}: take it out of KNOWN_FAILURES ({reason})")


def run_method(id_: str, mutants: bool = False) -> Report:
    """The contract suite of one method, its golden vectors, and with `mutants` the planted faults.

    Golden vectors and mutants need a source checkout; without one the report's notes say so.
    """
    from luthier.testing import golden

    outcomes = [_outcome(id_, check) for check in checks_for(catalogue.card(id_))]
    notes = []
    vectors = golden.run(id_)
    if vectors is None:
        notes.append("no golden vectors here: they are part of the source checkout, not of the package")
    else:
        outcomes.append(vectors)
    found = None
    if mutants:
        from luthier.testing.mutants import hunt

        found = hunt(id_)
    return Report(id_, tuple(outcomes), found, tuple(notes))


def _outcome(id_: str, check: Check) -> Outcome:
    began = time.perf_counter()
    try:
        run_check(id_, check)
    except Exception as fault:
        text = traceback.format_exception_only(fault)[-1].strip()
        return Outcome(check.name, False, time.perf_counter() - began, " ".join(text.split()))
    return Outcome(check.name, True, time.perf_counter() - began)


def cases(shape: str) -> list[tuple[str, Check]]:
    """(id, check) for every method of one shape: what a parametrised test enrols."""
    ours = [(id_, entry) for id_, entry in catalogue.cards().items() if entry.shape == shape]
    return [(id_, check) for id_, entry in ours for check in checks_for(entry)]
