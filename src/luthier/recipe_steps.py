"""Steps of a recipe: a grid unrolled into instances, roles checked, names resolved, an order found."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier import catalogue
from luthier import recipe_check as check
from luthier.checkpoint.bundled import MODELS
from luthier.errors import LuthierError, unknown
from luthier.fields import thaw
from luthier.recipe_text import Marked
from luthier.shapes import Method

TRAINING = ("train", "objective", "optim")
SHAPES = {"Tune": "a model", "Transform": "a model", "Measure": "a table", "Decode": "a trace"}
MODEL_SHAPES = ("Tune", "Transform")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Step:
    """One step, checked: the method built, the references known."""

    name: str
    """`math`, or `math@seed=1` for an instance of a varied step"""
    base: str
    method: Method
    shape: str
    seed: int
    roles: Mapping[str, Any]
    """role to a name, a tuple of names, or the map of a new model"""
    vary: Mapping[str, Any] = field(default_factory=dict)
    train: Any = None
    objective: Any = None
    optim: Any = None
    dtype: str = "auto"
    where: str = ""

    @property
    def use(self) -> str:
        return self.method.id

    def methods(self) -> list[Method]:
        """Every method at work in this step, those held in fields too."""
        found = [m for m in (self.method, self.objective, self.optim) if m is not None]
        for one in found:
            for value in vars(one).values():
                found += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Method)]
        return found

    def names(self, kind: str) -> list[str]:
        """Every name in the roles of this kind: model, data or value."""
        roles, found = check.roles_of(catalogue.card(self.use)), []
        for name, value in self.roles.items():
            if roles[name].kind == kind and not isinstance(value, Mapping):
                found += list(value) if isinstance(value, tuple) else [value]
            elif isinstance(value, Mapping):
                tokenizer = value["tokenizer"]
                if kind == ("data" if isinstance(tokenizer, Mapping) else "model"):
                    found.append(tokenizer["train"] if isinstance(tokenizer, Mapping) else tokenizer)
        return found

    def config(self) -> dict[str, Any]:
        """The resolved keys, every field written out, in the recipe's own grammar."""
        made = self.method.to_dict() | {k: thaw(v) for k, v in self.roles.items()}
        if self.objective and self.optim:
            made["train"] = self.train.to_dict()
            made |= {"objective": self.objective.to_dict(), "optim": self.optim.to_dict()}
        else:
            made["dtype"] = self.dtype
        return made


@dataclass(frozen=True)
class Draft:
    """A step before its names are resolved: its keys with one choice of what varies put in."""

    name: str
    base: str
    vary: Mapping[str, Any]
    body: Mapping[str, Any]
    card: catalogue.Card


def drafts(marked: Marked, bodies: Mapping[str, Any]) -> list[Draft]:
    """One draft a step, or one for each point of its grid."""
    found = []
    for name, body in bodies.items():
        body = check.a_map(marked, body, ("steps", name), f"step {name!r}")
        if "use" not in body:
            raise LuthierError(f"step {name!r} names no method", where=marked.where("steps", name), do="write use: ID")
        card = check.known_method(marked, ("steps", name, "use"), body["use"])
        if card.shape not in SHAPES:
            do = "name it inside a step" if card.shape != "Part" else "name it in model: {new: {slots: ...}}"
            where = marked.where("steps", name, "use")
            raise LuthierError(f"{card.id} is a {card.shape}, which is no step of its own", where=where, do=do)
        for vary, one in _grid(marked, name, body):
            suffix = ",".join(f"{k}={re.sub('[^A-Za-z0-9.+_-]', '_', str(v))}" for k, v in vary.items())
            found.append(Draft(f"{name}@{suffix}" if suffix else name, name, vary, one, card))
    return found


