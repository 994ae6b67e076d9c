"""`luthier list` and `luthier show`: the catalogue, printed without importing a single method."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import catalogue, shapes
from luthier.catalogue import SHAPES, Card, cards
from luthier.errors import LuthierError, nearest, unknown


def options_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", help="show methods whose id, summary or paper holds all these words")
    parser.add_argument("--stage", help="such as merge or tune")
    parser.add_argument("--shape", help="such as Transform or Tune")
    parser.add_argument("--json", action="store_true", help="whole cards as JSON")


def do_list(args: argparse.Namespace) -> None:
    found = [c for c in cards().values() if _fits(c, args)]
    if not found and args.words:
        near = nearest(" ".join(args.words), cards())
        raise LuthierError(f"no method matches {' '.join(args.words)!r}", do=f"did you mean {near}?" if near else None)
    if args.json:
        print(json.dumps([c.as_dict() for c in found], indent=1))
        return
    wide, shape = max((len(c.id) for c in found), default=0), max((len(c.shape) for c in found), default=0)
    for c in found:
        head = f"{c.id:<{wide}}  {c.shape:<{shape}}  "
        print(head + textwrap.shorten(_after_name(c.summary), max(20, _width() - len(head)), placeholder=" ..."))


def _fits(card: Card, args: argparse.Namespace) -> bool:
    stages = {c.stage for c in cards().values()}
    if args.stage and args.stage not in stages:
        raise unknown("stage", args.stage, stages)
    shape = args.shape.capitalize() if args.shape else None
    if shape and shape not in SHAPES:
        raise unknown("shape", args.shape, SHAPES)
    text = f"{card.id} {card.summary} {card.paper} {card.shape}".lower()
    return (
        (not args.stage or card.stage == args.stage)
        and (not shape or card.shape == shape)
        and all(word.lower() in text for word in args.words)
    )


def options_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="a method's id, such as merge.ties; luthier list shows them")
    parser.add_argument("--json", action="store_true", help="the card as JSON")


def do_show(args: argparse.Namespace) -> None:
    card = catalogue.card(args.id)
    if args.json:
        print(json.dumps(card.as_dict(), indent=1))
        return
    print("\n".join(_page(card)))


def _page(card: Card) -> list[str]:
    lines = [f"{card.id}  ({card.shape})", "", *_wrapped(card.summary)]
    about = card.doc.split("\n\n", 1)[1] if "\n\n" in card.doc else ""
    lines += ["", *(line for block in about.split("\n\n") for line in (*_wrapped(block), ""))]
    lines += ["Fields" if card.fields else "No fields."]
    for f in card.fields:
        lines.append(f"  {f.name}: {f.kind}" + (f" = {f.default}" if f.default is not None else "  (required)"))
        lines += [f"      {line}" for line in textwrap.wrap(f.doc, _width() - 6)]
    roles = card.roles if card.roles is not None else getattr(shapes, card.shape).roles
    lines += ["", f"Takes      {', '.join(_role(r) for r in roles)}"] if roles else []
    lines += [f"Reduces to {card.reduces_to}"] if card.reduces_to else []
    lines += [f"Verdict    {verdict}" for verdict in _verdict(card.id)]
    if card.departures:
        lines += ["", "Where published code departs from the paper"]
        for text in card.departures:
            lines += textwrap.wrap(text, _width(), initial_indent="  - ", subsequent_indent="    ")
    return [*lines, "", *_examples(card, roles), "", f"Source     {card.path}"]


def _examples(card: Card, roles: tuple[str, ...]) -> list[str]:
    module, fields = f"from {card.module} import {card.cls}", {f.name: f.default for f in card.fields}
    first = next((f"{name}={default}" for name, default in fields.items() if default not in (None, "None")), "")
    if card.shape not in ("Tune", "Transform", "Measure", "Certify", "Decode"):
        return [f"Python     {module}; {card.cls}({first})"]
    keys = ", ".join(f"{r.rstrip('*?')}: {'[...]' if '*' in r else '...'}" for r in roles if "?" not in r)
    extra = ", train: {steps: 100}" if card.shape == "Tune" else ""
    inner = f", set: {{{first.replace('=', ': ')}}}" if first else ""
    return [f"Recipe     NAME: {{use: {card.id}, {keys}{inner}{extra}}}", f"Python     {module}; {card.cls}({first})"]


def _verdict(id_: str) -> list[str]:
    """The measured verdict on the method's claim, if the table of verdicts is at hand."""
    for path in (Path(__file__).parent / "claims" / "verdicts.json", Path("docs/verdicts.json")):
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        rows = found.get("verdicts", found) if isinstance(found, Mapping) else found
        row = rows.get(id_) if isinstance(rows, Mapping) else next((r for r in rows if r.get("id") == id_), None)
        if row:
            return [f"{row.get('verdict')}: {row.get('sentence', '')}"]
    return []


def _role(word: str) -> str:
    name = word.rstrip("*?")
    return name + (" (a list)" if "*" in word else "") + (" (optional)" if "?" in word else "")


def _after_name(summary: str) -> str:
    name, colon, rest = summary.partition(": ")
    return rest if colon and len(name) < 40 else summary


def _wrapped(text: str) -> list[str]:
    """Lines of a paragraph; what is set in by four or more starts a line of its own, as in a list, and what is
    set in further goes on with it."""
    made: list[str] = []
    blocks: list[tuple[int, list[str]]] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        item = 4 <= indent < 12
        if item or not blocks or (blocks[-1][0] and indent < 4):
            blocks.append((4 if item else 0, []))
        blocks[-1][1].append(line.strip())
    for indent, lines in blocks:
        pad, joined = " " * indent, " ".join(" ".join(lines).split())
        made += textwrap.wrap(joined, _width(), initial_indent=pad, subsequent_indent=pad + "  " if indent else "")
    return made


def _width() -> int:
    return min(shutil.get_terminal_size((110, 24)).columns, 120)
