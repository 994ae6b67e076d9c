"""The catalogue: cards read from source with `ast`, never by import, so that listing stays instant."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from luthier import shapes
from luthier.errors import LuthierError, unknown

HERE = Path(__file__).parent
NOT_STAGES = frozenset({"kit", "checkpoint", "model", "engine", "claims", "recipes", "testing"})
SHAPES = ("Part", "Objective", "Optim", "Rule", "Tune", "Transform", "Decode", "Measure", "Study", "Certify")


@dataclass(frozen=True)
class FieldCard:
    """One field of a method: annotation and default as written, and its docstring."""

    name: str
    kind: str
    default: str | None
    doc: str


@dataclass(frozen=True)
class Card:
    """What the catalogue knows of a method without importing it."""

    id: str
    shape: str
    cls: str
    module: str
    path: Path
    summary: str
    doc: str
    fields: tuple[FieldCard, ...]
    reduces_to: str | None
    departures: tuple[str, ...]
    roles: tuple[str, ...] | None
    slots: tuple[str, ...]
    experts_are: str = "models"

    @property
    def stage(self) -> str:
        return self.id.split(".", 1)[0]

    @property
    def paper(self) -> str | None:
        """The text after "Paper:" in the head of the file, up to the end of that sentence or paragraph."""
        after = re.search(r"^ *Paper: *(.*?)(?:\.(?=  |$)|$(?=\n\s*\n)|\Z)", self.doc, re.M | re.S)
        return " ".join(after[1].split()) if after else None

    @property
    def takes(self) -> tuple[str, ...]:
        """The roles: the method's own, else those of its shape."""
        return self.roles if self.roles is not None else getattr(shapes, self.shape).roles

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id, "shape": self.shape, "stage": self.stage, "summary": self.summary, "paper": self.paper,
            "class": f"{self.module}.{self.cls}", "roles": list(self.takes), "slots": list(self.slots),
            "experts_are": self.experts_are,
            "reduces_to": self.reduces_to,
            "departures": list(self.departures),
            "fields": [{"name": f.name, "type": f.kind, "default": f.default, "doc": f.doc} for f in self.fields],
        }  # fmt: skip


@cache
def cards() -> Mapping[str, Card]:
    """Every method there is, ours and those of other packages, by id."""
    found: dict[str, Card] = {}
    for folder in sorted(p for p in HERE.iterdir() if p.is_dir() and p.name not in NOT_STAGES):
        for path in sorted(folder.glob("[!_]*.py")):
            card = _own(folder.name, path.stem)
            if card:
                found[card.id] = card
    for id_, card in _from_other_packages():
        if id_ in found:
            raise LuthierError(
                f"the id {id_!r} of {card.module} is taken", where=str(card.path), do="rename the entry point"
            )
        found[id_] = card
    return found


@cache
def _own(stage: str, key: str) -> Card | None:
    """The card of one of our files."""
    return read(HERE / stage / f"{key}.py", f"{stage}.{key}", f"luthier.{stage}.{key}")


def _from_other_packages() -> list[tuple[str, Card]]:
    from importlib.metadata import entry_points

    found = []
    for point in entry_points(group="luthier.methods"):
        try:
            spec = importlib.util.find_spec(point.module)
            card = read(Path(spec.origin), point.name, point.module, point.attr) if spec and spec.origin else None
        except Exception as fault:  # the package is not ours: whatever it does wrong is one line
            why = f"{type(fault).__name__}: {fault}"
            what = f"the method {point.name!r} of another package cannot be read ({why})"
            raise LuthierError(what, where=point.value, do="mend that package or remove it") from None
        if card:
            found.append((point.name, card))
    return found


