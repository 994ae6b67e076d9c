"""`luthier list` and `luthier show`: the catalogue, printed without importing a single method."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

from luthier import catalogue
from luthier.catalogue import SHAPES, Card, cards
from luthier.errors import LuthierError, nearest, unknown


def options_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", help="show methods whose id, summary or paper holds all these words")
    parser.add_argument("--stage", help="such as merge or tune")
    parser.add_argument("--shape", help="such as Transform or Tune")
    parser.add_argument("--json", action="store_true", help="whole cards as JSON")


def do_list(args: argparse.Namespace) -> None:
    found = [c for c in cards().values() if _fits(c, args)]
    if not found:
        raise _nothing(args)
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


def _nothing(args: argparse.Namespace) -> LuthierError:
    """What was asked for, and the word that comes nearest."""
    asked = [f"{' '.join(args.words)!r}"] if args.words else []
    asked += [f"--{name} {value}" for name in ("stage", "shape") if (value := getattr(args, name))]
    known = {*cards(), *(part for id_ in cards() for part in id_.split("."))}
    near = next((n for word in args.words if (n := nearest(word.lower(), known)) and n != word.lower()), None)
    return LuthierError(
        f"no method matches {' '.join(asked)}", do=f"did you mean {near!r}?" if near else "luthier list shows all"
    )


def options_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="a method's id, such as merge.ties; luthier list shows them")
    parser.add_argument("--json", action="store_true", help="the card as JSON")


def do_show(args: argparse.Namespace) -> None:
    if args.id not in catalogue.cards() and args.id in _recipes():
        what = f"{args.id} is a recipe, no method"
        raise LuthierError(what, do=f"luthier plan {args.id}, or read {_recipes()[args.id]}")
    card = catalogue.card(args.id)
    if args.json:
        print(json.dumps(card.as_dict(), indent=1))
        return
    print("\n".join(_page(card)))


def _recipes() -> dict[str, Path]:
    from luthier.recipe import shipped

    return shipped()


def _page(card: Card) -> list[str]:
    lines = [f"{card.id}  ({card.shape})", "", *_wrapped(card.summary)]
    about = card.doc.split("\n\n", 1)[1] if "\n\n" in card.doc else ""
    lines += ["", *(line for block in about.split("\n\n") for line in (*_wrapped(block), ""))]
    lines += ["Fields" if card.fields else "No fields."]
    for f in card.fields:
        lines.append(f"  {f.name}: {f.kind}" + (f" = {f.default}" if f.default is not None else "  (required)"))
        lines += [f"      {line}" for line in textwrap.wrap(f.doc, _width() - 6)]
    lines += ["", f"Takes      {', '.join(_role(r) for r in card.takes)}"] if card.takes else []
    lines += [f"Fills      {', '.join(card.slots)}"] if card.slots else []
    lines += [f"Reduces to {card.reduces_to}"] if card.reduces_to else []
    lines += [f"Verdict    {verdict}" for verdict in _verdict(card.id)]
    if card.departures:
        lines += ["", "Where published code departs from the paper"]
        for text in card.departures:
            lines += textwrap.wrap(text, _width(), initial_indent="  - ", subsequent_indent="    ")
    return [*lines, "", *_examples(card), "", f"Source     {card.path}"]


EXTRA = {"Tune": ", train: {steps: 100}", "Study": ", search: {items: 32}"}
"""what a step of this shape needs or is worth naming beside its method"""


def _examples(card: Card) -> list[str]:
    """How the method is written down: in a recipe, with one of its fields set, and in Python."""
    needed = {f.name: _example(card, f.kind) for f in card.fields if f.default is None}
    given = {f.name: ast.literal_eval(f.default) for f in card.fields if f.default not in (None, "None")}
    shown = needed or dict(list(given.items())[:1])
    made = f"from {card.module} import {card.cls}; {card.cls}({', '.join(f'{n}={v!r}' for n, v in shown.items())})"
    inner = f", set: {{{', '.join(f'{n}: {_yaml(v)}' for n, v in shown.items())}}}" if shown else ""
    use = f"use: {card.id}{inner}"
    data = "use: tune.full, model: ..., data: [...], train: {steps: 100}"
    if card.shape == "Part":
        slots = f"slots: {{{card.slots[0] if card.slots else 'SLOT'}: {{{use}}}}}"
        step = f"{data.replace('model: ...', f'model: {{new: {{{slots}}}, tokenizer: smollm2}}')}"
    elif card.shape in ("Objective", "Optim"):
        step = f"{data}, {card.shape.lower()}: {{{use}}}"
    elif card.shape == "Rule":
        return [f"Python     {made}"]
    else:
        keys = "".join(f", {r.rstrip('*?')}: {'[...]' if '*' in r else '...'}" for r in card.takes if "?" not in r)
        step = f"use: {card.id}{keys}{inner}{EXTRA.get(card.shape, '')}"
    return [f"Recipe     NAME: {{{step}}}", f"Python     {made}"]


def _example(card: Card, kind: str) -> Any:
    """The first of the examples that an annotation gives, read from the source as everything else here."""
    tree = ast.parse(Path(card.path).read_text(encoding="utf-8"))
    named = (n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == kind)
    calls = (n for alias in named for n in ast.walk(alias) if isinstance(n, ast.Call))
    given = next((n.args[0] for n in calls if ast.unparse(n.func) == "Examples"), None)
    return ast.literal_eval(given)[0] if given else "..."


def _yaml(value: Any) -> str:
    """A field's default as YAML would have it; only plain literals stand in a card."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_yaml, value))}]"
    plain = (
        isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_.]*", value) and value not in ("true", "false", "null")
    )
    return value if plain else json.dumps(value)


def _verdict(id_: str) -> list[str]:
    """The measured verdict on the method's claim, if the table of verdicts is at hand: in the checkout, or here."""
    for folder in (Path(__file__).parents[2] / "docs", Path("docs")):
        try:
            found = json.loads((folder / "verdicts.json").read_text(encoding="utf-8"))
            row = next(r for r in found["verdicts"] if r["id"] == id_)
            return [f"{row['verdict']}: {row['sentence']}"]
        except (OSError, ValueError, LookupError, TypeError, StopIteration):
            continue
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
