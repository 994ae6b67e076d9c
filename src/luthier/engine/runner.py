"""Carries out one step whose inputs are at hand: train, transform, measure or decode, and write what came of it.

Knows nothing of recipes, hashes or the ledger: `luthier.recipe_run` decides what is to be done and
records it, `luthier.engine.apply` uses the same functions from Python. The folder of a step appears
whole, with the record that the caller puts into it.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier.checkpoint.atomic import check_apart
from luthier.checkpoint.expert import open_expert
from luthier.checkpoint.writer import check_saveable, put_model, write_folder
from luthier.engine.certify_scale import answered
from luthier.engine.layout import PLAIN, Layout
from luthier.engine.spec import MEMORY, SearchSpec, TrainSpec
from luthier.engine.subject import Subject_, load, load_tokenizer
from luthier.errors import LuthierError, unknown
from luthier.flows import Data, Table, Trace
from luthier.kit.context import Context
from luthier.shapes import Certify, Decode, Measure, Method, Objective, Optim, Study, Transform, Tune

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class NewModel:
    """A model that does not exist yet: sizes and slots, and a tokenizer, given or trained."""

    config: Mapping[str, Any]
    tokenizer: Path | None = None
    train_on: Data | None = None
    size: int = 4096


@dataclass(frozen=True)
class Job:
    """One step, everything looked up. roles: to a Checkpoint or its list, Data or its list, or plain values."""

    name: str
    method: Method
    roles: Mapping[str, Any]
    out: Path
    work: Path
    names: Mapping[str, Any] = field(default_factory=dict)
    """role to the names under which the models are known in tables"""
    train: TrainSpec | None = None
    objective: Objective | None = None
    optim: Optim | None = None
    search: SearchSpec | None = None
    dtype: torch.dtype | None = None
    memory: int = MEMORY
    threads: int | None = None
    card: str = ""
    layout: Layout = PLAIN
    """of a Transform: slices of layers, and which vocabulary"""


@dataclass(frozen=True)
class Outcome:
    """What a step left. artefacts: what to a path inside the step's folder, "" for the folder itself."""

    metrics: Mapping[str, Any]
    artefacts: Mapping[str, str]
    notes: tuple[str, ...] = ()


Fill = Callable[[Path], Outcome]
"""Writes what a step gave into a folder."""


def execute(job: Job, ctx: Context, seal: Callable[[Path, Outcome], None] = lambda folder, outcome: None) -> Outcome:
    """Do the step and write its folder, whole or not at all. seal: adds what says that the step is done."""
    sources = [one for role in job.roles.values() for one in (role if isinstance(role, list | tuple) else [role])]
    check_apart(job.out, (s.path for s in sources if isinstance(getattr(s, "path", None), Path)))
    every = {
        Tune: _tune, Transform: _transform, Measure: _measure, Decode: _decode, Study: _study, Certify: _certify,
    }  # fmt: skip
    for shape, work in every.items():
        if isinstance(job.method, shape):
            fill = work(job, ctx)
            with write_folder(job.out) as folder:
                outcome = fill(folder)
                seal(folder, outcome)
            return outcome
    raise LuthierError(f"{job.method.id} is no step of its own", where=job.name)


def _tune(job: Job, ctx: Context) -> Fill:
    result, tokenizer = trained(job, ctx)
    check_saveable(result.model, job.out)

    def fill(folder: Path) -> Outcome:
        put_model(folder, result.model, tokenizer, job.card)
        (folder / "history.json").write_text(json.dumps(result.history, allow_nan=False))
        artefacts = {"model": "", "history": "history.json"}
        if getattr(result.delta, "kind", "dense") != "dense":  # a dense one is the model once more
            result.delta.save(folder / "delta")
            artefacts["delta"] = "delta"
        last = result.history[-1] if result.history else {}
        return Outcome({**result.stats, **{k: last[k] for k in ("loss",) if k in last}}, artefacts)

    return fill


def trained(job: Job, ctx: Context) -> tuple[Any, Any]:
    """(TrainResult, tokenizer) of a Tune step."""
    from luthier.engine.trainer import train

    if job.train is None or job.objective is None or job.optim is None:
        raise LuthierError("a Tune needs train, objective and optim", where=job.name)
    model, tokenizer = opened(job.roles["model"], ctx)
    data: Sequence[Data] = job.roles["data"]
    method: Any = job.method
    result = train(model, tokenizer, data, method, job.objective, job.optim, job.train, ctx, job.work)
    del model
    gc.collect()
    return result, tokenizer


def opened(source: Any, ctx: Context) -> tuple[Any, Any]:
    """(model, tokenizer) in memory, weights in the dtype they are stored in; a new model's in fp32."""
    if isinstance(source, NewModel):
        return _made(source, ctx)
    if isinstance(source, tuple):  # a live model and its tokenizer
        return source
    return load(source)


