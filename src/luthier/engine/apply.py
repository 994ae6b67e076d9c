"""The one verb of a method, from Python: `Ties(density=0.5).apply(base="a", experts=["b", "c"]).save("out")`.

Roles are given by name. A model is a name, a folder or a `Checkpoint`; to train, measure or decode also
a live (model, tokenizer) pair. Data is a source such as "gym:countdown", a map as in a recipe, or
anything that implements `flows.Data`. Beside the roles stand the options of `OPTIONS`, and for a Tune
`train`, `objective` and `optim` as in a recipe.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.checkpoint.adapter import CONFIG, Adapter
from luthier.checkpoint.atomic import check_apart
from luthier.checkpoint.bundled import NOTES
from luthier.checkpoint.card import model_card
from luthier.checkpoint.expert import open_expert
from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.resolve import resolve
from luthier.checkpoint.writer import save_model
from luthier.engine import runner
from luthier.engine.certify_scale import answered
from luthier.engine.data import open_data
from luthier.engine.spec import SearchSpec, TrainSpec
from luthier.errors import LuthierError, unknown
from luthier.flows import Table
from luthier.kit.context import Context
from luthier.kit.pairing import one_for_each
from luthier.kit.plain import to_yaml
from luthier.kit.secret import Secret
from luthier.shapes import Certify, Decode, Measure, Method, Objective, Optim, Study, Transform, Tune

OPTIONS = {
    "seed": "root of all randomness, 0 by default",
    "device": "auto, cpu, cuda or mps",
    "dtype": "auto, fp32, bf16 or fp16: of a merge's output, or in which models are looked at",
    "memory": "bytes a streamed transform may hold",
    "threads": "of a streamed transform",
    "folder": "where a training keeps its saves, or a search its trials, to go on after a break",
    "watch": "a function that receives events",
}
TRAINING = {"train": None, "objective": "objective.next_token", "optim": "optim.adamw"}


def apply(method: Method, given: Mapping[str, Any]) -> Any:
    """What the method gives: a `Merged` to save, a `TunedModel`, a `Studied`, a Table, a Trace or a Certificate."""
    roles = _roles(method)
    known = [*roles, *OPTIONS, *(TRAINING if isinstance(method, Tune) else ())]
    known += ["search"] if isinstance(method, Study) else []
    for name in given:
        if name not in known:
            raise unknown("role or option", name, known, where=method.id)
    missing = next((n for n, (_, optional) in roles.items() if not optional and given.get(n) is None), None)
    if missing and not (missing == "base" and _adapters(given.get("experts"))):
        raise LuthierError(f"{missing!r} is missing", where=method.id, do=f"give {missing}=...")
    every = {Transform: _merge, Tune: _tune, Measure: _measure, Decode: _decode, Study: _study, Certify: _certify}
    for shape, work in every.items():
        if isinstance(method, shape):
            return work(method, given)
    raise LuthierError(f"a {type(method).__mro__[1].__name__} is not applied by itself", where=method.id)


def _adapters(experts: Any) -> bool:
    """Whether all are adapters, which merge into an adapter without a base."""
    return bool(experts) and all(
        isinstance(e, Adapter) or (isinstance(e, (str, Path)) and (Path(e) / CONFIG).is_file()) for e in _list(experts)
    )


def _roles(method: Method) -> dict[str, tuple[bool, bool]]:
    """Role to (a list, optional)."""
    return {word.rstrip("*?"): ("*" in word, "?" in word) for word in type(method).roles}


def _context(given: Mapping[str, Any], step: str) -> Context:
    device = runner.device_of(str(given.get("device", "auto")))
    return Context(seed=given.get("seed", 0), step=step, device=device, watch=given.get("watch"))


def _dtype(given: Mapping[str, Any]) -> Any:
    word = given.get("dtype", "auto")
    if word != "auto" and word not in runner.DTYPES:
        raise unknown("dtype", str(word), ("auto", *runner.DTYPES))
    return runner.DTYPES.get(word)


def _list(value: Any) -> list[Any]:
    """A list of what was given; a tuple is one live (model, tokenizer) pair unless it holds names."""
    many = isinstance(value, tuple) and all(isinstance(v, (str, Path, Checkpoint)) for v in value)
    return list(value) if many or isinstance(value, list) else [value]


def _notes(*sources: Any) -> list[str]:
    """What a reader of the result should know of the models behind it."""
    return list(dict.fromkeys(NOTES[s] for s in sources if isinstance(s, str) and s in NOTES))


def _data(given: Mapping[str, Any], ctx: Context) -> list[Any]:
    made: list[Any] = []
    for i, source in enumerate(_list(given["data"])):
        name = str(source.get("source")) if isinstance(source, Mapping) else str(source)
        named = hasattr(source, "train") and hasattr(source, "test")
        made.append(source if named else open_data(name or f"data {i}", source, ctx.with_(step="data")))
    return made


def _named(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, Checkpoint):
        return source.path.name
    return type(source[0] if isinstance(source, tuple) else source).__name__


@dataclass(frozen=True)
class Merged:
    """A Transform with its inputs, not yet carried out: nothing is read before `plan` or `save`."""

    method: Transform
    given: Mapping[str, Any]

    def plan(self) -> Any:
        """Shapes, bytes, memory and seconds of `save` (`engine.stream.Plan`); reads headers only."""
        from luthier.engine.stream import plan_transform

        base, experts = self._opened()
        options = {k: self.given[k] for k in ("memory", "threads") if k in self.given}
        return plan_transform(self.method, base, experts, dtype=_dtype(self.given), roles=self._key(), **options)

    def save(self, folder: str | Path) -> Path:
        """Carry it out and write a Hugging Face folder, whole or not at all; returns its path."""
        from luthier.engine.stream import run_transform

        base, experts = self._opened()
        check_apart(folder, (s.path for s in (base, *experts) if isinstance(getattr(s, "path", None), Path)))
        names = [str(_named(e)) for e in self._experts]
        one = {role: self.given[role] for role in ("base", "model") if self.given.get(role) is not None}
        step: dict[str, Any] = {role: _named(model) for role, model in one.items()}
        data = _entries(_list(self.given["data"])) if "data" in self.given else {}
        step |= ({"experts": names} if names else {}) | ({"data": list(data)} if data else {})
        step |= {"key": str(self.given["key"])} if "key" in self.given else {}
        recipe = {"luthier": 1} | ({"data": data} if data else {}) | {"steps": {"model": self.method.to_dict() | step}}
        notes = _notes(*one.values(), *self._experts)
        text = model_card(to_yaml(recipe), [self.method.id], step.get("base", step.get("model")), notes)
        options = {k: self.given[k] for k in ("memory", "threads") if k in self.given}
        ctx = _context(self.given, "apply")
        ctx = ctx.with_(roles=self._key() | ({"data": _data(self.given, ctx)} if data else {}))
        return run_transform(
            self.method, base, experts, Path(folder), ctx, dtype=_dtype(self.given), card=text, **options
        )

    def _opened(self) -> tuple[Any, list[Any]]:
        base = self.given.get("base", self.given.get("model"))
        opened = base if base is None or isinstance(base, Checkpoint) else resolve(base)
        experts = [open_expert(e, opened, self.method.experts_are) for e in self._experts]
        if "data" in self.given:
            one_for_each(_list(self.given["data"]), len(experts), self.method.id)
        return opened, experts

    @property
    def _experts(self) -> list[Any]:
        return [] if self.given.get("experts") is None else _list(self.given["experts"])

    def _key(self) -> dict[str, Any]:
        """The secret of a method that takes one, from the file."""
        key = self.given.get("key")
        return {} if key is None else {"key": key if isinstance(key, Secret) else Secret.read(key)}


def _merge(method: Transform, given: Mapping[str, Any]) -> Merged:
    return Merged(method, dict(given))


@dataclass(frozen=True)
class TunedModel:
    """A finished training: the plain model, its tokenizer, what changed, and how it went."""

    model: Any
    tokenizer: Any
    delta: Any
    history: list[dict[str, Any]]
    stats: dict[str, Any]
    card: str

    def save(self, folder: str | Path) -> Path:
        """Write a Hugging Face folder, whole or not at all; returns its path."""
        return save_model(folder, self.model, self.tokenizer, self.card)


def _tune(method: Tune, given: Mapping[str, Any]) -> TunedModel:
    ctx = _context(given, "apply")
    chosen = {**TRAINING, **{k: given[k] for k in TRAINING if k in given}}
    if chosen["train"] is None:
        raise LuthierError("'train' is missing", where=method.id, do="give train={'steps': 100}")
    spec = chosen["train"] if isinstance(chosen["train"], TrainSpec) else TrainSpec.of(chosen["train"])
    model = given["model"]
    source = model if isinstance(model, (tuple, Checkpoint, runner.NewModel)) else resolve(model)
    with tempfile.TemporaryDirectory(prefix="luthier-") as scratch:
        job = runner.Job(
            name="apply", method=method, roles={"model": source, "data": _data(given, ctx)}, out=Path(scratch),
            work=Path(given["folder"]) if "folder" in given else Path(scratch) / "saves", train=spec,
            objective=Objective.from_value(chosen["objective"]), optim=Optim.from_value(chosen["optim"]),
        )  # fmt: skip
        result, tokenizer = runner.trained(job, ctx)
    base = None if isinstance(model, runner.NewModel) else _named(model)
    text = model_card(_recipe_of(method, job, given), [method.id], base, _notes(model))
    return TunedModel(result.model, tokenizer, result.delta, result.history, result.stats, text)


def _entries(sources: list[Any]) -> dict[str, Any]:
    """Sources as the `data` of a recipe."""
    data: dict[str, Any] = {}
    for i, source in enumerate(sources):
        plain = source if isinstance(source, (str, Mapping)) else getattr(source, "name", type(source).__name__)
        data[f"data{i}"] = dict(plain) if isinstance(plain, Mapping) else {"source": plain}
    return data


def _recipe_of(method: Tune, job: Any, given: Mapping[str, Any]) -> str:
    """The training as a recipe, for the card; data that were given as objects stand by their names."""
    data = _entries(_list(given["data"]))
    model: Any = given["model"]
    if isinstance(model, runner.NewModel):
        trained = {"train": getattr(model.train_on, "name", None), "size": model.size}
        model = {"new": dict(model.config), "tokenizer": str(model.tokenizer) if model.tokenizer else trained}
    else:
        model = _named(model)
    step = method.to_dict() | {
        "model": model, "data": list(data), "train": job.train.to_dict(),
        "objective": job.objective.to_dict(), "optim": job.optim.to_dict(),
    }  # fmt: skip
    return to_yaml({"luthier": 1, "seed": given.get("seed", 0), "data": data, "steps": {"model": step}})


def _measure(method: Measure, given: Mapping[str, Any]) -> Any:
    ctx = _context(given, "apply")
    models, rest = _subjects(given), {k: v for k, v in given.items() if k in _roles(method)}
    job = runner.Job(
        name="apply", method=method, roles={"models": models, "data": _data(given, ctx)}, out=Path(), work=Path(),
        names={**rest, "models": [_named(m) for m in _list(given["models"])]}, dtype=_dtype(given),
    )  # fmt: skip
    return runner.measured(job, ctx)


@dataclass(frozen=True)
class Studied:
    """A finished search: the table of its trials and the candidate it chose."""

    table: Table
    chosen: Transform
    given: Mapping[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write the chosen model as a Hugging Face folder, whole or not at all; returns its path."""
        kept = {k: v for k, v in self.given.items() if k in _roles(self.chosen) or k in OPTIONS and k != "folder"}
        return _merge(self.chosen, kept).save(folder)


