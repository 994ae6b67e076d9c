"""Depth: skips layers one by one, or in ranges, and looks at what is lost, by protocols side by side.

Paper: arXiv 2510.02091.  The protocols, on the same items and the same skipped layers:

    nll           loss on the right answer (on the whole, for plain text), nats a token; any data
    likelihood    the prompt lists lettered options; the share of items whose right letter is likeliest
    continuation  the share of items where the right answer's text is likelier than the other options'
    generation    the share of items answered right by decoding, as the data score it
    angular       angle between the stream before and after the layers, at the last token of the same rows

Rows have the columns model, data, metric, layer, last (the range's ends, from 0), value, change, error and
n. The change is to the whole model, on the same items, error its standard error. Rows without a layer are
the whole model's; `rank of angular by METRIC` is Spearman's correlation, over the ranges, between the
angle and the harm done: at 1 the angle would choose the layers to remove as well as trying does.

Notable. Nothing is deleted: a skipped layer hands on what it is given. It still runs, so every cache entry
is where it would be, for any host; hence decoding under a skip equals that of a model without the layer.
The wrong options are other items' answers, drawn by item.

Footguns. Protocols disagree: a layer that does not matter to one may be vital to another. A small model is at
chance with letters, so nothing there can be lost. Angle and harm are of this data.
B: sequences, T: positions, D: channels, N: rows, V: words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from luthier.checkpoint.roles import live_layers
from luthier.errors import LuthierError
from luthier.fields import Count, Range
from luthier.flows import Ctx, Data, Item, Subject, Table
from luthier.kit.decoding import limited
from luthier.kit.depth import angular, skipping, watching
from luthier.kit.encode import Row, encode, pad_id, prompt_ids
from luthier.kit.likelihood import by_length, on_device, summed_nll
from luthier.kit.logits import labelled
from luthier.kit.stats import spearman
from luthier.shapes import Decode, Measure, Reduces

COLUMNS = ("model", "data", "metric", "layer", "last", "value", "change", "error", "n")
RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Protocol = Literal["nll", "likelihood", "continuation", "generation"]
Scores = list[tuple[float, float]]
"""(sum, weight) of each item; a value is the sum of sums over the sum of weights"""


class Depth(Measure):
    """What is lost without some layers."""

    protocols: tuple[Protocol, ...] = ("nll", "likelihood", "continuation", "generation")
    """what is asked of the model, where the data allow it"""
    skip: tuple[str, ...] | None = None
    """ranges of layers to skip, such as "3", "4-9" or "-2--1" (the last two); null: each layer by itself"""
    options: Annotated[int, Range(2, 26)] = 4
    """how many answers there are to choose among, the right one included"""
    max_items: Count | None = 32
    """how many test items are looked at, from the first on; null: all"""
    max_length: Annotated[int, Range(8)] | None = 512
    """tokens of an item at most; null: no limit"""
    max_new_tokens: Count = 32
    """tokens a model may answer with"""
    batch: Count = 32
    """rows that go through the model together"""
    decode: Decode = "decode.sample"  # type: ignore[assignment]
    """how answers are generated; greedy by default"""

    reduces_to = Reduces({"skip": [], "protocols": ["nll"]}, "mean of transformers.loss", tolerance=1e-5)
    departures = (
        "Hik289/llm-layer-importance 3a22cc1 and lmsdss/LayerNorm-Scaling 3ac54dd (layer_remove.py) delete several"
        " layers by index in ascending order without shifting: asked for layers 3 and 4 they remove 3 and 5, so"
        " results for ranges are of other layers (tests/golden/test_probe_depth.py::test_released_code_removes_others)",
    )

    def check(self) -> None:
        for text in self.skip or ():
            if not RANGE.fullmatch(text):
                raise LuthierError(f"{text!r} is no range of layers", where=f"{self.id}.skip", do='write "3" or "4-9"')

    def passes(self, layers: int) -> float:
        each = {"nll": 1, "likelihood": 1, "continuation": self.options, "generation": 2}
        return 1 + (1 + len(self._ranges(layers))) * sum(each[p] for p in self.protocols)

    def measure(self, models: Sequence[Subject], data: Sequence[Data], ctx: Ctx) -> Table:
        rows: list[tuple[Any, ...]] = []
        notes: dict[str, None] = {}
        for subject in models:
            with subject.open() as (model, tokenizer):
                for source in data:
                    asked = _Asked(self, model, tokenizer, source, ctx)
                    found, said = self._of(asked, f"{subject.name} on {source.name}")
                    rows += [(subject.name, source.name, *row) for row in found]
                    notes |= dict.fromkeys(f"{source.name}: {note}" for note in asked.notes)
                    notes |= dict.fromkeys(f"{subject.name} on {source.name}: {note}" for note in said)
        return Table(COLUMNS, tuple(rows), tuple(notes))

    def _of(self, asked: _Asked, what: str) -> tuple[list[tuple[Any, ...]], list[str]]:
        """Rows without model and data, and remarks."""
        layers = asked.layers
        ranges = [self._range(text, len(layers)) for text in self._ranges(len(layers))]
        whole = {protocol: asked.scores(protocol) for protocol in asked.protocols}
        rows: list[tuple[Any, ...]] = [(p, None, None, _mean(s), None, None, len(s)) for p, s in whole.items()]
        harm: dict[str, list[float]] = {protocol: [] for protocol in whole}
        angles = asked.angles(ranges) if ranges else []
        body: list[tuple[Any, ...]] = []
        for (first, last), angle in asked.ctx.progress(list(zip(ranges, angles, strict=True)), what=what):
            with skipping(layers, range(first, last + 1)):
                for protocol, before in whole.items():
                    after = asked.scores(protocol)
                    change, error = _paired(after, before)
                    harm[protocol].append(change if protocol == "nll" else -change)
                    body.append((protocol, first, last, _mean(after), change, error, len(after)))
            body.append(("angular", first, last, angle, None, None, len(asked.rows)))
        notes = []
        for protocol, values in harm.items():
            rank = spearman(angles, values) if len(ranges) > 2 else None
            if rank is not None:
                rows.append((f"rank of angular by {protocol}", None, None, rank, None, None, len(ranges)))
                notes.append(_remark(protocol, ranges, values, angles))
        return rows + body, notes

    def _ranges(self, layers: int) -> tuple[str, ...]:
        return tuple(map(str, range(layers))) if self.skip is None else self.skip

    def _range(self, text: str, layers: int) -> tuple[int, int]:
        found = RANGE.fullmatch(text)
        assert found
        ends = [int(end if end is not None else found[1]) for end in found.groups()]
        first, last = (end + layers if end < 0 else end for end in ends)
        if not 0 <= first <= last < layers:
            raise LuthierError(f"there are no layers {text} of {layers}", where=f"{self.id}.skip")
        return first, last


class _Choice(NamedTuple):
    """An item's options, and which is right."""

    texts: list[str]
    right: int


