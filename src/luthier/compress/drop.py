"""Drop: layers of one model taken away, chosen by a rule that needs no search.

Paper: arXiv 2403.03853.  Four published rules, and two dumb ones to hold them against:

- `influence` (ShortGPT, the paper named): a layer matters by 1 - cos(h_l, h_l+1), the mean over tokens of how far it
  turns the residual stream; the least influential ones go, all from one pass over the items.
- `angular` (arXiv 2403.17887): the block of n neighbouring layers across which the last token's state turns least.
- `loss` (SLEB, arXiv 2402.09025): one layer a round, the one without which the loss is lowest; first and last stay.
- `last` and `random`: the layers before the last one; any layers but the first and last, by the seed.

Notable. Every rule is judged by the same training items as a search would be, and each judged model is a row of the
table. Footguns: all of them look at likelihood or at states, and a model that still predicts text well may have
lost the ability to compute: measure by generation, too. `loss` needs about n times as many looks as there are layers.

B: rows.  T: positions.  D: channels.  N: tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from luthier.checkpoint.roles import live_layers
from luthier.errors import LuthierError
from luthier.fields import Count, Range
from luthier.flows import Budget, Ctx, Evaluate, Space, Table
from luthier.kit.calibrate import drawn
from luthier.kit.depth import angular, watching
from luthier.kit.encode import Row, pad_id
from luthier.kit.genome import of_base
from luthier.kit.likelihood import by_length, on_device
from luthier.kit.logits import labelled
from luthier.shapes import Reduces, Study

BATCH = 8
"""Items that go through the model together while states are watched."""


class Drop(Study):
    layers: Annotated[int, Range(0)] = 1
    """how many layers go"""
    by: Literal["influence", "angular", "loss", "last", "random"] = "influence"
    """the rule that chooses them"""
    examples: Count = 32
    """training items of each data that `influence` and `angular` watch states on"""
    max_length: Annotated[int, Range(8)] = 512
    """tokens of such an item at most"""

    makes = ("compress.stitch",)
    proposes = False
    roles = ("base", "data*")
    reduces_to = Reduces({"layers": 0}, "base")

    def fits(self, space: Space, objectives: Sequence[str] = ()) -> None:
        most = max(0, min(space.layers - 2 * (self.by in ("loss", "random", "last")), space.layers - 1))
        if self.layers > most:
            what = f"{self.layers} layers cannot go from {space.layers}"
            raise LuthierError(what, where=f"{self.id}.layers", do=f"drop {most} at most")

    def leaves(self, layers: int) -> int:
        return layers - self.layers

    def least(self, layers: int) -> int:
        looks = self.layers * (layers - 2) if self.by == "loss" else 1
        return max(0, looks)

    def study(self, space: Space, evaluate: Evaluate, budget: Budget, ctx: Ctx) -> Table:
        kept = list(range(space.layers))
        notes: list[str] = []
        if self.layers and self.by == "loss":
            kept = self._greedy(kept, evaluate, ctx)
        elif self.layers:
            gone = self._chosen(space, evaluate, ctx, notes)
            kept = [layer for layer in kept if layer not in gone]
        evaluate(of_base(kept))
        gone = sorted(set(range(space.layers)) - set(kept))
        return evaluate.table(of_base(kept), (f"{self.by}: layers {gone} go", *notes))

    def _greedy(self, kept: list[int], evaluate: Evaluate, ctx: Ctx) -> list[int]:
        """One layer a round, the one whose absence costs least; of equals the first."""
        for gone in range(self.layers):
            tried = [[k for k in kept if k != layer] for layer in kept[1:-1]]
            total = len(tried)
            costs = [sum(evaluate(of_base(one)) or ()) for one in ctx.progress(tried, total, f"round {gone + 1}")]
            kept = tried[costs.index(min(costs))]
        return kept

    def _chosen(self, space: Space, evaluate: Evaluate, ctx: Ctx, notes: list[str]) -> set[int]:
        inner = range(1, space.layers - 1)
        if self.by == "last":
            return set(inner[len(inner) - self.layers :])
        if self.by == "random":
            order = torch.randperm(len(inner), generator=ctx.rng("layers")).tolist()
            return {inner[i] for i in order[: self.layers]}
        turned = self._turned(space, evaluate, ctx)
        notes.append("turned: " + ", ".join(f"{value:.4f}" for value in turned))
        if self.by == "influence":
            return set(sorted(range(space.layers), key=lambda layer: turned[layer])[: self.layers])
        start = turned.index(min(turned))
        return set(range(start, start + self.layers))

    def _turned(self, space: Space, evaluate: Evaluate, ctx: Ctx) -> list[float]:
        """How far each layer (`influence`), or each block of them by its first (`angular`), turns the stream."""
        span = 1 if self.by == "influence" else self.layers
        total = torch.zeros(space.layers - span + 1, dtype=torch.float64)
        count = 0
        with evaluate.open(of_base(range(space.layers))) as (model, tokenizer), torch.inference_mode():
            layers = live_layers(model)
            for source in ctx.role("data"):
                rows = [row for _, row in drawn(source, tokenizer, self.examples, self.max_length, ctx)]
                for places in by_length(rows, BATCH):
                    batch = [rows[i] for i in places]
                    states = _states(model, layers, batch, pad_id(tokenizer), last=self.by == "angular")
                    total += torch.stack([self._distance(x, y) for x, y in zip(states, states[span:], strict=False)])
                    count += len(states[0])
        return (total / count).tolist()

    def _distance(self, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        if self.by == "angular":
            return angular(x_ND, y_ND).sum().cpu()
        return (1 - torch.cosine_similarity(x_ND.double(), y_ND.double(), dim=-1)).sum().cpu()


def _states(model: Any, layers: Sequence[Any], rows: Sequence[Row], pad: int, last: bool) -> list[Tensor]:
    """The residual stream before each layer and after the last one, at every real token or at the last of each row."""
    found: list[Tensor] = []
    lengths = [len(row.input_ids) for row in rows]

    def look(place: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
        for z_BTD in (x_BTD, y_BTD)[place > 0 :]:
            found.append(torch.cat([z_BTD[b, n - 1 if last else 0 : n] for b, n in enumerate(lengths)]))

    with watching(layers, look):
        labelled(model, on_device(rows, pad, model))
    return found