def _made(source: NewModel, ctx: Context) -> tuple[Any, Any]:
    from luthier.engine.tokenize import train_tokenizer
    from luthier.model.build import build_model

    if source.tokenizer is not None:
        tokenizer = load_tokenizer(source.tokenizer)
    else:
        assert source.train_on is not None
        texts = [t for item in source.train_on.train for t in (item.text, item.prompt, item.answer) if t]
        texts += [m["content"] for item in source.train_on.train for m in item.messages or ()]
        tokenizer = train_tokenizer(texts, source.size)
    ids = {k: getattr(tokenizer, k) for k in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = {**source.config, "vocab_size": len(tokenizer), **ids}
    return build_model(config, seed=ctx.key("weights")), tokenizer


def _study(job: Job, ctx: Context) -> Fill:
    table, chosen = studied(job, ctx)
    carry = _transform(replace(job, method=chosen), ctx)

    def fill(folder: Path) -> Outcome:
        outcome = carry(folder)
        (folder / "table.json").write_text(table.to_json())
        metrics = {**outcome.metrics, "trials": len(table.rows), "candidate": json.dumps(chosen.to_dict())}
        return Outcome(metrics, {**outcome.artefacts, "table": "table.json"}, (*outcome.notes, *table.notes))

    return fill


def studied(job: Job, ctx: Context) -> tuple[Table, Transform]:
    """The table of a Study step and the candidate it chose."""
    from luthier.engine.study import run_study

    method: Any = job.method
    roles = job.roles
    return run_study(
        method, roles["base"], roles.get("experts", ()), roles["data"], job.search or SearchSpec(), ctx, job.work,
        job.threads,
    )  # fmt: skip


def _transform(job: Job, ctx: Context) -> Fill:
    from luthier.engine.stream import put_transform

    def fill(folder: Path) -> Outcome:
        method: Any = job.method
        base, rest = job.roles.get("base", job.roles.get("model")), {**job.roles}
        for role in ("base", "model", "experts"):
            rest.pop(role, None)
        notes = put_transform(
            folder, method, base, job.roles.get("experts", ()), ctx.with_(roles=rest),
            memory=job.memory, threads=job.threads, dtype=job.dtype, card=job.card,
            layout=job.layout,
        )  # fmt: skip
        written: Any = open_expert(folder)
        return Outcome({"parameters": written.n_params, "bytes": written.nbytes}, {"model": ""}, notes)

    return fill


def _measure(job: Job, ctx: Context) -> Fill:
    table = measured(job, ctx)

    def fill(folder: Path) -> Outcome:
        (folder / "table.json").write_text(table.to_json())
        return Outcome({"rows": len(table.rows)}, {"table": "table.json"})

    return fill


def measured(job: Job, ctx: Context) -> Table:
    """The table of a Measure step."""
    method: Any = job.method
    rest = {name: job.names[name] for name in job.names if name not in ("models", "data")}
    return method.measure(subjects(job, ctx), job.roles["data"], ctx.with_(roles=rest))


def subjects(job: Job, ctx: Context) -> list[Any]:
    """The models of a step as Subjects, loaded only while they are looked at."""
    pairs = zip(job.names["models"], job.roles["models"], strict=True)
    return [Subject_(name, source, device=ctx.device, dtype=job.dtype) for name, source in pairs]


def _decode(job: Job, ctx: Context) -> Fill:
    prompts, trace = list(job.roles["prompts"]), decoded(job, ctx)
    stopped = trace.stopped or [None] * len(prompts)

    def fill(folder: Path) -> Outcome:
        with (folder / "trace.jsonl").open("w", encoding="utf-8") as file:
            for row in zip(prompts, trace.texts, trace.tokens, stopped, strict=True):
                file.write(json.dumps(dict(zip(("prompt", "text", "tokens", "stopped"), row, strict=True))) + "\n")
        cost = {"forwards": trace.forwards, "cache_bytes": trace.cache_bytes, "tokens": sum(map(len, trace.tokens))}
        return Outcome(cost, {"trace": "trace.jsonl"})

    return fill


def decoded(job: Job, ctx: Context) -> Trace:
    """The drained trace of a Decode step."""
    method: Any = job.method
    with ExitStack() as stack, torch.inference_mode():
        models = [stack.enter_context(subject.open()) for subject in subjects(job, ctx)]
        decoding = method.steps(models, list(job.roles["prompts"]), ctx)
        for _ in decoding:
            pass
        return decoding.trace()


def _certify(job: Job, ctx: Context) -> Fill:
    method: Any = job.method
    made = answered(method, job.roles["problem"], ctx)

    def fill(folder: Path) -> Outcome:
        (folder / "certificate.json").write_text(made.to_json())
        return Outcome({**made.numbers, "squares": len(made.squares)}, {"certificate": "certificate.json"})

    return fill


def device_of(word: str) -> torch.device:
    """The device a recipe names; `auto` takes an accelerator if there is one."""
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|mps|cuda)(:\d{1,3})?", word):
        raise unknown("device", word, ("auto", "cpu", "cuda", "cuda:0", "mps"))
    device = torch.device(word)
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type, lambda: True)()
    if not there or (device.index or 0) >= max(1, torch.cuda.device_count() if device.type == "cuda" else 1):
        raise LuthierError(f"there is no {word} here", where="hardware.device", do="use auto or cpu")
    return device
