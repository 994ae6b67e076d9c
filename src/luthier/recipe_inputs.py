"""What the steps of a recipe take: data and models, opened once, and the hashes that say whether a step is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier import __version__, catalogue
from luthier import recipe_check as check
from luthier.errors import LuthierError
from luthier.kit.plain import to_yaml
from luthier.ledger import Record
from luthier.recipe import Recipe
from luthier.recipe_steps import Step

Watch = Callable[[Mapping[str, Any]], None]
ENGINE_ONLY = ("save_every", "keep", "workers")
"""train keys that cannot change a result, and so stay out of the hash"""


class Inputs:
    """What the steps of a recipe take: data and models, opened once, and their content hashes."""

    def __init__(self, recipe: Recipe, folder: Path | None, watch: Watch):
        self.recipe, self.watch = recipe, watch
        self.folder = folder if folder is not None else Path()
        self.cache = folder / "cache" if folder is not None else None
        self.data: dict[str, Any] = {}
        self.models: dict[tuple[str, str], Any] = {}
        """(name, name of its base or "") to a Checkpoint or an expert on that base"""
        self.hashes: dict[str, str] = {}

    def open(self) -> None:
        """Open everything that stands outside the run; whatever is missing or broken is said here."""
        from luthier.engine.data import open_data
        from luthier.engine.runner import device_of

        try:
            self.device = device_of(self.recipe.hardware.device)
        except LuthierError as fault:
            where = self.recipe.marked.where("hardware", "device")
            raise LuthierError(fault.what, where=where, do=fault.do) from None
        context = self.context(None)
        for name, entry in self.recipe.data.items():
            with check.at_data(self.recipe.marked, name):
                self.data[name] = open_data(name, entry, context)
        for step in self.recipe.steps.values():
            self.secrets(step)
            waits = step.roles.get("base") in self.recipe.steps  # then a change to it can only be opened later
            for name in step.names("model"):
                if name not in self.recipe.steps and not (waits and is_change(Path(name).expanduser())):
                    try:
                        self.model(name, step)
                    except LuthierError as fault:
                        raise fault.at(step.line(self.recipe.marked, name)) from None

    def model(self, name: str, step: Step) -> Any:
        """The Checkpoint a name stands for; a delta or adapter among experts is put on the step's base, unless the
        method merges adapters."""
        from luthier.checkpoint.expert import open_expert

        base, path = step.roles.get("base"), Path(name).expanduser()
        if name in self.recipe.steps:
            path = self.folder / "steps" / name
        as_is = getattr(step.method, "experts_are", "") == "adapters" and is_adapter(path)
        on = base if base and base != name and is_change(path) and not as_is else ""
        if (name, on) not in self.models:
            there = str(path) if path.exists() or name in self.recipe.steps else name
            self.models[(name, on)] = open_expert(there, self.model(on, step) if on else None)
        return self.models[(name, on)]

    def secrets(self, step: Step) -> dict[str, Any]:
        """Role to the secret in the key file it names, which is read anew each time and kept nowhere."""
        paths = step.names("key")
        if not paths:
            return {}
        from luthier.kit.secret import Secret

        try:
            return {role: Secret.read(path) for role, path in step.roles.items() if path in paths}
        except LuthierError as fault:
            raise fault.at(step.where) from None

    def context(self, step: Step | None) -> Any:
        from luthier.kit.context import Context

        seed, name = (step.seed, step.base) if step else (self.recipe.seed, "data")
        if step and step.train:
            name = step.train.draws or name
        watch = self.watch if step is None else lambda event: self.watch({**event, "step": step.name})
        return Context(seed=seed, step=name, device=self.device, cache=self.cache, watch=watch)

    def hash(self, step: Step) -> str:
        """The step's hash; its inputs must be done."""
        config = step.config()
        if step.train:
            config["train"] = {k: v for k, v in config["train"].items() if k not in ENGINE_ONLY}
        parts = [__version__, step.base, step.seed, config, self.named(step), sources(step)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def named(self, step: Step) -> dict[str, Any]:
        """Role to {name, hash}, or a list of them."""
        roles = check.roles_of(catalogue.card(step.use))
        made: dict[str, Any] = {}
        value: Any
        for role, value in step.roles.items():
            kind = roles[role].kind
            if kind == "value":
                continue
            if kind == "key":
                made[role] = {"name": value, "hash": self.secrets(step)[role].fingerprint}
                continue
            if isinstance(value, Mapping):
                tokenizer: Any = value["tokenizer"]
                if isinstance(tokenizer, Mapping):
                    made[role] = self._named(tokenizer["train"], "data", step)
                else:
                    made[role] = self._named(str(tokenizer), "model", step)
            elif isinstance(value, tuple):
                made[role] = [self._named(name, kind, step) for name in value]
            else:
                made[role] = self._named(value, kind, step)
        return made

    def _named(self, name: str, kind: str, step: Step) -> dict[str, str]:
        if kind == "data":
            key, make = f"data/{name}", lambda: self.data[name].hash()
        elif name in self.recipe.steps:
            key, make = f"step/{name}", lambda: self.model(name, step).hash()
        else:
            key, make = f"model/{name}/{step.roles.get('base')}", lambda: self.model(name, step).hash()
        if key not in self.hashes:
            self.hashes[key] = make()
        return {"name": name, "hash": self.hashes[key]}

    def finished(self, name: str, record: Record) -> None:
        """A step is done: its content hash is known, and a model of it that was open before is stale."""
        self.hashes[f"step/{name}"] = record.output or ""
        self.models = {key: model for key, model in self.models.items() if key[0] != name}

    def content(self, folder: Path, artefacts: Mapping[str, str]) -> str:
        """Hash of what a step has left in its folder."""
        from luthier.checkpoint.expert import open_expert

        if "model" in artefacts:
            return open_expert(folder).hash()
        return hashlib.sha256((folder / next(iter(artefacts.values()))).read_bytes()).hexdigest()

    def job(self, step: Step, digest: str) -> Any:
        """The step with everything looked up, ready for the engine."""
        from luthier.engine import runner

        roles = check.roles_of(catalogue.card(step.use))
        made: dict[str, Any] = {}
        for role, value in step.roles.items():
            if roles[role].kind == "value":
                made[role] = value
            elif roles[role].kind == "key":
                made[role] = self.secrets(step)[role]
            elif isinstance(value, Mapping):
                made[role] = self._new(value, step)
            else:
                find = self.data.__getitem__ if roles[role].kind == "data" else lambda name: self.model(name, step)
                made[role] = [find(v) for v in value] if isinstance(value, tuple) else find(value)
        hardware = self.recipe.hardware
        return runner.Job(
            name=step.name, method=step.method, roles=made, out=self.folder / "steps" / step.name,
            work=self.folder / "work" / f"{step.name}-{digest}", names=step.roles, train=step.train,
            objective=step.objective, optim=step.optim, search=step.search, dtype=runner.DTYPES.get(step.dtype),
            memory=hardware.memory, threads=hardware.threads, card=self._card(step), layout=layout_of(step),
        )  # fmt: skip

    def _new(self, value: Mapping[str, Any], step: Step) -> Any:
        from luthier.engine.runner import NewModel

        tokenizer = value["tokenizer"]
        if isinstance(tokenizer, Mapping):
            return NewModel(value["new"], None, self.data[tokenizer["train"]], tokenizer["size"])
        return NewModel(value["new"], self.model(tokenizer, step).path)

    def _card(self, step: Step) -> str:
        from luthier.checkpoint.card import model_card

        if step.shape not in ("Tune", "Transform"):
            return ""
        base = step.roles.get("base") or step.roles.get("model")
        ids = list(dict.fromkeys(m.id for m in step.methods()))
        return model_card(self.alone(step), ids, base if isinstance(base, str) else None, self.notes(step))

    def notes(self, step: Step) -> tuple[str, ...]:
        """What a reader of the step's result should know of the models behind it."""
        from luthier.checkpoint.bundled import NOTES

        found: list[str] = []
        left, seen = [(name, step) for name in reversed(_weights(step))], set()
        while left:
            name, at = left.pop()
            if name in self.recipe.steps:
                if name not in seen:
                    inner = self.recipe.steps[name]
                    left += [(other, inner) for other in reversed(_weights(inner))]
                seen.add(name)
            else:
                found += [NOTES[name]] if name in NOTES else self.model(name, at).notices
        return tuple(dict.fromkeys(found))

    def alone(self, step: Step) -> str:
        """The recipe of this step and of those it needs, as YAML."""
        needed = {step.base}
        for other in reversed(list(self.recipe.steps.values())):
            if other.base in needed:
                needed |= {self.recipe.steps[name].base for name in self.recipe.needs(other)}
        whole = self.recipe.marked.value
        steps = {k: v for k, v in whole["steps"].items() if k in needed}
        used = {n for s in self.recipe.steps.values() if s.base in needed for n in s.names("data")}
        data = {k: v for k, v in (whole.get("data") or {}).items() if k in used}
        return to_yaml({"luthier": 1, "seed": self.recipe.seed} | ({"data": data} if data else {}) | {"steps": steps})


def layout_of(step: Step) -> Any:
    """The slices and the vocabulary of a merge, by number instead of name."""
    from luthier.engine.layout import Layout

    experts = step.roles.get("experts", ())
    number: dict[str, Any] = {name: i for i, name in enumerate([experts] if isinstance(experts, str) else experts)}
    number |= {step.roles["base"]: None} if "base" in step.roles else {}
    slices = tuple(tuple((number[name], *layers) for name, layers in one.items()) for one in step.slices)
    source, multiple = step.tokenizer
    return Layout(slices, source or None if source in ("", "base", "union") else number[source], multiple)


def _weights(step: Step) -> list[str]:
    """The models whose weights a step takes: of a new model only the tokenizer comes from elsewhere."""
    return [] if isinstance(step.roles.get("model"), Mapping) else step.names("model")


def is_change(path: Path) -> bool:
    """Whether the folder holds a delta or an adapter, which needs a base."""
    return (path / "delta.json").is_file() or is_adapter(path)


def is_adapter(path: Path) -> bool:
    """Whether the folder holds a LoRA adapter."""
    return (path / "adapter_config.json").is_file()


def sources(step: Step) -> dict[str, str]:
    """Method id to the hash of its file, of what the candidates of a Study are, too."""
    ids = [id_ for m in step.methods() for id_ in (m.id, *getattr(m, "makes", ()))]
    return {id_: catalogue.source_hash(id_) for id_ in ids}
