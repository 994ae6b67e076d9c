"""Attacks: short with the suite, at full length with LUTHIER_TORTURE=full, which is `make torture`.

An attack takes how often it strikes from `times(short, full)` and says what it did by `tell(line)`; the
lines are printed at the end of a full run.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

FULL = os.environ.get("LUTHIER_TORTURE") == "full"


@pytest.fixture(scope="session")
def times() -> Callable[[int, int], int]:
    """How often an attack strikes: in the suite, and at full length."""
    return lambda short, full: full if FULL else short


@pytest.fixture
def tell(record_property) -> Callable[[str], None]:
    """Say in one line what the attack did."""
    return lambda line: record_property("torture", line)


def pytest_terminal_summary(terminalreporter):
    told = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "torture" and getattr(report, "when", "") == "call"
    ]
    if FULL and told:
        terminalreporter.section("torture")
        for line in told:
            terminalreporter.write_line(line)
