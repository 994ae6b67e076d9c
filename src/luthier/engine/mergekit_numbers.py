"""mergekit's parameters as schedules: numbers, gradients over the layers of a slice, filters by a part of the name.

A parameter is looked up in its scopes, nearest first: the model's or source's own, its slice's, the file's.
The first entry that speaks for a tensor has it; in our maps of globs it is the last. Outside the layers a
gradient has its first value; in a slice of one layer its last. What belongs to a model is asked for by the
tensor's name in that model, what belongs to the method by its name in the output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from luthier.errors import LuthierError, said
from luthier.kit.schedule import MOST

LAYERS = ("layers.", "h.")
"""What stands before a layer's number, in the families we know."""
INSIDE = (("layers.", ""), ("h.", "[0-9]"))
"""Whatever the number; a word may end in h."""
_NUMBERED = re.compile(r"\b(?:layers|h)\.\d")
BEFORE = ("embed", "wte", "wpe")
"""In the names of tensors before the layers."""
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SHARES = ("density", "gamma", "epsilon")
"""Parameters from 0 to 1."""
Path = tuple[Any, ...]
Row = tuple[str | None, Any]
"""A part of a name, None for every tensor, and a number or a gradient."""


class Marked(Protocol):
    """Plain values that remember their lines, as `recipe_text.read` gives them."""

    value: Any

    def where(self, *path: Any) -> str: ...

    def moved(self, value: Any, places: Mapping[Path, Path]) -> Any: ...


@dataclass(frozen=True)
class Site:
    """Where a parameter holds. scopes: where it may stand, nearest first.  first, count: the output's layers it is
    for, None for all of them, wherever they come from.  before, after: whether it also holds there.
    origin: the first of these layers in the model whose parameter it is.  named: the place to name where nothing is
    given, the nearest scope if empty."""

    scopes: tuple[Path, ...]
    first: int | None = None
    count: int = 0
    before: bool = True
    after: bool = True
    origin: int | None = None
    named: Path = ()


def setting(marked: Marked, sites: Sequence[Site], name: str, default: float | None) -> Any:
    """One parameter as a number or a schedule. LuthierError where it is not given for every tensor."""
    if not sites:
        return default
    if sites[0].first is None:
        return _plain(_whole(_rows(marked, sites[0], name, default)))
    rows = [_rows(marked, site, name, default) for site in sites]
    globs: dict[str, Any] = {"*": 0.0 if default is None else default}
    for site, own in zip(sites, rows, strict=True):
        if site.after:
            _put(globs, ((part, _first(value), ("",), ("",)) for part, value in own))
    for site, own in zip(sites, rows, strict=True):
        if site.before:
            _put(globs, ((part, _first(value), BEFORE, BEFORE) for part, value in own))
        for layer in range(site.count):
            here = (site.first or 0) + layer
            there = here if site.origin is None else site.origin + layer
            t = layer / (site.count - 1) if site.count > 1 else 1.0
            theirs, ours = ([f"{word}{number}." for word in LAYERS] for number in (there, here))
            _put(globs, ((part, _between(value, t), theirs, ours) for part, value in own))
    values = set(globs.values())
    return values.pop() if len(values) == 1 else globs


def _rows(marked: Marked, site: Site, name: str, default: float | None) -> list[Row]:
    """First match first; the last is for every tensor."""
    rows: list[Row] = []
    for scope in site.scopes:
        parameters = at(marked.value, scope) or {}
        if parameters.get(name) is None:
            continue
        rows += _listed(marked, (*scope, name), name, parameters[name])
        if rows[-1][0] is None:
            return rows
    if default is None:
        raise LuthierError(
            f"{name!r} is not given for every tensor", where=marked.where(*(site.named or site.scopes[0]))
        )
    return [*rows, (None, default)]


def _listed(marked: Marked, path: Path, name: str, value: Any) -> list[Row]:
    if not isinstance(value, (list, dict)) or (isinstance(value, list) and not any(isinstance(v, dict) for v in value)):
        return [(None, _numbers(marked, path, name, value))]
    rows: list[Row] = []
    for i, entry in enumerate(value if isinstance(value, list) else [value]):
        here = (*path, i) if isinstance(value, list) else path
        if not isinstance(entry, dict) or not set(entry) <= {"filter", "value"} or "value" not in entry:
            raise LuthierError("expected {filter: PART OF A NAME, value: NUMBER}", where=marked.where(*here))
        part = entry.get("filter")
        rows.append(
            (None if part in (None, "*") else str(part), _numbers(marked, (*here, "value"), name, entry["value"]))
        )
        if rows[-1][0] is None:
            break
    return rows