def _study(method: Study, given: Mapping[str, Any]) -> Studied:
    ctx = _context(given, "apply")
    spec = given.get("search") or {}
    base = given["base"] if isinstance(given["base"], Checkpoint) else resolve(given["base"])
    experts = [open_expert(e, base) for e in _list(given["experts"])] if given.get("experts") else []
    with tempfile.TemporaryDirectory(prefix="luthier-") as scratch:
        job = runner.Job(
            name="apply", method=method, out=Path(scratch), work=Path(given.get("folder", scratch)),
            roles={"base": base, "experts": experts, "data": _data(given, ctx)}, threads=given.get("threads"),
            search=spec if isinstance(spec, SearchSpec) else SearchSpec.of(spec),
        )  # fmt: skip
        table, chosen = runner.studied(job, ctx)
    return Studied(table, chosen, dict(given))


def _decode(method: Decode, given: Mapping[str, Any]) -> Any:
    ctx = _context(given, "apply")
    job = runner.Job(
        name="apply", method=method, roles={"models": _subjects(given), "prompts": _list(given["prompts"])},
        out=Path(), work=Path(), names={"models": [_named(m) for m in _list(given["models"])]}, dtype=_dtype(given),
    )  # fmt: skip
    return runner.decoded(job, ctx)


def _certify(method: Certify, given: Mapping[str, Any]) -> Any:
    return answered(method, given["problem"], _context(given, "apply"))


def _subjects(given: Mapping[str, Any]) -> list[Any]:
    return [m if isinstance(m, (tuple, Checkpoint)) else resolve(m) for m in _list(given["models"])]
