"""Perplexity: negative log-likelihood of held-out items, in nats a token, one row an item.

Paper: none (maximum likelihood).

Rows have the columns model, data, item, metric ("nll"), value and tokens. Text is scored on every token but
the first, a task on its answer and the end-of-sequence token, a conversation on the assistant's turns.
perplexity = exp(sum(value * tokens) / sum(tokens)).

Notable. Logits exist only where there is a label, some stretches at a time, and the likelihood is summed in
fp32. The batches depend on the items alone, so models with one tokenizer see the same ones and their
differences are exactly paired.

Footguns. Values of models with different tokenizers do not compare. Items longer than `max_length` are cut.
N labelled places, D channels, B rows of a batch, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.fields import Count, Range
from luthier.flows import Ctx, Data, Item, Subject, Table
from luthier.kit.encode import IGNORE, Row, collate, encode, pad_id
from luthier.kit.logits import labelled
from luthier.shapes import Measure, Reduces

COLUMNS = ("model", "data", "item", "metric", "value", "tokens")
PLACES = 1024
"""Labelled places whose logits exist at once."""


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
        order = sorted(range(len(items)), key=lambda i: len(encoded[i].input_ids))
        batches = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        nll = [0.0] * len(items)
        for places in ctx.progress(batches, what=f"{name} on {source.name}"):
            sums = summed_nll(model, [encoded[i] for i in places], pad_id(tokenizer))
            for i, total in zip(places, sums, strict=True):
                nll[i] = total
        return [
            (name, source.name, item.id, "nll", total / row.count, row.count)
            for item, row, total in zip(items, encoded, nll, strict=True)
            if row.count
        ]


@torch.no_grad()
def summed_nll(model: nn.Module, rows: Sequence[Row], pad: int) -> list[float]:
    """The summed negative log-likelihood of each row's labels, in nats."""
    device = next(model.parameters()).device
    batch: Mapping[str, Tensor] = {k: v.to(device) for k, v in collate(rows, pad).items()}
    seen = labelled(model, batch)
    row_N = (batch["labels"][:, 1:] != IGNORE).nonzero()[:, 0]
    nll_N = torch.cat([
        F.cross_entropy(seen.head(h_ND).float(), y_N, reduction="none")
        for h_ND, y_N in zip(seen.h_ND.split(PLACES), seen.y_N.split(PLACES), strict=True)
    ])  # fmt: skip
    return torch.zeros(len(rows), dtype=torch.float64).index_add(0, row_N.cpu(), nll_N.double().cpu()).tolist()


def _labelled(item: Item) -> bool:
    """Whether the item has anything to predict: a task without a known answer has not."""
    return item.prompt is None or item.answer is not None
