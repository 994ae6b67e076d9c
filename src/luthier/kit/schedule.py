"""Numbers that vary over depth or by tensor name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import translate
from functools import lru_cache
from typing import Any

from luthier.errors import LuthierError
from luthier.fields import FrozenMap

MOST = 3e38
"""about the largest number of fp32, in which methods compute"""
KEPT = 256
"""Maps whose patterns are kept sorted."""
_STEM = re.compile(r"(?:layers|h)\.[0-9]+\.")
_kept: dict[int, tuple[Mapping[str, Any], _Globs]] = {}


class _Globs:
    """The patterns of a map. One that names a layer is asked about that layer's tensors alone, so that a map with
    patterns for every layer costs a name no more than one with a few."""

    def __init__(self, globs: Sequence[str]) -> None:
        self._every, self._by_stem = list(globs), dict[str, list[int]]()
        for place, glob in enumerate(globs):
            stem = None if "[" in glob else _STEM.search(glob)  # in brackets letters are a choice, and no word
            self._by_stem.setdefault(stem[0] if stem else "", []).append(place)

    def last(self, name: str) -> str | None:
        """The last pattern that matches."""
        places = (place for stem in {"", *_STEM.findall(name)} for place in self._by_stem.get(stem, ()))
        every = (self._every[place] for place in sorted(places, reverse=True))
        return next((glob for glob in every if _compiled(glob).match(name)), None)


@lru_cache(1 << 16)
def _compiled(glob: str) -> re.Pattern[str]:
    return re.compile(translate(glob))


def _globs(schedule: Mapping[str, Any]) -> _Globs:
    """Of a map that cannot change they are sorted once."""
    if not isinstance(schedule, FrozenMap):
        return _Globs(list(schedule))
    kept = _kept.get(id(schedule))
    if kept is None:
        if len(_kept) >= KEPT:
            _kept.clear()
        kept = _kept[id(schedule)] = schedule, _Globs(list(schedule))  # held, so that the number stays its own
    return kept[1]


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
        glob = _globs(schedule).last(name)
        if glob is None:
            raise LuthierError(f"no pattern matches {name!r}", do='add a pattern "*" as the first one')
        schedule = schedule[glob]
    if isinstance(schedule, Sequence):
        if depth is None:
            return float(schedule[0] if "embed" in name else schedule[-1])
        place = depth * (len(schedule) - 1)
        low = min(int(place), len(schedule) - 1)
        high = min(low + 1, len(schedule) - 1)
        return float(schedule[low] + (schedule[high] - schedule[low]) * (place - low))
    return float(schedule)
