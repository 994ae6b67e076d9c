"""Evolve: CMA-ES over the numbers of a merge, or over which layers follow each other and how the stream is scaled.

Paper: arXiv 2403.13187.  Two spaces, each searched on training items by an evolution strategy:

- `parameters`: weights and densities of another merge, DARE followed by TIES' vote in the paper; one number an expert
  and place. CMA-ES starts at the middle of each range with a sixth of it as spread, 4 + 3 ln n candidates a generation.
- `flow`: all layers of the base, then all of each expert, and all that `repeats` times; each of these slots has an
  indicator, and its layer is in the model where that is above 0. W_ij scales the stream on its way from layer i to
  layer j. The base's embeddings, its first layer at the start and its last at the end are fixed; its other layers of
  the first round start `start` deviations above 0. The model is what `compress.stitch` makes of it.

Notable. Both spaces, as in the paper, are two steps: the model of `parameters` is the base of `flow`. Of all trials the
one with the lowest mean of the objectives is chosen; the paper's 1000 trials in the first space and generations of 128
for 100 rounds in the second are `search.trials` and `population`. Not found in print, and chosen here: where other
slots and scales start (0 and 1), the range of scales (`span`), and the network that may give W instead of a matrix
(none). The paper's second space runs on EvoJAX, ours on the `cmaes` package, as its first does through Optuna.
mergekit-evolve (0.1.5) knows the first space alone, starts at weights of 1/experts and densities of 1, and takes
absolute values instead of bounds. Scales of hops that a candidate does not take are drawn all the same; arXiv
2605.12326 minds which are in use, and reports better models: not done here.

Footguns. The chosen model fits the items it was judged by: measure it on others. W has as many entries as layers
squared, and CMA-ES needs the cube of that at each generation: with more than some 30 layers in all take
`scales: slots`. A layer that stands twice is written twice. Densities near 0 make DARE divide by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

from luthier.errors import LuthierError, unknown
from luthier.fields import Count, Examples, Range, coerce, hints
from luthier.flows import Budget, Ctx, Evaluate, Space, Table
from luthier.kit.genome import stitched
from luthier.shapes import Reduces, Study, Transform

INSIDE = "*.[0-9]*.*"
"""Names of tensors inside layers."""
DEVIATIONS = 3.0
"""Half a range, in first deviations of CMA-ES."""


class Number(NamedTuple):
    """What evolves in [low, high], under a name that no other one has."""

    name: str
    low: float
    high: float


class Slot(NamedTuple):
    """A place in the flow. model: None for the base.  layer: its layer.  at: the layer's number among all."""

    round: int
    model: int | None
    layer: int
    at: int

    @property
    def word(self) -> str:
        return f"{'base' if self.model is None else self.model}.{self.layer}"


