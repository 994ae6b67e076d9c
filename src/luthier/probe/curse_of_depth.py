"""Curse of depth: how little a model's deep layers do: variance, angle, loss without them, Jacobian.

Paper: arXiv 2502.05795.  One row a layer and diagnostic, over the test items:

    variance   of the residual stream after the layer: over the channels, averaged over the tokens
    angular    angle between the stream before and after (`span` layers on), at each item's last token, in
               half turns (the paper takes it from arXiv 2403.17887)
    drop       how much the loss grows when the layer is skipped, nats a token
    jacobian   how far the layer's derivative is from the identity: ||J - I|| / ||I||, Frobenius

Rows have the columns model, data, metric, layer (from 0), value and n (items). Rows without a layer sum
up: the loss itself (`nll`), the ratio of the last layer's variance to the first one's (`variance growth`),
and the other diagnostics' means over the deeper half of the layers.

Notable. Nothing is deleted: layers are skipped and watched by hooks, which are gone afterwards. States are
the layers' own inputs and outputs. The Jacobian is that of the whole sequence, so attention between
tokens counts; its norm is estimated by one backward pass a probe (random signs keyed by item), unbiased
in the square.

Footguns. In large models a few tokens carry massive activations, and the mean variance is theirs. A small
angle does not make a layer dispensable: `probe.depth` says how far the two agree.
B: sequences, T: positions, D: channels, N: items, L: layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Generator, Tensor, nn

from luthier.checkpoint.roles import live_layers
from luthier.errors import LuthierError
from luthier.fields import Count, Range
from luthier.flows import Ctx, Data, Item, Subject, Table
from luthier.kit.depth import angular, skipping, watching
from luthier.kit.encode import Row, encode, pad_id
from luthier.kit.likelihood import by_length, on_device, summed_nll
from luthier.kit.logits import labelled
from luthier.shapes import Measure, Reduces

COLUMNS = ("model", "data", "metric", "layer", "value", "n")
Diagnostic = Literal["variance", "angular", "drop", "jacobian"]


class CurseOfDepth(Measure):
    """What each layer adds."""

    diagnostics: tuple[Diagnostic, ...] = ("variance", "angular", "drop", "jacobian")
    """what is measured; drop costs a pass a layer, jacobian a backward pass, the others nothing"""
    span: Count = 1
    """layers between the two states whose angle is taken"""
    probes: Count = 1
    """random vectors a token that the Jacobian's norm is estimated with"""
    max_items: Count | None = 64
    """how many test items are looked at, from the first on; null: all"""
    max_length: Annotated[int, Range(8)] | None = 256
    """tokens of an item at most; null: no limit"""
    batch: Count = 16
    """items that go through the model together"""

    reduces_to = Reduces({"diagnostics": []}, "mean of transformers.loss", tolerance=1e-5)
    departures = (
        "lmsdss/LayerNorm-Scaling 3ac54dd (utils/short_hf.py) pads every text to its full length on the right and"
        " takes the last position for the last token: for shorter texts the angular distances are those of padding"
        " (tests/golden/test_probe_curse_of_depth.py::test_released_code_looks_at_padding)",
        "lmsdss/LayerNorm-Scaling 3ac54dd (utils/short_hf.py) takes transformers' `hidden_states`, the last of which"
        " is the state after the final norm: the last layer's angular distance contains that norm's gain"
        " (tests/golden/test_probe_curse_of_depth.py::test_released_code_ends_after_the_final_norm)",
    )

    def passes(self, layers: int) -> float:
        return 1 + layers * ("drop" in self.diagnostics) + 3 * self.probes * ("jacobian" in self.diagnostics)

    def measure(self, models: Sequence[Subject], data: Sequence[Data], ctx: Ctx) -> Table:
        rows: list[tuple[Any, ...]] = []
        notes: dict[str, None] = {}
        for subject in models:
            with subject.open() as (model, tokenizer):
                if self.span > len(live_layers(model)):
                    notes[f"{subject.name}: no two states are {self.span} layers apart"] = None
                for source in data:
                    items, encoded = _items(source.test[: self.max_items], tokenizer, self.max_length)
                    if not items:
                        raise LuthierError(f"{source.name} has no test item with anything to predict", where=self.id)
                    sums = self._sums(model, items, encoded, pad_id(tokenizer), ctx, f"{subject.name} on {source.name}")
                    found = table(sums.means(encoded, self.diagnostics))
                    rows += [(subject.name, source.name, *row, len(items)) for row in found]
        return Table(COLUMNS, tuple(rows), tuple(notes))

    def _sums(
        self, model: nn.Module, items: Sequence[Item], rows: Sequence[Row], pad: int, ctx: Ctx, what: str
    ) -> _Sums:
        """All passes over all items."""
        layers = live_layers(model)
        sums = _Sums(len(layers), self.span)
        for places in ctx.progress(by_length(rows, self.batch), what=what):
            batch = [rows[i] for i in places]
            with watching(layers, partial(sums.look, batch)):
                sums.nll += sum(summed_nll(model, batch, pad))
            sums.close()
            for i in range(len(layers)) if "drop" in self.diagnostics else ():
                with skipping(layers, (i,)):
                    sums.without[i] += sum(summed_nll(model, batch, pad))
            for probe in range(self.probes) if "jacobian" in self.diagnostics else ():
                rngs = [ctx.rng("signs", items[i].id, probe) for i in places]
                _jacobian(model, layers, batch, pad, rngs, sums)
        return sums