class _Asked:
    """One model asked about one source: everything that is the same whatever is skipped."""

    def __init__(self, method: Depth, model: nn.Module, tokenizer: Any, source: Data, ctx: Ctx):
        self.method, self.model, self.tokenizer, self.source, self.ctx = method, model, tokenizer, source, ctx
        self.layers, self.pad = live_layers(model), pad_id(tokenizer)
        items = [item for item in source.test[: method.max_items] if item.prompt is None or item.answer is not None]
        pairs = [(item, encode(item, tokenizer, method.max_length)) for item in items]
        self.items, self.rows = [i for i, row in pairs if row.count], [row for _, row in pairs if row.count]
        if not self.items:
            raise LuthierError(f"{source.name} has no test item with anything to predict", where=method.id)
        self.notes: list[str] = []
        self.protocols = self._possible()

    def _possible(self) -> list[str]:
        """The protocols that this source allows."""
        tasks = all(item.prompt is not None for item in self.items)
        answers = list(dict.fromkeys(item.answer for item in self.source.test if item.answer is not None))
        allowed = {"nll": True, "likelihood": tasks and len(answers) > 1, "generation": self.source.scored}
        allowed["continuation"] = allowed["likelihood"]
        if allowed["likelihood"]:
            self.choices = [self._choice(item, answers) for item in self.items]
        refused = [p for p in self.method.protocols if not allowed[p]]
        self.notes += [f"no {p}: there is nothing to choose or to score" for p in refused]
        return [p for p in self.method.protocols if allowed[p]]

    def _choice(self, item: Item, answers: Sequence[str]) -> _Choice:
        others = [a for a in answers if a != item.answer]
        rng = self.ctx.rng("options", item.id)
        drawn = torch.randperm(len(others), generator=rng)[: self.method.options - 1].tolist()
        right = int(torch.randint(len(drawn) + 1, (), generator=rng))
        texts = [others[i] for i in drawn]
        return _Choice([*texts[:right], str(item.answer), *texts[right:]], right)

    def scores(self, protocol: str) -> Scores:
        return getattr(self, f"_{protocol}")()

    def _nll(self) -> Scores:
        return [(nll, row.count) for nll, row in zip(self._summed(self.rows), self.rows, strict=True)]

    def _summed(self, rows: Sequence[Row]) -> list[float]:
        found: dict[int, float] = {}
        for places in by_length(rows, self.method.batch):
            found |= zip(places, summed_nll(self.model, [rows[i] for i in places], self.pad), strict=True)
        return [found[i] for i in range(len(rows))]

    @torch.no_grad()
    def _likelihood(self) -> Scores:
        """Only the logits of the letters, right after the prompt."""
        letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]
        rows = []
        for item, choice in zip(self.items, self.choices, strict=True):
            listed = "\n".join(f"{a}. {text}" for a, text in zip(LETTERS, choice.texts, strict=False))
            asked = Item(id=item.id, prompt=f"{item.prompt}\n{listed}\nAnswer with the letter.")
            ids = prompt_ids(asked, self.tokenizer)
            rows.append(Row((*ids, letters[choice.right]), (*[-100] * len(ids), letters[choice.right])))
        right: dict[int, bool] = {}
        for places in by_length(rows, self.method.batch):
            seen = labelled(self.model, on_device([rows[i] for i in places], self.pad, self.model))
            for i, logits_V in zip(places, seen.head(seen.h_ND), strict=True):
                choice = self.choices[i]
                right[i] = int(logits_V[letters[: len(choice.texts)]].argmax()) == choice.right
        return [(float(right[i]), 1.0) for i in range(len(rows))]

    def _continuation(self) -> Scores:
        items = [
            Item(id=item.id, prompt=item.prompt, answer=text)
            for item, choice in zip(self.items, self.choices, strict=True) for text in choice.texts
        ]  # fmt: skip
        nll = iter(self._summed([encode(item, self.tokenizer, self.method.max_length) for item in items]))
        found = []
        for choice in self.choices:
            mine = [next(nll) for _ in choice.texts]
            found.append((float(mine.index(min(mine)) == choice.right), 1.0))
        return found

    def _generation(self) -> Scores:
        decode = limited(self.method.decode, self.method.max_new_tokens)
        prompts = [prompt_ids(item, self.tokenizer) for item in self.items]
        right: dict[int, bool] = {}
        for places in by_length([Row(tuple(ids), ()) for ids in prompts], self.method.batch):
            decoding = decode.steps([(self.model, self.tokenizer)], [prompts[i] for i in places], self.ctx)
            for _ in decoding:
                pass
            for i, text in zip(places, decoding.trace().texts, strict=True):
                right[i] = self.source.score(self.items[i], text) >= 1
        return [(float(right[i]), 1.0) for i in range(len(prompts))]

    def angles(self, ranges: Sequence[tuple[int, int]]) -> list[float]:
        """The mean angle between the stream before the first and after the last layer of each range."""
        total = [0.0] * len(ranges)
        for places in by_length(self.rows, self.method.batch):
            rows = [self.rows[i] for i in places]
            ends: list[tuple[Tensor, Tensor]] = []

            def look(i: int, x_BTD: Tensor, y_BTD: Tensor, rows: Any = rows, ends: Any = ends) -> None:
                pair = [torch.stack([z[b, len(r.input_ids) - 1] for b, r in enumerate(rows)]) for z in (x_BTD, y_BTD)]
                ends.append((pair[0], pair[1]))

            with watching(self.layers, look):
                summed_nll(self.model, rows, self.pad)
            for k, (first, last) in enumerate(ranges):
                total[k] += angular(ends[first][0], ends[last][1]).sum().item()
        return [t / len(self.rows) for t in total]