def read(path: Path, id_: str, module: str, cls: str | None = None) -> Card | None:
    """The card of the method in `path`, or None if the file holds none."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    doc = ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and (cls is None or node.name == cls):
            shape = next((_name(b) for b in node.bases if _name(b) in SHAPES), None)
            if shape:
                return _card(node, id_, shape, module, path, doc)
    return None


def _card(node: ast.ClassDef, id_: str, shape: str, module: str, path: Path, doc: str) -> Card:
    fields, plain = [], {}
    for here, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name):
            kind = ast.unparse(here.annotation)
            if kind.startswith("ClassVar"):
                continue
            says = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = " ".join(str(after.value.value).split()) if says else ""  # type: ignore[union-attr]
            fields.append(FieldCard(here.target.id, kind, ast.unparse(here.value) if here.value else None, text))
        elif isinstance(here, ast.Assign) and isinstance(here.targets[0], ast.Name):
            plain[here.targets[0].id] = here.value
    summary = " ".join(doc.split("\n\n", 1)[0].split())
    return Card(
        id=id_, shape=shape, cls=node.name, module=module, path=path, summary=summary, doc=doc, fields=tuple(fields),
        reduces_to=_reduction(plain.get("reduces_to")), departures=_strings(plain.get("departures")) or (),
        roles=_strings(plain.get("roles")), slots=_strings(plain.get("slots")) or (),
        experts_are=ast.literal_eval(plain.get("experts_are", ast.Constant("models"))),
    )  # fmt: skip


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _strings(node: ast.expr | None) -> tuple[str, ...] | None:
    return None if node is None else tuple(ast.literal_eval(node))


def _reduction(node: ast.expr | None) -> str | None:
    if node is None:
        return None
    return "; ".join(_one_reduction(c) for c in (node.elts if isinstance(node, ast.Tuple) else [node])) or None


def _one_reduction(call: ast.expr) -> str:
    if not isinstance(call, ast.Call):
        return ast.unparse(call)
    values = [ast.literal_eval(a) for a in call.args] + [None, None]
    named = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    fields, to = named.get("fields", values[0]) or {}, named.get("to", values[1])
    given, tolerance = named.get("given", {}), named.get("tolerance", 0)
    text = f"{to} at " + (", ".join(f"{k}={v}" for k, v in fields.items()) or "its defaults")
    text += "".join(f" given {k}={v}" for k, v in given.items())
    return text + (f" (to {tolerance:g})" if tolerance else " (exactly)")


def card(id_: str) -> Card:
    """The card of one method; the error for an unknown id names the nearest right one."""
    found = known(id_)
    if found is None:
        raise unknown("method", id_, cards())
    return found


def known(id_: str) -> Card | None:
    """The card of one method, None if there is none; of ours no other file is read."""
    stage, _, key = id_.partition(".")
    ours = re.fullmatch(r"[a-z]+\.[a-z0-9][a-z0-9_]*", id_) and stage not in NOT_STAGES
    if ours and (HERE / stage / f"{key}.py").is_file() and (found := _own(stage, key)):
        return found
    return cards().get(id_)


def find(id_: str) -> type:
    """The method's class, imported."""
    entry = card(id_)
    cls = getattr(importlib.import_module(entry.module), entry.cls)
    if not entry.module.startswith("luthier."):
        cls._id = entry.id
    return cls


def load(id_: str, **fields: Any) -> Any:
    """An instance of the method `id_` with these fields."""
    return find(id_)(**fields)


def source_hash(id_: str) -> str:
    """Hash of the method's code: part of every record and step hash."""
    return code_hash(card(id_).path)


def code_hash(path: Path) -> str:
    """Hash of what a Python file does: docstrings, lines of comment and empty lines do not count.

    Taken from the text rather than the tree, whose form differs between versions of Python.
    """
    seen = path.stat()
    return _code_hash(path, seen.st_mtime_ns, seen.st_size)


@cache
def _code_hash(path: Path, changed: int, size: int) -> str:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    docs = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr) and _is_text(n.value)}
    silent = {number for doc in docs for number in _lines(doc)}
    quoted = {number for n in ast.walk(tree) if _is_text(n) and n not in docs for number in _lines(n)}
    kept = (
        line.rstrip()
        for number, line in enumerate(text.splitlines(), 1)
        if number in quoted or (number not in silent and line.strip() and not line.lstrip().startswith("#"))
    )
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _lines(node: Any) -> range:
    return range(node.lineno, node.end_lineno + 1)
