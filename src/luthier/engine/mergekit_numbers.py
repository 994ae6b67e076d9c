"""mergekit's parameters as schedules: numbers, gradients over the layers of a slice, filters by a part of the name.

A parameter is looked up in its scopes, nearest first: the model's or source's own, its slice's, the file's.
The first entry that speaks for a tensor has it; in our maps of globs it is the last. Outside the layers a
gradient has its first value; in a slice of one layer its last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from luthier.errors import LuthierError

INSIDE = ("*layers.*", "*h.[0-9]*")
"""Globs of the tensors inside layers, in the families we know."""
Path = tuple[Any, ...]


class Marked(Protocol):
    """Plain values that remember their lines, as `recipe_text.read` gives them."""

    value: Any

    def where(self, *path: Any) -> str: ...


@dataclass(frozen=True)
class Site:
    """Where a parameter holds. scopes: where it may stand, nearest first.  first, count: the output's layers it is
    for, None for all of them, wherever they come from.  before, after: whether it also holds there."""

    scopes: tuple[Path, ...]
    first: int | None = None
    count: int = 0
    before: bool = True
    after: bool = True


def setting(marked: Marked, sites: Sequence[Site], name: str, default: float | None) -> Any:
    """One parameter as a number or a schedule. LuthierError where it is not given for every tensor."""
    if not sites:
        return default
    if sites[0].first is None:
        return _plain(_globs(_rows(marked, sites[0].scopes, name, default)))
    globs: dict[str, Any] = {"*": 0.0 if default is None else default}
    for site in sites:
        rows = _rows(marked, site.scopes, name, default)
        if site.after:
            globs = {k: v for k, v in globs.items() if k == "*"} | _outside(rows)
    for site in sites:
        rows = _rows(marked, site.scopes, name, default)
        if site.before:
            globs["*embed*"] = _first(
                next(v for part, v in rows if part is None or part in "model.embed_tokens.weight")
            )
        for layer in range(site.count):
            t = layer / (site.count - 1) if site.count > 1 else 1.0
            globs |= _in_layer(rows, (site.first or 0) + layer, t)
    values = {v for v in globs.values() if not isinstance(v, list)}
    return values.pop() if len(values) == 1 else globs


def _rows(
    marked: Marked, scopes: Sequence[Path], name: str, default: float | None
) -> list[tuple[str | None, Any]]:  # fmt: skip
    """(part of a name or None for every tensor, number or gradient), first match first; the last is for every one."""
    rows: list[tuple[str | None, Any]] = []
    for scope in scopes:
        parameters = at(marked.value, scope) or {}
        if parameters.get(name) is None:
            continue
        rows += _listed(marked, (*scope, name), parameters[name])
        if rows[-1][0] is None:
            return rows
    if default is None:
        raise LuthierError(f"{name!r} is not given for every tensor", where=marked.where(*scopes[0]))
    return [*rows, (None, default)]


def _listed(marked: Marked, path: Path, value: Any) -> list[tuple[str | None, Any]]:
    if not isinstance(value, (list, dict)) or (isinstance(value, list) and not any(isinstance(v, dict) for v in value)):
        return [(None, _numbers(marked, path, value))]
    rows: list[tuple[str | None, Any]] = []
    for i, entry in enumerate(value if isinstance(value, list) else [value]):
        here = (*path, i) if isinstance(value, list) else path
        if not isinstance(entry, dict) or not set(entry) <= {"filter", "value"} or "value" not in entry:
            raise LuthierError("expected {filter: PART OF A NAME, value: NUMBER}", where=marked.where(*here))
        part = entry.get("filter")
        rows.append((None if part in (None, "*") else str(part), _numbers(marked, (*here, "value"), entry["value"])))
        if rows[-1][0] is None:
            break
    return rows


def _globs(rows: Sequence[tuple[str | None, Any]]) -> dict[str, Any]:
    """For a whole model: gradients run over all of its layers."""
    globs: dict[str, Any] = {}
    for part, value in reversed(rows):
        glob = "*" if part is None else f"*{_escaped(part)}*"
        for key, inner in _by_place(glob, value).items():
            globs.pop(key, None)
            globs[key] = inner
    return globs


def _by_place(glob: str, value: Any) -> dict[str, Any]:
    """A gradient holds inside the layers; what lies outside takes its first value, before and after them."""
    if not isinstance(value, list) or "layers." in glob or ".h." in glob:
        return {glob: value}
    return {glob: value[0]} | {inside + glob.removeprefix("*"): value for inside in INSIDE}


def _plain(globs: dict[str, Any]) -> Any:
    return globs["*"] if len(globs) == 1 else globs


def _outside(rows: Sequence[tuple[str | None, Any]]) -> dict[str, Any]:
    globs: dict[str, Any] = {}
    for part, value in reversed(rows):
        glob = "*" if part is None else f"*{_escaped(part)}*"
        globs.pop(glob, None)
        globs[glob] = _first(value)
    return globs


def _in_layer(rows: Sequence[tuple[str | None, Any]], layer: int, t: float) -> dict[str, Any]:
    """Globs for one layer of the output, at the place t of its slice."""
    globs: dict[str, Any] = {}
    for part, value in reversed(rows):
        number = re.search(r"(?:layers|\bh)\.(\d+)\.", part or "")
        if number and int(number[1]) != layer:
            continue
        rest = "" if part is None or number else _escaped(part) + "*"
        for stem in (f"*layers.{layer}.*", f"*h.{layer}.*"):
            glob = f"*{_escaped(part)}*" if part and number else stem + rest
            globs.pop(glob, None)
            globs[glob] = _between(value, t)
    return globs


def _between(value: Any, t: float) -> float:
    if not isinstance(value, list):
        return value
    place = t * (len(value) - 1)
    low = int(place)
    high = min(low + 1, len(value) - 1)
    return value[low] + (value[high] - value[low]) * (place - low)


def _first(value: Any) -> float:
    return value[0] if isinstance(value, list) else value


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _numbers(marked: Marked, path: Path, value: Any) -> Any:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers):
        raise LuthierError(f"expected a number or a list of numbers, got {value!r}", where=marked.where(*path))
    return [float(v) for v in value] if isinstance(value, list) else float(value)


def at(value: Any, path: Path) -> Any:
    """The value at a path, None where there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else value[key]
        if value is None:
            return None
    return value
