"""Steps of a recipe, built and checked, in an order in which each finds its inputs done."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier import catalogue
from luthier import recipe_check as check
from luthier.errors import LuthierError, unknown
from luthier.fields import thaw
from luthier.kit.paths import there
from luthier.recipe_grid import Draft
from luthier.recipe_roles import adapters, asked, paired, resolved
from luthier.recipe_text import Marked
from luthier.shapes import Method

TRAINING = ("train", "objective", "optim")
LAYOUT = ("slices", "tokenizer")


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
    search: Any = None
    dtype: str = "auto"
    slices: tuple[Mapping[str, tuple[int, int]], ...] = ()
    """of a Transform: layers of models, one stretch after another"""
    tokenizer: tuple[str, int] = ("", 1)
    """of a Transform: base, union, or the model whose vocabulary the output gets; what its rows are a multiple of"""
    where: str = ""

    @property
    def use(self) -> str:
        return self.method.id

    def methods(self) -> list[Method]:
        """Every method at work in this step, those held in fields too."""
        found = [m for m in (self.method, self.objective, self.optim) if m is not None]
        found += self.search.measures if self.search else ()
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
            elif isinstance(value, Mapping) and roles[name].kind != "value":
                tokenizer = value["tokenizer"]
                if kind == ("data" if isinstance(tokenizer, Mapping) else "model"):
                    found.append(tokenizer["train"] if isinstance(tokenizer, Mapping) else tokenizer)
        return found

    def line(self, marked: Marked, name: str) -> str:
        """Where the step names this model; where it stands if nowhere, as for an instance of a varied step."""
        body = marked.value["steps"][self.base]
        for role in self.roles:
            value = body.get(role)
            if value == name:
                return marked.where("steps", self.base, role)
            if isinstance(value, list) and name in value:
                return marked.where("steps", self.base, role, value.index(name))
        return self.where

    def placed(self, marked: Marked, fault: LuthierError) -> LuthierError:
        """A fault of its run at the line of what it speaks of: a slice, a model or a field; else of the step."""
        path, said = ("steps", self.base), fault.where or ""
        slice_ = re.match(r"slices\[(\d+)\]", said)
        if slice_:
            return fault.at(marked.where(*path, "slices", int(slice_[1])))
        models = [n for n in self.names("model") if said.startswith(n.rstrip("/") + "/") or said == n]
        if models:
            return fault.at(self.line(marked, max(models, key=len)))
        values = marked.value["steps"][self.base].get("set") or {}
        words = re.findall(r"\w+", f"{said} {fault.what}")
        if set(words) & set(values):
            return check.placed(fault, marked, (*path, "set"), values)
        return fault.at(self.where)

    def config(self) -> dict[str, Any]:
        """The resolved keys, every field written out, in the recipe's own grammar."""
        made = self.method.to_dict() | {k: thaw(v) for k, v in self.roles.items()}
        if self.objective and self.optim:
            made["train"] = self.train.to_dict()
            made |= {"objective": self.objective.to_dict(), "optim": self.optim.to_dict()}
        elif self.shape != "Certify":
            made["dtype"] = self.dtype
        if self.search:
            made["search"] = {k: v for k, v in self.search.to_dict().items() if k != "storage"}
        if self.slices:
            made["slices"] = [{name: list(layers) for name, layers in piece.items()} for piece in self.slices]
        if self.tokenizer[0]:
            made["tokenizer"] = dict(zip(("source", "pad_to_multiple_of"), self.tokenizer, strict=True))
        return made


def build(marked: Marked, every: list[Draft], data: Mapping[str, Any], seed: int) -> dict[str, Step]:
    """All steps, in an order in which each finds its inputs done."""
    made = [_step(marked, draft, every, data, seed) for draft in every]
    return _ordered(marked, {step.name: step for step in made})


def _adapters(experts: Any) -> bool:
    """Whether all are adapters, which merge into an adapter without a base."""
    folders = [there(str(e)) for e in experts] if isinstance(experts, list) else []
    return bool(folders) and all(f is not None and (f / "adapter_config.json").is_file() for f in folders)


def _step(marked: Marked, draft: Draft, every: list[Draft], data: Mapping[str, Any], seed: int) -> Step:
    path, body, card = ("steps", draft.base), draft.body, draft.card
    roles, tune, study = check.roles_of(card), card.shape == "Tune", card.shape == "Study"
    _known_keys(marked, draft, roles)
    for role in roles.values():
        unneeded = role.optional or (role.name == "base" and _adapters(body.get("experts")))
        if not unneeded and body.get(role.name) in (None, []):
            where = marked.where(*path, role.name) if role.name in body else marked.where(*path)
            raise LuthierError(f"step {draft.base!r} lacks {role.name!r}", where=where, do=f"{card.id} needs it")
    given = {n: resolved(marked, draft, r, every, data) for n, r in roles.items() if body.get(n) not in (None, [])}
    paired(marked, path, given)
    if card.shape == "Transform" and "data" in given:
        check.sources(marked, (*path, "data"), given, card.id)
    if card.shape == "Certify":
        check.problem(marked, (*path, "problem"), given["problem"])
    built = check.method(marked, path, body["use"], body.get("set"), card.shape)
    asked(marked, (*path, "set", "questions"), built, given)
    adapters(marked, (*path, "experts"), built, given, every)
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
        search=check.search(marked, (*path, "search"), body.get("search")) if study else None,
        slices=check.slices(marked, (*path, "slices"), body.get("slices"), given),
        tokenizer=check.tokenizer(marked, (*path, "tokenizer"), body.get("tokenizer"), given),
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
    extra = {
        "Tune": TRAINING, "Certify": (), "Transform": ("dtype", *LAYOUT), "Study": ("dtype", "search"),
    }.get(draft.card.shape, ("dtype",))  # fmt: skip
    known = ["use", "set", "vary", *roles, *extra]
    for key in draft.body:
        if key in known:
            continue
        where = marked.where("steps", draft.base, key)
        if key in [f.name for f in draft.card.fields]:
            raise LuthierError(f"{key!r} is a field of {draft.card.id}", where=where, do=f"write set: {{{key}: ...}}")
        if draft.card.shape == "Tune" and key in check.train_fields():
            raise LuthierError(f"{key!r} belongs under train", where=where, do=f"write train: {{{key}: ...}}")
        if draft.card.shape == "Study" and key in check.search_fields():
            raise LuthierError(f"{key!r} belongs under search", where=where, do=f"write search: {{{key}: ...}}")
        if key in TRAINING:
            raise LuthierError(f"{draft.card.id} is of shape {draft.card.shape}, which does not train", where=where,
                               do=f"remove {key!r}")  # fmt: skip
        raise unknown(f"key of a {draft.card.id} step", key, known, where=where)


def _ordered(marked: Marked, steps: dict[str, Step]) -> dict[str, Step]:
    done: dict[str, Step] = {}
    for first in steps:
        trail: dict[str, Iterator[str]] = {}  # each waits for the next; what it has yet to wait for
        entered: str | None = first if first not in done else None
        while entered or trail:
            if entered:
                trail[entered] = iter([word for word in steps[entered].names("model") if word in steps])
            last = next(reversed(trail))
            entered = next((word for word in trail[last] if word not in done), None)
            if entered in trail:
                ring = [*list(trail)[list(trail).index(entered) :], entered]
                where = marked.where("steps", steps[entered].base)
                raise LuthierError(f"steps wait for each other: {' -> '.join(ring)}", where=where)
            if not entered:
                done[last] = steps[last]
                del trail[last]
    return done
