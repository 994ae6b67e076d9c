"""Procedural tasks of reasoning-gym: repeatable items, answers taken out of a model's talk, the family's own score.

A family's strict scorer gives about nothing to a sentence that holds the right answer, so the answer is
extracted first: by the form of the true one, or as the table KINDS says. What reaches a scorer that
evaluates text (several hand it to Python or SymPy) holds only the characters its form allows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from types import ModuleType
from typing import Any

from luthier.errors import LuthierError, unknown
from luthier.flows import Item

UNSTABLE = frozenset(
    {"isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note"}
)
"""Families whose items depend on Python's hash seed or its global random state: no run could be repeated."""

SLOW = frozenset({
    "arc_agi", "boxnet", "countdown", "figlet_font", "futoshiki", "group_anagrams", "intermediate_integration",
    "puzzle24", "quantum_lock", "rearc", "sokoban", "sudoku", "word_ladder", "zebra_puzzles",
})  # fmt: skip
"""Families that take some 10 ms an item or much more."""

KINDS = {
    "countdown": "expression", "puzzle24": "expression",
    "simple_integration": "formula", "intermediate_integration": "formula",
    "string_insertion": "letters", "spiral_matrix": "cells", "binary_matrix": "cells", "n_queens": "cells",
    "base_conversion": "line", "path_star": "line", "string_splitting": "line", "string_synthesis": "line",
    "arc_1d": "line", "bitwise_arithmetic": "hex", "time_intervals": "clock",
}  # fmt: skip
"""How the answer is taken out, where the form of the true answer does not tell."""

CHOICES = (("yes", "no"), ("true", "false"), ("on", "off", "undetermined"), ("chi", "peng", "pass"))

_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
_CUE = re.compile(r"(?:answer|result|output|solution)\s*(?:is|:|=)+\s*:?\s*|\\boxed\{", re.IGNORECASE)
_EXPRESSION = re.compile(r"[\d(][\d\s+\-*/().]*[\d)]")
_FORMULA = re.compile(r"(?:\d+(?:\.\d+)?|sin|cos|tan|exp|log|sqrt|pi|[A-Za-z](?![A-Za-z])|[+\-*/() ])+")
_POWER = re.compile(r"\*\*(?:\d{1,2}(?!\d)|[A-Za-z]|\(-?\d{1,2}(?:/\d{1,2})?\)|\((?=[^()]*[A-Za-z])[^()]*\))(?!\*\*)")
"""Powers that stay small or symbolic: a scorer that computes 9**9**9 would never return."""


def families() -> list[str]:
    """The families that can be used, by name."""
    return sorted(set(_factory().DATASETS) - UNSTABLE - {"composite"})


def generator(family: str, seed: int, size: int, settings: dict[str, Any]) -> Any:
    """The family's dataset. settings: its own generator's arguments, such as {"max_terms": 3}."""
    known = _factory().DATASETS
    if family in UNSTABLE:
        raise LuthierError(
            f"gym:{family} makes other items in each process, so a run could not be repeated",
            do="write its items to a file once and use jsonl:PATH",
        )
    if family not in known or family == "composite":
        raise unknown("task family", family, families())
    names = {f.name for f in dataclasses.fields(known[family][1])} - {"seed", "size"}
    for word in settings:
        if word not in names:
            raise unknown(f"setting of gym:{family}", word, names)
    try:
        return _factory().create_dataset(family, seed=seed, size=size, **settings)
    except (AssertionError, TypeError, ValueError) as fault:
        raise LuthierError(f"gym:{family} refuses these settings: {fault}") from None


def items(dataset: Any, family: str) -> Iterator[Item]:
    """The dataset's items in order, repeats included. An item's id is a hash of its question."""
    for index in range(dataset.size):
        entry = dataset[index]
        answer = None if entry["answer"] is None else str(entry["answer"])
        digest = hashlib.sha256(entry["question"].encode()).hexdigest()[:16]
        yield Item(id=digest, prompt=entry["question"], answer=answer, meta={"family": family, "index": index})


def score(dataset: Any, item: Item, output: str) -> float:
    """The family's score of the answer found in `output`, in [0, 1]; 0 where none is found."""
    entry = dataset[item.meta["index"]]  # made anew: entries are large, and tests are few
    found = extract(output, entry["answer"], item.meta["family"])
    if not found:
        return 0.0
    try:
        return min(1.0, max(0.0, float(dataset.score_answer(found, entry))))
    except Exception:  # several scorers parse what the model said and raise whatever their parser does
        return 0.0


