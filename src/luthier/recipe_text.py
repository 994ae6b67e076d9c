"""YAML 1.2 text to plain values that remember their lines, so that every later error can name one.

Notable: nothing is ever constructed but maps, lists, numbers, words, true/false and null. Anchors work,
but what they expand to is counted, so that a small file cannot grow into a large one.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError, said

MAX_BYTES, MAX_NODES, MAX_DEPTH = 1 << 20, 20_000, 40
MAX_MARKS = 3 * MAX_NODES
"""commas, colons, brackets, anchors and line ends: what the time of reading grows with"""
Key = tuple[Any, ...]


@dataclass
class Marked:
    """Plain values and where they came from.

    lines: the line of each key path, such as ("steps", "math", "set"), from 1; or a label, for values
    from the command line.  name: the file as the user named it.
    """

    value: Any
    name: str = "recipe"
    lines: dict[Key, int | str] = field(default_factory=dict)
    dotted: bool = True
    """whether the path is worth naming where there is no line"""

    def where(self, *path: Any) -> str:
        """`file:line` of the path or of its nearest marked parent; the dotted path where there is no file."""
        line = self._line(path)
        if line is not None:
            return line if isinstance(line, str) else f"{self.name}:{line}"
        return ".".join([self.name, *map(str, path)]) if self.dotted else self.name

    def moved(self, value: Any, places: Mapping[Key, Key]) -> Marked:
        """Other values that were made of these: `places` says of a path where here it comes from."""
        found = {path: self._line(there) for path, there in {(): (), **places}.items()}
        return Marked(value, self.name, {k: v for k, v in found.items() if v is not None}, self.dotted)

    def _line(self, path: Key) -> int | str | None:
        """Of the path or of its nearest marked parent."""
        marked = (self.lines.get(path[:end]) for end in range(len(path), -1, -1))
        return next((line for line in marked if line is not None), None)


def read(path: Path) -> Marked:
    """The values of a YAML (or JSON) file. LuthierError if it cannot be read, with the line."""
    try:
        raw = path.read_bytes()
    except OSError as fault:
        raise LuthierError(f"cannot be read ({fault.strerror})", where=str(path)) from None
    if len(raw) > MAX_BYTES:
        raise LuthierError(f"larger than {MAX_BYTES} bytes", where=str(path), do="a recipe is a small file")
    try:
        return parse(raw.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as fault:
        raise LuthierError("is no UTF-8 text", where=f"{path}: byte {fault.start}") from None


def parse(text: str, name: str = "recipe") -> Marked:
    """The values of YAML text; `name` stands for the file in errors."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if text.lstrip().startswith("%"):
        raise LuthierError("YAML directives are refused", where=f"{name}:1", do="a recipe is plain YAML 1.2")
    if sum(map(text.count, ",:[{\n&*")) > MAX_MARKS:
        raise LuthierError(f"more than {MAX_MARKS} keys, values and lines", where=name, do="a recipe is a small file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor may be set anew
            node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = f"{name}:{mark.line + 1}" if mark else name
        raise LuthierError(f"not YAML: {fault.problem or fault.context}", where=line) from None
    except (YAMLError, ValueError) as fault:
        raise LuthierError(f"not YAML: {' '.join(str(fault).split())}", where=name) from None
    except RecursionError:
        raise LuthierError(f"nested deeper than {MAX_DEPTH}", where=name) from None
    marked = Marked(None, name, {(): 1} if node is None else {})
    if node is not None:
        marked.value = _Builder(marked).build(node, (), 0)
    return marked


def mark(value: Any, name: str = "recipe", dotted: bool = True) -> Marked:
    """Values that come from Python, copied; errors name the dotted path."""

    def copy(v: Any) -> Any:
        if isinstance(v, Mapping):
            return {k: copy(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [copy(x) for x in v]
        return v.to_dict() if hasattr(v, "to_dict") else str(v) if isinstance(v, Path) else v

    return Marked(copy(value), name, dotted=dotted)


class _Builder:
    """From ruamel's node graph to values, under a budget."""

    def __init__(self, marked: Marked):
        self.marked, self.left = marked, MAX_NODES

    def build(self, node: Any, path: Key, depth: int) -> Any:
        line = node.start_mark.line + 1
        self.marked.lines.setdefault(path, line)
        where = f"{self.marked.name}:{line}"
        self.left -= 1
        if self.left < 0:
            raise LuthierError(f"expands to more than {MAX_NODES} values", where=where, do="use fewer aliases")
        if depth > MAX_DEPTH:
            raise LuthierError(f"nested deeper than {MAX_DEPTH}", where=where)
        kind = type(node).__name__
        if kind == "MappingNode":
            return self._map(node, path, depth, where)
        if kind == "SequenceNode":
            _plain_tag(node, "seq", where)
            return [self.build(child, (*path, i), depth + 1) for i, child in enumerate(node.value)]
        return _scalar(str(node.tag), node.value, where)

    def _map(self, node: Any, path: Key, depth: int, where: str) -> dict:
        _plain_tag(node, "map", where)
        made: dict[Any, Any] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            here = f"{self.marked.name}:{line}"
            if type(key_node).__name__ != "ScalarNode":
                raise LuthierError("a key must be a word or a number", where=here)
            if str(key_node.tag).endswith(":merge"):
                raise LuthierError("merge keys (<<) are not part of YAML 1.2", where=here, do="write the keys out")
            key = _scalar(str(key_node.tag), key_node.value, here)
            if key in made:
                raise LuthierError(f"key {key!r} stands twice", where=here, do="remove one of the two")
            self.marked.lines[(*path, key)] = line
            made[key] = self.build(child, (*path, key), depth + 1)
        return made


def _plain_tag(node: Any, kind: str, where: str) -> None:
    if not str(node.tag).endswith(f"yaml.org,2002:{kind}"):
        raise LuthierError(f"tag {node.tag} is refused", where=where, do="a recipe holds plain values only")


def _scalar(tag: str, text: str, where: str) -> Any:
    kind = tag.removeprefix("tag:yaml.org,2002:")
    if kind in ("str", "timestamp", "merge"):
        return text
    if kind == "null":
        return None
    plain = text.replace("_", "")
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            return _whole(plain, where)
        if kind == "float":
            return _number(plain, where)
    except (KeyError, ValueError):  # a tag may say so of any text
        raise LuthierError(f"{said(text)} is no {kind}", where=where, do=f"drop the tag !!{kind}") from None
    raise LuthierError(f"tag {tag} is refused", where=where, do="a recipe holds plain values only")


def _whole(text: str, where: str) -> int:
    if len(text) > 40:
        raise LuthierError("a whole number of more than 40 digits", where=where)
    based = re.fullmatch(r"([-+]?)0([xob])(.+)", text)
    if based:
        return int(based[1] + based[3], {"x": 16, "o": 8, "b": 2}[based[2]])
    return int(text, 10)  # YAML 1.2: 010 is ten


def _number(text: str, where: str) -> float:
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(value):
        raise LuthierError(f"{text} is no finite number", where=where, do="write null where a field may mean never")
    return value