def flag(marked: Marked, sites: Sequence[Site], name: str, default: bool) -> bool:
    """A switch, which must be the same in all slices; 0 and 1 will do, and what PyYAML takes for true and false."""
    found: bool | None = None
    for site in sites:
        path = stands(marked, [site], name)
        value = default if path is None else at(marked.value, path)
        value = SWITCHES.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise LuthierError(f"expected true or false, got {said(value)}", where=marked.where(*(path or ())))
        if found is not None and found != bool(value):
            where = marked.where(*(path or site.scopes[0]))
            raise LuthierError(f"{name!r} is not the same in all slices", where=where, do="give one for the file")
        found = bool(value)
    return default if found is None else found


def stands(marked: Marked, sites: Sequence[Site], name: str) -> Path | None:
    """The place of the first that gives this parameter, None where none does."""
    scopes = (scope for site in sites for scope in site.scopes)
    return next(((*s, name) for s in scopes if (at(marked.value, s) or {}).get(name) is not None), None)


def _whole(rows: Sequence[Row]) -> dict[str, Any]:
    """For a whole model: gradients run over all of its layers, and have their first value outside them."""
    globs: dict[str, Any] = {}
    for part, value in reversed(rows):
        found = [(glob, _first(value)) for glob in both(part, "", "")]
        if isinstance(value, list):
            found += [(glob, value) for word, tail in INSIDE for glob in both(part, word, word, tail)]
        for glob, inner in found:
            globs.pop(glob, None)
            globs[glob] = inner
    return globs


def _put(globs: dict[str, Any], rows: Iterable[tuple[str | None, float, Sequence[str], Sequence[str]]]) -> None:
    """Rows (part, value, stems there, stems here) as the last of the globs, the first row as the very last."""
    for part, value, theirs, ours in reversed(list(rows)):
        for there, here in zip(theirs, ours, strict=True):
            for glob in both(part, there, here):
                globs.pop(glob, None)  # a key that is there already would keep its early place
                globs[glob] = value


def both(part: str | None, there: str, here: str, tail: str = "") -> Iterator[str]:
    """Globs that together match the names that hold the stem `here`, then `tail`, and with `there` in its place
    hold `part`: the part around the stem, inside it, over one of its ends, before it and after it."""
    stem = _escaped(here) + tail
    if part is None or part in there:
        yield f"*{stem}*" if stem else "*"
    elif not there:
        yield f"*{_escaped(part)}*"
    elif there in part:
        left, right = part.split(there, 1)
        if not tail or right[:1].isdigit() or not right:
            yield f"*{_escaped(left)}{_escaped(here) if right else stem}{_escaped(right)}*"
    else:
        for k in range(1, min(len(part), len(there))):
            if part.endswith(there[:k]):
                yield f"*{_escaped(part[:-k])}{stem}*"
            if part.startswith(there[-k:]) and (not tail or part[k].isdigit()):
                yield f"*{_escaped(here)}{_escaped(part[k:])}*"
        if not _NUMBERED.search(part):  # of two layers' numbers no name holds both
            yield f"*{_escaped(part)}*{stem}*"
            yield f"*{stem}*{_escaped(part)}*"
            if tail and part[0].isdigit():
                yield f"*{_escaped(here)}{_escaped(part)}*"


def _plain(globs: dict[str, Any]) -> Any:
    return globs["*"] if len(globs) == 1 else globs


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


def _numbers(marked: Marked, path: Path, name: str, value: Any) -> Any:
    """Numbers; a lone one may be written as a word, as PyYAML reads 5e-1."""
    try:
        plain = value if isinstance(value, list) else [float(value) if isinstance(value, str) else value]
    except ValueError:
        plain = []
    kinds = {type(v) for v in plain}
    if not kinds or not kinds <= {int, float} or any(math.isnan(v) for v in plain):
        what = f"expected a number or a list of numbers, got {said(value)}"
        raise LuthierError(what, where=marked.where(*path))
    if not all(abs(v) <= MOST for v in plain):
        raise LuthierError(f"{said(value)} is too large for fp32", where=marked.where(*path))
    if name in SHARES and not 0 <= min(plain) <= max(plain) <= 1:
        do = "use a number from 0 to 1"
        raise LuthierError(f"{name} {said(value)} is out of range", where=marked.where(*path), do=do)
    return [float(v) for v in plain] if isinstance(value, list) else float(plain[0])


def at(value: Any, path: Path) -> Any:
    """The value at a path, None where there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else value[key]
        if value is None:
            return None
    return value
