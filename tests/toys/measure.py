"""Toy loss: the mean negative log-likelihood of each answer.

Paper: none (made for the tests).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from luthier.fields import Count
from luthier.flows import Ctx, Data, Subject, Table
from luthier.kit.encode import collate, encode
from luthier.shapes import Measure, Reduces


class Toy(Measure):
    max_items: Count | None = None
    """how many items to look at"""

    reduces_to = Reduces({}, "transformers.loss", tolerance=1e-5)

    def measure(self, models: Sequence[Subject], data: Sequence[Data], ctx: Ctx) -> Table:
        rows = []
        for subject in models:
            with subject.open() as (model, tokenizer), torch.no_grad():
                for source in data:
                    for item in list(source.test)[: self.max_items]:
                        row = encode(item, tokenizer)
                        loss = float(model(**collate([row], 0, 1)).loss)
                        rows.append({"model": subject.name, "data": source.name, "item": item.id, "metric": "nll",
                                     "value": loss, "tokens": row.count})  # fmt: skip
        return Table.from_dicts(rows)