class Evolve(Study):
    space: Literal["parameters", "flow"] = "parameters"
    """numbers of a merge, or the order of layers"""
    merge: Transform = {"use": "merge.dare", "set": {"vote": "majority"}}  # type: ignore[assignment]
    """parameters: the merge whose numbers evolve"""
    ranges: Annotated[
        Mapping[str, tuple[float, float]],
        Examples(({"weights": (0.0, 1.0)}, {"density": (0.1, 0.9), "scale": (0.5, 2)})),
    ] = {"weights": (0.0, 1.0), "densities": (0.0, 1.0)}  # type: ignore[assignment]
    """parameters: which of the merge's fields evolve, and from where to where"""
    groups: Annotated[int, Range(0)] = 0
    """parameters: stretches of layers with numbers of their own, beside embeddings and head; 0: one number for all"""
    repeats: Count = 3
    """flow: how often all layers are laid out"""
    scales: Literal["pairs", "slots", "none"] = "pairs"
    """flow: a scale for each pair of layers, for each slot, or none"""
    span: Annotated[float, Range(0.0, 0.99)] = 0.5
    """flow: how far a scale may be from 1"""
    start: float = 2.0
    """flow: where the indicators of the base's own layers start in the first round, in deviations above 0"""
    others: float = 0.0
    """flow: where all other indicators start"""
    population: Annotated[int, Range(4)] | None = None
    """candidates a generation; None: 4 + 3 ln n for n numbers"""
    by: Literal["cmaes", "random"] = "cmaes"
    """the evolution strategy, or candidates drawn from the same ranges, to hold it against"""

    makes = ("compress.stitch",)
    roles = ("base", "experts*", "data*")
    reduces_to = (
        Reduces({"merge": "merge.task_arithmetic", "ranges": {"weights": [1.0, 1.0]}}, "merge.task_arithmetic"),
        Reduces({"merge": "merge.dare", "ranges": {"density": [0.1, 0.1]}}, "merge.dare"),
        Reduces({"ranges": {"weights": [0.0, 0.0], "densities": [1.0, 1.0]}, "groups": 2}, "base"),
        Reduces({"space": "flow", "repeats": 2, "scales": "none", "start": 4.0, "others": -4.0}, "base"),
    )

    def check(self) -> None:
        known = hints(type(self.merge))
        if any(role.startswith("data") for role in type(self.merge).roles):
            what = f"{self.merge.id} looks at models with data"
            raise LuthierError(what, where=f"{self.id}.merge", do="name a merge that does not, such as merge.dare")
        if not self.ranges:
            raise LuthierError("names no field", where=f"{self.id}.ranges", do="write {weights: [0, 1]}")
        for name, (low, high) in self.ranges.items():
            where = f"{self.id}.ranges.{name}"
            if name not in known:
                raise unknown(f"field of {self.merge.id}", name, known, where=f"{self.id}.ranges")
            if low > high:
                raise LuthierError(f"{low} is above {high}", where=where, do="write [from, to]")
            for number in (low, high):
                self._form(name, number)
        try:  # for any experts and layers: it is the merge's own check that is asked
            self._merged(1, 1, {n.name: n.high for n in self._parameters(1)})
        except LuthierError as fault:
            raise fault.at(f"{self.id}.merge") from None

    def fits(self, space: Space, objectives: Sequence[str] = ()) -> None:
        if self.space == "flow" and space.layers < 2:
            raise LuthierError("the base has one layer, which cannot be both ends", where=self.id)
        if self.space == "parameters" and self.groups > space.layers:
            what = f"{self.groups} groups of {space.layers} layers"
            raise LuthierError(what, where=f"{self.id}.groups", do=f"ask for {space.layers} at most")

    def least(self, layers: int) -> int:
        return int(self.space == "parameters" and all(low == high for low, high in self.ranges.values()))

    def study(self, space: Space, evaluate: Evaluate, budget: Budget, ctx: Ctx) -> Table:
        numbers = self._numbers(space)
        free = [n for n in numbers if n.low < n.high]
        fixed = {n.name: n.low for n in numbers if n.low == n.high}
        if not free:
            chosen = self._candidate(space, fixed)
            evaluate(chosen)
            return evaluate.table(chosen, self._told(space, chosen))
        for proposal in budget.proposals(self.by, size=len(free), population=self.population):
            drawn = {n.name: proposal.share(n.name, n.low, n.high) for n in free}
            evaluate(self._candidate(space, fixed | drawn), proposal)
        best = min(evaluate.finished, key=lambda d: sum(d.values))
        chosen = Transform.from_value(json.loads(best.candidate))
        return evaluate.table(chosen, (f"{len(free)} numbers evolved", *self._told(space, chosen)))

    def _numbers(self, space: Space) -> list[Number]:
        if self.space == "flow":
            return self._flow(space)
        return self._parameters(len(space.experts))

    def _candidate(self, space: Space, values: Mapping[str, float]) -> Transform:
        if self.space == "flow":
            return self._chain(space, values)
        return self._merged(space.layers, len(space.experts), values)

    # parameters

    def _form(self, name: str, number: float | None = None) -> str:
        """What the merge's field takes: a schedule or a number, one for all experts or one each."""
        number = self.ranges[name][1] if number is None else number
        kind, forms = hints(type(self.merge))[name], {
            "schedule": {"*": number}, "schedules": ({"*": number},), "numbers": (number,), "number": number,
        }  # fmt: skip
        for form, value in forms.items():
            with suppress(LuthierError):
                coerce(value, kind)
                return form
        what = f"{self.merge.id} takes no {number} there"
        raise LuthierError(what, where=f"{self.id}.ranges.{name}", do=f"see luthier show {self.merge.id}")

    def _places(self, name: str) -> list[str]:
        """Where a field has numbers of its own."""
        if not self.groups or self._form(name) in ("numbers", "number"):
            return ["everywhere"]
        return ["embeddings", *(f"group {g}" for g in range(self.groups)), "head"]

    def _parameters(self, experts: int) -> list[Number]:
        found = []
        for name, (low, high) in self.ranges.items():
            of = [f" of {i}" for i in range(experts)] if self._each(name) else [""]
            found += [Number(f"{name}{one}, {place}", low, high) for one in of for place in self._places(name)]
        return found

    def _each(self, name: str) -> bool:
        return self._form(name) in ("schedules", "numbers")

    def _merged(self, layers: int, experts: int, values: Mapping[str, float]) -> Transform:
        """The merge with these numbers."""
        fields: dict[str, Any] = {}
        for name in self.ranges:
            of = [f" of {i}" for i in range(experts)] if self._each(name) else [""]
            made = [self._schedule(layers, [values[f"{name}{one}, {p}"] for p in self._places(name)]) for one in of]
            fields[name] = made if self._each(name) else made[0]
        return self.merge.replace(**fields)

    def _schedule(self, layers: int, numbers: list[float]) -> Any:
        """A number, or one for the embeddings, one for each layer and one for what comes after them."""
        if len(numbers) == 1:
            return numbers[0]
        inner = [numbers[1 + layer * self.groups // layers] for layer in range(layers)]
        return {"*": [numbers[0], numbers[-1]], INSIDE: inner}

    # flow

    def _slots(self, space: Space) -> tuple[Slot, list[Slot], Slot]:
        """The fixed first one, the free ones in order, the fixed last one."""
        depths = [space.layers, *space.experts]
        row = [(None if m == 0 else m - 1, layer) for m, depth in enumerate(depths) for layer in range(depth)]
        every = [Slot(r, model, layer, at) for r in range(self.repeats) for at, (model, layer) in enumerate(row)]
        first, last = every[0], every[space.layers - 1]
        return first, [slot for slot in every if slot not in (first, last)], last

    def _flow(self, space: Space) -> list[Number]:
        _, free, last = self._slots(space)
        found = []
        for slot in free:
            middle = self.start if slot.round == 0 and slot.model is None else self.others
            found.append(Number(_indicator(slot), middle - DEVIATIONS, middle + DEVIATIONS))
        count = space.layers + sum(space.experts)
        names = {
            "pairs": [_pair(i, j) for i in range(count) for j in range(count)],
            "slots": [_entry(slot) for slot in (*free, last)], "none": [],
        }  # fmt: skip
        return found + [Number(name, 1 - self.span, 1 + self.span) for name in names[self.scales]]

    def _chain(self, space: Space, values: Mapping[str, float]) -> Transform:
        """The layers whose indicator is above 0. A scale before a layer divides what is added from there on."""
        first, free, last = self._slots(space)
        path = [first, *(slot for slot in free if values[_indicator(slot)] > 0), last]
        gains = [1.0]
        for here, there in pairwise(path):
            name = _pair(here.at, there.at) if self.scales == "pairs" else _entry(there)
            gains.append(gains[-1] / values.get(name, 1.0))
        return stitched([slot.word for slot in path], gains=gains if set(gains) != {1.0} else None)

    # notes

    def _told(self, space: Space, chosen: Any) -> list[str]:
        """What evolved, to be read."""
        if self.space == "flow":
            words, gains = list(chosen.layers), chosen.gains or ()
            for hop, (before, after) in enumerate(pairwise(gains), 1):
                if before != after:
                    words[hop] = f"x{before / after:.2f} {words[hop]}"
            return [f"path: {', '.join(words)}"]
        lines = [f"numbers: {' | '.join(self._titles(space.layers))}"] if self.groups else []
        for name in self.ranges:
            value = getattr(chosen, name)
            for expert, one in enumerate(value if self._each(name) else [value]):
                of = f" of expert {expert}" if self._each(name) else ""
                lines.append(f"{name}{of}: {' | '.join(f'{number:.3g}' for number in self._flat(space.layers, one))}")
        return lines

    def _titles(self, layers: int) -> list[str]:
        starts = [*self._starts(layers), layers]
        inner = [f"layers {a} to {b - 1}" for a, b in pairwise(starts)]
        return ["embeddings", *inner, "what comes after the layers"]

    def _starts(self, layers: int) -> list[int]:
        return [-(-group * layers // self.groups) for group in range(self.groups)]

    def _flat(self, layers: int, schedule: Any) -> list[float]:
        if not isinstance(schedule, Mapping):
            return [schedule]
        inner = [schedule[INSIDE][layer] for layer in self._starts(layers)]
        return [schedule["*"][0], *inner, schedule["*"][1]]


def _indicator(slot: Slot) -> str:
    return f"{slot.word}, round {slot.round}"


def _entry(slot: Slot) -> str:
    return f"to {slot.word}, round {slot.round}"


def _pair(i: int, j: int) -> str:
    return f"from {i} to {j}"
