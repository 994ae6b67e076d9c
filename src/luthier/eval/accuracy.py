"""Accuracy: the share of tasks answered right, after decoding and answer extraction, one row an item.

Paper: none (exact match by the source's own scorer).

Rows have the columns model, data, item, metric ("accuracy"), value (1 right, 0 wrong) and tokens (generated).
The prompt goes through the tokenizer's chat template if it has one; what the model says is scored by the
data, which finds the answer in it first. Data without scored answers give no rows.

Notable. A family that gives part of a point for a wrong answer counts it as wrong. Prompts are batched by length;
what all of a batch share, a system prompt say, is computed once.

Footguns. Accuracy sees format and content together: train on `answers: shuffled` for a control that learns
the format only. More shots make some small models worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from luthier.errors import LuthierError
from luthier.fields import Count, Natural
from luthier.flows import Ctx, Data, Subject, Table
from luthier.kit.decoding import limited
from luthier.kit.encode import prompt_ids
from luthier.shapes import Decode, Measure, Reduces

COLUMNS = ("model", "data", "item", "metric", "value", "tokens")


class Accuracy(Measure):
    """The share of right answers, item by item."""

    max_items: Count | None = None
    """how many test items are looked at, from the first on; null: all"""
    max_new_tokens: Count = 32
    """tokens a model may answer with"""
    batch: Count = 64
    """prompts that are decoded together"""
    shots: Natural = 0
    """solved training items that stand before each prompt"""
    decode: Decode = "decode.sample"  # type: ignore[assignment]
    """how answers are decoded; greedy by default"""

    reduces_to = Reduces({"batch": 1}, "transformers.greedy")

    def measure(self, models: Sequence[Subject], data: Sequence[Data], ctx: Ctx) -> Table:
        scored = [source for source in data if source.scored]
        notes = [f"{source.name} has no scored answers: no accuracy" for source in data if not source.scored]
        rows: list[tuple[Any, ...]] = []
        for subject in models if scored else ():
            with subject.open() as (model, tokenizer):
                for source in scored:
                    rows += self._of(subject.name, model, tokenizer, source, ctx)
        return Table(COLUMNS, tuple(rows), tuple(notes))

    def _of(self, name: str, model: nn.Module, tokenizer: Any, source: Data, ctx: Ctx) -> list[tuple[Any, ...]]:
        items = source.test[: self.max_items]
        shots = source.train[: self.shots] if self.shots else ()
        if len(shots) < self.shots:
            raise LuthierError(f"{source.name} has {len(shots)} training items", where=f"{self.id}.shots")
        prompts = [prompt_ids(item, tokenizer, shots) for item in items]
        order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
        batches = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        decode = limited(self.decode, self.max_new_tokens)
        found: dict[int, tuple[float, int]] = {}
        for places in ctx.progress(batches, what=f"{name} on {source.name}"):
            decoding = decode.steps([(model, tokenizer)], [prompts[i] for i in places], ctx)
            for _ in decoding:
                pass
            trace = decoding.trace()
            for i, text, tokens in zip(places, trace.texts, trace.tokens, strict=True):
                found[i] = (float(source.score(items[i], text) >= 1.0), len(tokens))
        return [(name, source.name, item.id, "accuracy", *found[i]) for i, item in enumerate(items)]