def _mean(scores: Scores) -> float:
    return math.fsum(s for s, _ in scores) / math.fsum(w for _, w in scores)


def _paired(after: Scores, before: Scores) -> tuple[float, float]:
    """The change of the mean, and its standard error over the items (of a ratio, where weights differ)."""
    pairs = [(a - b, w) for (a, w), (b, _) in zip(after, before, strict=True)]
    weight = math.fsum(w for _, w in pairs)
    change = math.fsum(d for d, _ in pairs) / weight
    spread = math.fsum((d - change * w) ** 2 for d, w in pairs) * len(pairs) / max(1, len(pairs) - 1)
    return change, math.sqrt(spread) / weight


def _remark(protocol: str, ranges: Sequence[tuple[int, int]], harm: Sequence[float], angles: Sequence[float]) -> str:
    """Which ranges matter most, and which the angle would have removed first."""
    names = [str(a) if a == b else f"{a}-{b}" for a, b in ranges]
    most = sorted(range(len(names)), key=lambda i: -harm[i])[:5]
    least = sorted(range(len(names)), key=lambda i: angles[i])[:5]
    said = [", ".join(names[i] for i in some) for some in (most, least)]
    return f"by {protocol} the layers that matter most are {said[0]}; the smallest angles have {said[1]}"
