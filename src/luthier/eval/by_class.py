"""By class: accuracy in the classes that items are of, beside what a draw, the commonest answer and proofs reach.

Paper: none (the tables by class of arXiv 2502.20545).

Rows have the columns model, data, class, metric ("accuracy"), value and items. An item's class is what its source says
under `by` in its `meta`; "all", which comes first, are all of a source's items. The notes hold the classes as lines.
Beside the models stand

    chance      expected accuracy of an answer drawn from those of the training items
    majority    the commonest answer of the training items
    proofs      with `beside`: a Certify that is given each item's `meta.problem`. A proven sum of squares is a Yes,
                a proven refutation a No; undecided counts half. Rows of the metric "decided" give the proven share

Footguns. A class may have one true answer only: `majority` is then 0 or 1 in it, and so is a model that always says
the same. Compare classes together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.fields import Count
from luthier.flows import Ctx, Data, Item, Subject, Table
from luthier.kit.sos1k import truth
from luthier.shapes import Certify, Measure, Reduces

COLUMNS = ("model", "data", "class", "metric", "value", "items")
ALL = "all"


class ByClass(Measure):
    """The share of right answers in each class."""

    by: str = "class"
    """what of an item's `meta` names its class"""
    accuracy: Measure = "eval.accuracy"  # type: ignore[assignment]
    """how answers are got and scored, item by item"""
    beside: Certify | None = None
    """proofs to stand beside the models; null: none"""
    max_items: Count | None = None
    """how many test items are looked at, from the first on; null: all"""

    reduces_to = Reduces({}, "greedy answers and a draw", given={"models": 2})

    def measure(self, models: Sequence[Subject], data: Sequence[Data], ctx: Ctx) -> Table:
        sources = [_Fewer(source, self.max_items) for source in data]
        seen = self.accuracy.measure(models, sources, ctx)
        rows: list[tuple[Any, ...]] = []
        for source in sources:
            if not source.scored:
                continue
            for name in dict.fromkeys(row["model"] for row in seen.where(data=source.name)):
                right = {row["item"]: row["value"] for row in seen.where(data=source.name, model=name)}
                rows += self._rows(name, source, "accuracy", right)
            for name, right in _dumb(source).items():
                rows += self._rows(name, source, "accuracy", right)
            rows += self._proofs(source, ctx)
        return Table(COLUMNS, tuple(rows), (*seen.notes, *_listed(rows)))

    def _proofs(self, source: Data, ctx: Ctx) -> list[tuple[Any, ...]]:
        if self.beside is None:
            return []
        right, decided = {}, {}
        items = [item for item in source.test if "problem" in item.meta]
        for item in ctx.progress(items, what=f"{self.beside.id} on {source.name}"):
            said = truth(self.beside.certify(item.meta["problem"], ctx))
            decided[item.id] = float(said is not None)
            right[item.id] = 0.5 if said is None else float(source.score(item, "Yes" if said else "No") >= 1)
        name = self.beside.id
        return self._rows(name, source, "accuracy", right) + self._rows(name, source, "decided", decided)

    def _rows(self, name: str, source: Data, metric: str, value: Mapping[str, float]) -> list[tuple[Any, ...]]:
        """One row of all items, and one a class that they are of."""
        items = [item for item in source.test if item.id in value]
        groups: dict[str, list[float]] = {ALL: [value[item.id] for item in items]} if items else {}
        for item in items:
            if self.by in item.meta:
                groups.setdefault(str(item.meta[self.by]), []).append(value[item.id])
        return [
            (name, source.name, kind, metric, math.fsum(values) / len(values), len(values))
            for kind, values in groups.items()
        ]


def _listed(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """A line a class for the notes: of every model its accuracies on the sources in order."""
    of = {row[:3]: row[4] for row in rows if row[3] == "accuracy"}
    models, sources, classes = (list(dict.fromkeys(key[i] for key in of)) for i in range(3))
    lines = [f"by class, on {' / '.join(sources)}, in percent"] if len(classes) > 1 else []
    for kind in classes[1:]:
        shares = []
        for model in models:
            values = [of.get((model, source, kind)) for source in sources]
            shares.append(f"{model} {' / '.join('-' if v is None else f'{100 * v:.0f}' for v in values)}")
        lines.append(f"{kind}: {', '.join(shares)}")
    return lines


def _dumb(source: Data) -> dict[str, dict[str, float]]:
    """What the training items' answers alone give, item by item."""
    answers = Counter(item.answer for item in source.train)
    if not answers:
        return {}
    total, (common, _) = sum(answers.values()), answers.most_common(1)[0]
    return {
        "chance": {item.id: answers[item.answer] / total for item in source.test},
        "majority": {item.id: float(item.answer == common) for item in source.test},
    }


class _Fewer:
    """A source of which the first test items alone are looked at."""

    def __init__(self, source: Data, most: int | None):
        self.name, self.scored, self._source, self._most = source.name, source.scored, source, most

    @property
    def train(self) -> Sequence[Item]:
        return self._source.train

    @property
    def test(self) -> Sequence[Item]:
        return self._source.test[: self._most]

    def score(self, item: Item, output: str) -> float:
        return self._source.score(item, output)
