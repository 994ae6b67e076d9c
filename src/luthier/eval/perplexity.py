"""Perplexity: negative log-likelihood of held-out items, in nats a token, one row an item.

Paper: none (maximum likelihood).

Rows have the columns model, data, item, metric ("nll"), value and tokens. Text is scored on every token but
the first, a task on its answer and the end-of-sequence token, a conversation on the assistant's turns.
perplexity = exp(sum(value * tokens) / sum(tokens)).

Notable. Logits exist only where there is a label, some stretches at a time, and the likelihood is summed in
fp32. The batches depend on the items alone, so models with one tokenizer see the same ones and their
differences are exactly paired.

Footguns. Values of models with different tokenizers do not compare. Items longer than `max_length` are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from torch import nn

from luthier.fields import Count, Range
from luthier.flows import Ctx, Data, Item, Subject, Table
from luthier.kit.encode import encode, pad_id
from luthier.kit.likelihood import by_length, summed_nll
from luthier.shapes import Measure, Reduces

COLUMNS = ("model", "data", "item", "metric", "value", "tokens")


class Perplexity(Measure):
    """Mean negative log-likelihood a token, item by item."""

    max_items: Count | None = None
    """how many test items are looked at, from the first on; null: all"""
    max_length: Annotated[int, Range(8)] | None = 1024
    """tokens of an item at most; null: no limit"""
    batch: Count = 16
    """items that go through the model together"""

    reduces_to = Reduces({"batch": 1}, "transformers.loss", tolerance=1e-5)

    def measure(self, models: Sequence[Subject], data: Sequence[Data], ctx: Ctx) -> Table:
        rows: list[tuple[Any, ...]] = []
        for subject in models:
            with subject.open() as (model, tokenizer):
                for source in data:
                    rows += self._of(subject.name, model, tokenizer, source, ctx)
        return Table(COLUMNS, tuple(rows))

    def _of(self, name: str, model: nn.Module, tokenizer: Any, source: Data, ctx: Ctx) -> list[tuple[Any, ...]]:
        items = [item for item in source.test[: self.max_items] if _labelled(item)]
        encoded = [encode(item, tokenizer, self.max_length) for item in items]
        batches = by_length(encoded, self.batch)
        nll: dict[int, float] = {}
        for places in ctx.progress(batches, what=f"{name} on {source.name}"):
            sums = summed_nll(model, [encoded[i] for i in places], pad_id(tokenizer))
            nll.update(zip(places, sums, strict=True))
        return [
            (name, source.name, item.id, "nll", nll[i] / row.count, row.count)
            for i, (item, row) in enumerate(zip(items, encoded, strict=True))
            if row.count
        ]


def _labelled(item: Item) -> bool:
    """Whether the item has anything to predict: a task without a known answer has not."""
    return item.prompt is None or item.answer is not None