def _items(items: Sequence[Item], tokenizer: Any, max_length: int | None) -> tuple[list[Item], list[Row]]:
    """The items that ask for any prediction, and their tokens."""
    told = [item for item in items if item.prompt is None or item.answer is not None]
    pairs = [(item, encode(item, tokenizer, max_length)) for item in told]
    return [item for item, row in pairs if row.count], [row for _, row in pairs if row.count]


class _Sums:
    """What adds up over the batches, a value a layer."""

    def __init__(self, layers: int, span: int):
        self.nll = self.identity = 0.0
        self.without, self.away, self.variance = ([0.0] * layers for _ in range(3))
        self.angle, self.span = [0.0] * max(0, layers - span + 1), span
        self.ends: list[Tensor] = []

    def look(self, rows: Sequence[Row], i: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
        """Take what is needed of one layer's input and output."""
        lengths = [len(row.input_ids) for row in rows]
        variance_BT = y_BTD.double().var(dim=-1, correction=0)
        self.variance[i] += sum(variance_BT[b, :n].sum().item() for b, n in enumerate(lengths))
        for z_BTD in (x_BTD, y_BTD)[i > 0 :]:  # the first layer's input, then every output
            self.ends.append(torch.stack([z_BTD[b, n - 1] for b, n in enumerate(lengths)]))

    def close(self) -> None:
        """Sum the angles of a batch whose states are all there."""
        for i in range(len(self.angle)):
            self.angle[i] += angular(self.ends[i], self.ends[i + self.span]).sum().item()
        self.ends.clear()

    def means(self, rows: Sequence[Row], wanted: Sequence[str]) -> dict[str, list[float]]:
        """{diagnostic: a value a layer}, with the loss under "nll"."""
        tokens, labels = sum(len(row.input_ids) for row in rows), sum(row.count for row in rows)
        found = {
            "variance": [v / tokens for v in self.variance],
            "angular": [a / len(rows) for a in self.angle],
            "drop": [(w - self.nll) / labels for w in self.without],
            "jacobian": [math.sqrt(a / self.identity) for a in self.away if self.identity],
        }
        return {"nll": [self.nll / labels]} | {name: found[name] for name in wanted if found[name]}


def table(found: dict[str, list[float]]) -> list[tuple[str, int | None, float]]:
    """(metric, layer, value): the sums first, then every layer of every diagnostic."""
    rows: list[tuple[str, int | None, float]] = [("nll", None, found["nll"][0])]
    values = {name: value_L for name, value_L in found.items() if name != "nll"}
    for name, value_L in values.items():
        half = value_L[len(value_L) // 2 :]
        if name == "variance":
            rows.append(("variance growth", None, value_L[-1] / value_L[0]))
        else:
            rows.append((f"{name}, deeper half", None, sum(half) / len(half)))
    return rows + [(name, i, value) for name, value_L in values.items() for i, value in enumerate(value_L)]


def _jacobian(
    model: nn.Module, layers: Sequence[nn.Module], rows: Sequence[Row], pad: int, rngs: Sequence[Generator], sums: _Sums
) -> None:
    """Add ||J'v - v||^2 of each layer and ||v||^2, for v of random signs on the real tokens."""
    held: list[Tensor] = []

    def look(i: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
        if not held:
            held.append(_signs(rows, rngs, x_BTD))
        (pulled_BTD,) = torch.autograd.grad(y_BTD, x_BTD, held[0])
        sums.away[i] += (pulled_BTD - held[0]).double().square().sum().item()

    with torch.enable_grad(), watching(layers, look, leaves=True):
        labelled(model, on_device(rows, pad, model))
    sums.identity += held[0].double().square().sum().item()


def _signs(rows: Sequence[Row], rngs: Sequence[Generator], like_BTD: Tensor) -> Tensor:
    """Random signs of each row's own generator, zero on the padding."""
    v_BTD = torch.zeros_like(like_BTD)
    for b, (row, rng) in enumerate(zip(rows, rngs, strict=True)):
        drawn_TD = torch.randint(2, (len(row.input_ids), like_BTD.shape[2]), generator=rng)
        v_BTD[b, : len(drawn_TD)] = (2 * drawn_TD - 1).to(v_BTD)
    return v_BTD