def extract(output: str, answer: Any = None, family: str = "") -> str | None:
    """The answer in a model's output, in the form of the true one; None where there is none of that form.

    A number is the last one, on the line of "answer is" or of a box if such a cue stands; a choice (yes
    or no, true or false) the first word of its kind; an expression ends before its "="; a grid is all
    of the output without code fences; anything else is the last line that is not blank.
    """
    text = "\n".join(line for line in output.strip().splitlines() if not line.strip().startswith("```"))
    cues = list(_CUE.finditer(text))
    cued = text[cues[-1].end() :].strip() if cues else text
    if str(answer) in (output.strip(), cued):
        return str(answer)
    return _EXTRACT[KINDS.get(family) or kind_of(answer)](text, cued, str(answer)) or None


def kind_of(answer: Any) -> str:
    """The form of a true answer: number, choice, grid (several lines) or line."""
    text = str(answer).strip()
    if _NUMBER.fullmatch(text):
        return "number"
    if any(text.lower() in words for words in CHOICES):
        return "choice"
    return "grid" if "\n" in text else "line"


def _number(text: str, cued: str, answer: str) -> str | None:
    found = _NUMBER.findall(cued.split("\n")[0]) if cued != text else []
    found = found or _NUMBER.findall(text)
    return found[-1].replace(",", "").lstrip("+") if found else None


def _choice(text: str, cued: str, answer: str) -> str | None:
    words = next(words for words in CHOICES if answer.strip().lower() in words)
    found = [word for word in re.findall(r"[a-z]+", cued.lower()) if word in words]
    if not found:
        return None
    return answer.strip() if found[0] == answer.strip().lower() else found[0].capitalize()


def _line(text: str, cued: str, answer: str) -> str | None:
    lines = [line.strip() for line in cued.splitlines() if line.strip()]
    line = (lines[0] if cued != text else lines[-1]) if lines else ""
    around = "".join(mark for mark in "\"'`*$.}" if mark not in (answer[:1], answer[-1:]))
    return line.strip(around)


def _expression(text: str, cued: str, answer: str) -> str | None:
    lines = [line.split("=")[0] for line in cued.splitlines()]
    found = [m.group().strip() for line in lines for m in _EXPRESSION.finditer(line) if re.search(r"[-+*/]", m.group())]
    return found[-1] if found and "**" not in found[-1] and len(found[-1]) < 200 else None


def _formula(text: str, cued: str, answer: str) -> str | None:
    line = _line(text, cued, answer) or ""
    packed = line.replace(" ", "")
    whole = _FORMULA.fullmatch(line) and len(line) < 300
    return line if whole and len(_POWER.findall(packed)) == packed.count("**") else None


def _cells(text: str, cued: str, answer: str) -> str | None:
    """The last lines that hold digits, brackets and marks of a board only."""
    kept = list(takewhile(re.compile(r"[\d\s\[\],._Q]+").fullmatch, reversed(cued.splitlines())))
    return "\n".join(reversed(kept)) if len(cued) < 4000 else None


def _last(pattern: str) -> Any:
    matches = re.compile(pattern)
    return lambda text, cued, answer: next(iter(reversed(matches.findall(cued))), None)


_EXTRACT = {
    "number": _number, "choice": _choice, "line": _line, "expression": _expression, "formula": _formula,
    "grid": lambda text, cued, answer: cued, "cells": _cells,
    "letters": _last(r"\b[A-E]+\b"), "hex": _last(r"-?0x[0-9a-fA-F]+"),
    "clock": _last(r"\d+ days?(?:, \d\d:\d\d(?::\d\d)?(?:\.\d+)?)?|\d\d:\d\d(?::\d\d)?(?:\.\d+)?"),
}  # fmt: skip


class _NoSolver(ModuleType):
    """Stands in for pycosat, which has no wheels: reasoning-gym imports it at once, one family calls it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise LuthierError("this family needs pycosat", where="gym:zebra_puzzles", do="pip install pycosat (compiles)")


@cache
def _factory() -> Any:
    if importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = _NoSolver("pycosat")
    try:
        from reasoning_gym import factory
    except ImportError:
        raise LuthierError("gym: tasks need reasoning-gym", do="pip install 'luthier[quickstart]'") from None
    return factory
