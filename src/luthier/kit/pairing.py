"""Which data belong to which expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.errors import LuthierError


def one_for_each(data: Sequence[Any], experts: int, where: str) -> list[Any]:
    """A source for each expert: those given, in order, or the one for all. LuthierError for any other number."""
    if len(data) not in (1, experts):
        what = f"{len(data)} sources of data for {experts} expert{'s' * (experts != 1)}"
        raise LuthierError(what, where=where, do="give one for each expert in order, or one for all")
    return list(data) if len(data) == experts else list(data) * experts
