"""The experiment that claims about Tunes share: the bundled 135M model learns sums of two-digit numbers.

All arms of a seed see the same items in the same order (the order is keyed by the seed), in fp32,
with AdamW. `loss`: nats a token of the answers to 64 held-out tasks. `kept`: nats a
token of 16 windows of Python source, which nobody trains on. The format-only control trains on the same
tasks with each other's answers. The weights are dequantised Q4_1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from luthier.catalogue import load
from luthier.checkpoint.resolve import resolve
from luthier.engine import subject
from luthier.engine.data import open_data
from luthier.engine.spec import TrainSpec
from luthier.engine.trainer import train
from luthier.fields import FrozenMap
from luthier.kit.context import Context

SUMS: dict[str, Any] = {
    "source": "gym:chain_sum", "set": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "split": {"by": "hash", "train": 1000, "test": 64},
}  # fmt: skip
CODE: dict[str, Any] = {"source": "text:stdlib", "split": {"by": "file", "train": 8, "test": 16}, "set": {"chars": 400}}
STEPS, BATCH, RATE = 12, 8, 3e-4


def arm(
    seed: int, ctx: Context, tune: str, answers: str = "true", rate: float = RATE, **fields: Any
) -> dict[str, float]:
    """One trained arm: `loss`, `kept`, `entries` that train, `bytes` of optimizer state, `tokens` seen."""
    return dict(_arm(seed, ctx.cache, tune, answers, rate, FrozenMap(fields)))


@cache
def base() -> Mapping[str, float]:
    """`loss` and `kept` of the model as it comes."""
    model, tokenizer = subject.load(resolve("smollm2"))
    return _tested(model.float(), tokenizer)


@cache
def _arm(
    seed: int, cache: Path | None, tune: str, answers: str, rate: float, fields: Mapping[str, Any]
) -> Mapping[str, float]:
    model, tokenizer = subject.load(resolve("smollm2"))
    ctx = Context(seed=seed, step="claim", cache=cache)
    data: Any = open_data("sums", {**SUMS, "answers": answers}, ctx)
    spec = TrainSpec(steps=STEPS, batch=BATCH, lr=rate, schedule="linear", warmup=2, dtype="fp32", max_length=128)
    method, objective, optim = load(tune, **fields), load("objective.next_token"), load("optim.adamw")
    with tempfile.TemporaryDirectory() as folder:
        done = train(model, tokenizer, data, method, objective, optim, spec, ctx, Path(folder))
    stats = done.stats
    return {
        **_tested(done.model, tokenizer), "entries": stats["trainable"], "bytes": stats["optimizer_state_bytes"],
        "tokens": stats["tokens"],
    }  # fmt: skip


def _tested(model: Any, tokenizer: Any) -> dict[str, float]:
    ctx = Context(step="claim")
    data: Any = [open_data("sums", SUMS, ctx), open_data("code", CODE, ctx)]
    table = load("eval.perplexity").measure([subject.Subject_("it", model, tokenizer)], data, ctx)
    found = {}
    for name, key in (("sums", "loss"), ("code", "kept")):
        rows = table.where(data=name)
        found[key] = sum(r["value"] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows)
    return found
