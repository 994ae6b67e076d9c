"""Numbers that vary over depth or by tensor name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from luthier.errors import LuthierError

MOST = 3e38
"""about the largest number of fp32, in which methods compute"""


def at(schedule: Any, name: str, depth: float | None) -> float:
    """`value_at`, refused where fp32 cannot hold it."""
    value = value_at(schedule, name, depth)
    if abs(value) > MOST:
        raise LuthierError(f"{value:g} is too large for fp32", where=f"tensor {name!r}")
    return value


def value_at(schedule: Any, name: str, depth: float | None) -> float:
    """The schedule's value for the tensor `name` at `depth` in [0, 1] (None: outside the layers).

    A list is interpolated linearly over depth; tensors outside the layers take its first value
    before the layers (embeddings) and its last one after them, which is how `depth` None with a name
    is resolved: names that contain "embed" are before. In a map of globs the last match wins.
    """
    if type(schedule) is float:
        return schedule
    if isinstance(schedule, Mapping):
        hits = [value for glob, value in schedule.items() if fnmatchcase(name, glob)]
        if not hits:
            raise LuthierError(f"no pattern matches {name!r}", do='add a pattern "*" as the first one')
        schedule = hits[-1]
    if isinstance(schedule, Sequence):
        if depth is None:
            return float(schedule[0] if "embed" in name else schedule[-1])
        place = depth * (len(schedule) - 1)
        low = min(int(place), len(schedule) - 1)
        high = min(low + 1, len(schedule) - 1)
        return float(schedule[low] + (schedule[high] - schedule[low]) * (place - low))
    return float(schedule)