def _grid(marked: Marked, name: str, body: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    path = ("steps", name, "vary")
    vary = check.a_map(marked, body.get("vary"), path, "vary")
    for key, values in vary.items():
        here = marked.where(*path, key)
        if key != "seed" and not re.fullmatch(r"(set|train)\.\w+", key):
            raise LuthierError(f"{key!r} cannot vary", where=here, do=f"vary seed, set.{key} or train.{key}")
        if not isinstance(values, list) or not values or any(isinstance(v, (list, dict)) for v in values):
            raise LuthierError(f"vary {key} takes a list of plain values, got {values!r}", where=here)
        if len({repr(v) for v in values}) < len(values):
            raise LuthierError(f"a value of vary {key} stands twice", where=here)
    found = []
    for point in itertools.product(*vary.values()):
        taken = dict(zip(vary, point, strict=True))
        one = copy.deepcopy({k: v for k, v in body.items() if k != "vary"})
        for key, value in taken.items():
            section, _, inner = key.partition(".")
            if inner:
                one[section] = dict(one.get(section) or {}) | {inner: value}
                if (*path, key) in marked.lines:
                    marked.lines[("steps", name, section, inner)] = marked.lines[(*path, key)]
        found.append((taken, one))
    return found


def build(marked: Marked, every: list[Draft], data: Mapping[str, Any], seed: int) -> dict[str, Step]:
    """All steps, in an order in which each finds its inputs done."""
    made = [_step(marked, draft, every, data, seed) for draft in every]
    return _ordered(marked, {step.name: step for step in made})


def _step(marked: Marked, draft: Draft, every: list[Draft], data: Mapping[str, Any], seed: int) -> Step:
    path, body, card = ("steps", draft.base), draft.body, draft.card
    roles, tune = check.roles_of(card), card.shape == "Tune"
    _known_keys(marked, draft, roles)
    for role in roles.values():
        if not role.optional and body.get(role.name) in (None, []):
            where = marked.where(*path, role.name) if role.name in body else marked.where(*path)
            raise LuthierError(f"step {draft.base!r} lacks {role.name!r}", where=where, do=f"{card.id} needs it")
    given = {n: _role(marked, draft, r, every, data) for n, r in roles.items() if body.get(n) not in (None, [])}
    _paired(marked, path, given)
    built = check.method(marked, path, body["use"], body.get("set"), card.shape)
    _asked(marked, (*path, "set", "questions"), built, given)
    own = seed_of(marked, draft.vary["seed"], (*path, "vary", "seed")) if "seed" in draft.vary else seed
    dtype = body.get("dtype", "auto")
    if dtype not in check.DTYPES:
        raise unknown("dtype", str(dtype), check.DTYPES, where=marked.where(*path, "dtype"))
    return Step(
        name=draft.name, base=draft.base, shape=card.shape, seed=own, roles=given, vary=draft.vary, dtype=dtype,
        method=built,
        train=check.train(marked, (*path, "train"), body.get("train")) if tune else None,
        objective=_with_default(marked, (*path, "objective"), body, "objective.next_token", "Objective", tune),
        optim=_with_default(marked, (*path, "optim"), body, "optim.adamw", "Optim", tune),
        where=marked.where(*path),
    )  # fmt: skip


def seed_of(marked: Marked, value: Any, path: tuple) -> int:
    """A seed: a whole number from 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LuthierError(f"a seed is a whole number from 0, got {value!r}", where=marked.where(*path))
    return value


def _with_default(marked: Marked, path: tuple, body: Mapping, default: str, shape: str, tune: bool) -> Method | None:
    return check.named_method(marked, path, body.get(path[-1], default), shape) if tune else None


def _known_keys(marked: Marked, draft: Draft, roles: Mapping[str, check.Role]) -> None:
    known = ["use", "set", "vary", *roles, *(TRAINING if draft.card.shape == "Tune" else ("dtype",))]
    for key in draft.body:
        if key in known:
            continue
        where = marked.where("steps", draft.base, key)
        if key in [f.name for f in draft.card.fields]:
            raise LuthierError(f"{key!r} is a field of {draft.card.id}", where=where, do=f"write set: {{{key}: ...}}")
        if draft.card.shape == "Tune" and key in check.train_fields():
            raise LuthierError(f"{key!r} belongs under train", where=where, do=f"write train: {{{key}: ...}}")
        if key in TRAINING:
            raise LuthierError(f"{draft.card.id} is a {draft.card.shape}, which does not train", where=where,
                               do=f"remove {key!r}")  # fmt: skip
        raise unknown(f"key of a {draft.card.id} step", key, known, where=where)


def _role(marked: Marked, draft: Draft, role: check.Role, every: list[Draft], data: Mapping[str, Any]) -> Any:
    path, value = ("steps", draft.base, role.name), draft.body[role.name]
    if role.kind == "value":
        return tuple(value) if isinstance(value, list) else (value,) if role.many else value
    if isinstance(value, Mapping):
        if draft.card.shape != "Tune" or role.name != "model":
            raise LuthierError(f"{role.name!r} takes a name, got a map", where=marked.where(*path))
        return new_model(marked, path, value, draft, every, data)
    if isinstance(value, list) and not role.many:
        raise LuthierError(f"{role.name!r} of {draft.card.id} takes one name, got a list", where=marked.where(*path))
    found: list[str] = []
    for i, word in enumerate(value if isinstance(value, list) else [value]):
        here = (*path, i) if isinstance(value, list) else path
        if not isinstance(word, str):
            raise LuthierError(f"expected a name, got {word!r}", where=marked.where(*here))
        if role.kind == "data":
            found.append(_data_name(marked, here, word, data))
        else:
            found += _model_names(marked, here, word, draft, every, role.many)
    twice = next((w for w in found if found.count(w) > 1), None)
    if twice and role.kind == "data":
        raise LuthierError(f"{twice!r} stands twice in {role.name!r}", where=marked.where(*path))
    return tuple(found) if role.many else found[0]


def _data_name(marked: Marked, path: tuple, word: str, data: Mapping[str, Any]) -> str:
    if word not in data:
        raise unknown("data", word, data, where=marked.where(*path))
    return word


def _model_names(marked: Marked, path: tuple, word: str, draft: Draft, every: list[Draft], many: bool) -> list[str]:
    """The instances of a step that the word stands for, or the word itself if it names a model elsewhere."""
    exact = [d for d in every if d.name == word]
    hits = exact or [d for d in every if d.base == word and _meet(d.vary, draft.vary)]
    if not hits:
        return [_outside(marked, path, word, every)]
    if hits[0].card.shape not in MODEL_SHAPES:
        gives = SHAPES[hits[0].card.shape]
        raise LuthierError(f"step {word!r} gives {gives}, not a model", where=marked.where(*path))
    if len(hits) > 1 and not many:
        do = f"name one, such as {hits[0].name}, or vary this step too"
        raise LuthierError(f"step {word!r} varies into {len(hits)}", where=marked.where(*path), do=do)
    return [d.name for d in hits]


def _meet(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return all(theirs[k] == ours[k] for k in theirs if k in ours)


def _outside(marked: Marked, path: tuple, word: str, every: list[Draft]) -> str:
    if word in MODELS or Path(word).expanduser().exists():
        return word
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", word):  # owner/name, on the Hub
        return word
    if "/" in word or word.startswith((".", "~")):
        raise LuthierError(f"no such folder: {word}", where=marked.where(*path))
    raise unknown("model or step", word, {*MODELS, *(d.base for d in every)}, where=marked.where(*path))


def new_model(marked: Marked, path: tuple, value: Mapping, draft: Draft, every: list[Draft], data: Mapping) -> dict:
    """`{new: {...}, tokenizer: NAME | {train: DATA, size: N}}`, checked."""
    check.keys(marked, value, path, ("new", "tokenizer"), "model")
    if "new" not in value or "tokenizer" not in value:
        raise LuthierError("a new model needs both new and tokenizer", where=marked.where(*path),
                           do="write {new: {SIZES}, tokenizer: {train: DATA, size: 4096}}")  # fmt: skip
    sizes = check.new_sizes(marked, (*path, "new"), value["new"])
    tokenizer, here = value["tokenizer"], (*path, "tokenizer")
    if isinstance(tokenizer, str):
        return {"new": sizes, "tokenizer": _model_names(marked, here, tokenizer, draft, every, False)[0]}
    tokenizer = check.a_map(marked, tokenizer, here, "tokenizer")
    check.keys(marked, tokenizer, here, ("train", "size"), "tokenizer")
    size = tokenizer.get("size", 4096)
    if not isinstance(size, int) or isinstance(size, bool) or size < 257:
        raise LuthierError(f"a tokenizer's size is a whole number from 257, got {size!r}", where=marked.where(*here))
    name = _data_name(marked, (*here, "train"), str(tokenizer.get("train")), data)
    return {"new": sizes, "tokenizer": {"train": name, "size": size}}


def _paired(marked: Marked, path: tuple, given: Mapping[str, Any]) -> None:
    pair, models = given.get("paired_to"), given.get("models")
    if pair and models and pair not in models:
        raise LuthierError(f"paired_to {pair!r} is not among the models", where=marked.where(*path, "paired_to"),
                           do="add it to models")  # fmt: skip
    if models and len(set(models)) < len(models):
        twice = next(m for m in models if models.count(m) > 1)
        raise LuthierError(f"model {twice!r} stands twice", where=marked.where(*path, "models"))


def _asked(marked: Marked, path: tuple, method: Any, given: Mapping[str, Any]) -> None:
    """Questions of a comparison name models and data of its own step; better said now than after the training."""
    for question, asked in (getattr(method, "questions", None) or {}).items():
        for key, role in (("model", "models"), ("than", "models"), ("data", "data")):
            value = asked.get(key) or ()
            for word in (value,) if isinstance(value, str) else value:
                if word not in given[role]:
                    raise unknown(f"{key} in a question", word, given[role], where=marked.where(*path, question, key))


def _ordered(marked: Marked, steps: dict[str, Step]) -> dict[str, Step]:
    done: dict[str, Step] = {}

    def visit(step: Step, trail: tuple[str, ...]) -> None:
        if step.name in trail:
            ring = " -> ".join((*trail[trail.index(step.name) :], step.name))
            raise LuthierError(f"steps wait for each other: {ring}", where=marked.where("steps", step.base))
        if step.name not in done:
            for word in step.names("model"):
                if word in steps:
                    visit(steps[word], (*trail, step.name))
            done[step.name] = step

    for step in steps.values():
        visit(step, ())
    return done
