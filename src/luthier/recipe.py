"""The recipe grammar, version 1: data, then steps that use methods, each giving a model, a table or a trace.

    luthier: 1
    seed: 0
    hardware: {device: auto, memory: 1GiB, threads: 2}          # outside every hash
    data:  {NAME: {source: "gym:FAMILY" | "text:PATH" | "jsonl:PATH", split: {...}, set: {...}}}
    steps: {NAME: {use: ID, ROLE: ..., set: {FIELD: ...}, vary: {seed: [...]}}}

A Tune step also has `train`, `objective` and `optim`; other steps may have `dtype`. A role is given the
name of another step, of a bundled model, of a folder or of a Hub model; `data` takes names of `data`.
Instead of a name, a Tune's `model` may be `{new: {SIZES AND SLOTS}, tokenizer: {train: DATA, size: N}}`,
or `tokenizer: NAME` for one that exists.

`vary` repeats a step: over `seed`, `set.FIELD` or `train.FIELD`; the instances are called `math@seed=1`.
Among varied steps equal keys meet: the instance at seed 1 takes the inputs at seed 1. A list of a step
that does not vary takes all instances.

Everything is checked here before anything starts. Paths are relative to the working directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import recipe_check as check
from luthier import recipe_steps
from luthier.checkpoint.bundled import MODELS
from luthier.errors import LuthierError, unknown
from luthier.kit.paths import there
from luthier.kit.plain import to_yaml
from luthier.recipe_check import Hardware
from luthier.recipe_grid import drafts
from luthier.recipe_set import assign
from luthier.recipe_steps import Step
from luthier.recipe_text import Marked, mark, read

VERSION = 1
TOP = ("luthier", "seed", "hardware", "data", "steps")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, checked; steps in an order in which each finds its inputs done."""

    name: str
    seed: int
    hardware: Hardware
    data: Mapping[str, Mapping[str, Any]]
    steps: Mapping[str, Step]
    marked: Marked

    def needs(self, step: Step) -> list[str]:
        """The names of the steps whose results this one takes."""
        return [name for name in step.names("model") if name in self.steps]

    def outside(self) -> list[str]:
        """Every model named that is not a step, once."""
        names = [n for step in self.steps.values() for n in step.names("model") if n not in self.steps]
        return list(dict.fromkeys(names))

    def to_yaml(self) -> str:
        """The recipe as it stands, `--set` applied; reads back as the same recipe."""
        return to_yaml(self.marked.value)


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load(source: str | Path | Mapping[str, Any] | Marked, sets: Sequence[str] = (), name: str | None = None) -> Recipe:
    """The recipe of this shipped name, file, run folder, map or marked values, with `--set` assignments.

    LuthierError names the file and line (for a map, the dotted path) and the nearest right word.
    """
    if isinstance(source, Marked):
        marked = source
    elif isinstance(source, Mapping):
        marked = mark(source, name or "recipe")
    else:
        path = find(source)
        marked = read(path)
        folder = path.resolve().parent.name if path.parent != Path() else ""
        name = name or (folder if path.name == "recipe.yaml" and folder else path.stem.strip(".") or "recipe")
    for assignment in sets:
        assign(marked, assignment)
    return parse(marked, name or "recipe")


def find(source: str | Path) -> Path:
    """The file of a recipe: the name of a shipped one, a path, or a run folder; ./NAME is never a shipped one."""
    if str(source) in shipped():
        return shipped()[str(source)]
    path = Path(source)
    for candidate in (path, path / "recipe.yaml"):
        if there(candidate) and candidate.is_file():
            return candidate
    if there(path) and path.is_dir():
        raise LuthierError("is a folder without a recipe.yaml", where=str(source), do="give the file, or a run folder")
    near = path.suffix in (".yaml", ".yml") and there(path.parent)
    beside = [str(p) for p in path.parent.glob("*.y*ml")] if near else []
    raise unknown("recipe", str(source), [*shipped(), *beside])


def parse(marked: Marked, name: str) -> Recipe:
    """The checked recipe of marked values."""
    top = check.a_map(marked, marked.value, (), "the recipe")
    if top.get("luthier") != VERSION or isinstance(top["luthier"], bool):
        if "merge_method" in top:
            raise LuthierError("this is a mergekit file", where=marked.where(), do="use luthier merge FILE OUT")
        said = f"recipe version {top['luthier']!r} is not known" if "luthier" in top else "this is no recipe yet"
        raise LuthierError(said, where=marked.where("luthier"), do=f"write luthier: {VERSION}")
    check.keys(marked, top, (), TOP, "recipe")
    seed = recipe_steps.seed_of(marked, top.get("seed", 0), ("seed",))
    hardware = check.hardware(marked, top.get("hardware"))
    data = {n: check.data_entry(marked, n, v) for n, v in _named(marked, top, "data").items()}
    bodies = _named(marked, top, "steps")
    if not bodies:
        raise LuthierError("there are no steps", where=marked.where("steps"), do="write steps: {NAME: {use: ID}}")
    taken = next((n for n in bodies if n in MODELS), None)
    if taken:
        raise LuthierError(f"{taken!r} is a bundled model", where=marked.where("steps", taken), do="rename the step")
    steps = recipe_steps.build(marked, drafts(marked, bodies), data, seed)
    return Recipe(name, seed, hardware, data, steps, marked)


def _named(marked: Marked, top: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    found = check.a_map(marked, top.get(section), (section,), section)
    for name in found:
        if not NAME.fullmatch(name):
            where = marked.where(section, name)
            raise LuthierError(f"{name!r} cannot be a name", where=where, do="use letters, digits, - and _")
    return found
