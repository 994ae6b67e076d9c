"""LaCo: neighbouring layers collapse into one that keeps what they differ by.

Paper: arXiv 2402.11187.  From the top down layer i and the m = `merge_layers` - 1 above it become one of weights
θ_i + Σ_k (θ_i+k - θ_i), norms included. The collapse is kept if the last hidden states of a few items, behind the
final norm, still point where the whole model's do: the mean over items of the cosine of all an item's states in a
row must be above the threshold. Then the sweep goes on `interval` layers below, else one layer below.

Notable. With `layers` the count is exact, so that LaCo stands in one table with rules that drop as many: a collapse
takes no more layers than are left to go, the sweep stops at the target, and the threshold is lowered, as users do
by hand, but exactly: to the highest cosine refused so far, the first value at which a new sweep differs, until so
many go. What was looked at once is not looked at again. Layers of a collapsed one may collapse again.

Footguns: two layers that become one are θ_i + (θ_i+1 - θ_i): layer i is dropped. Each layer beyond that takes
θ_i off once more, so its coefficient is 1 - m and large collapses leave the weights' scale. The last states are
blind to what the head makes of them.

T: tokens.  D: channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.fields import Count, Examples, Range
from luthier.flows import Budget, Ctx, Evaluate, Space, Table
from luthier.kit.calibrate import drawn
from luthier.kit.encode import Row
from luthier.kit.genome import Entry, of_base, stitched
from luthier.shapes import Reduces, Study, Transform


class Merged(NamedTuple):
    """A layer of the collapsed model: the base's layers first ... last, with a coefficient for each of some."""

    first: int
    last: int
    share: tuple[tuple[int, float], ...]


class Laco(Study):
    layers: Annotated[Annotated[int, Range(0)] | None, Examples((1, 0, 3, None))] = 1
    """how many layers go, exactly; None: as many as the threshold lets go"""
    threshold: Annotated[float, Range(-1.0, 1.0)] = 1.0
    """a collapse is kept if the cosine is above it; with `layers`, where the lowering starts"""
    merge_layers: Annotated[int, Range(2)] = 4
    """so many layers become one, fewer at the top of the model"""
    interval: Count = 1
    """how far below a collapse the next one is tried"""
    low: Annotated[int, Range(0), Examples((0, 1))] = 0
    """the lowest layer that others may collapse into"""
    high: Annotated[Annotated[int, Range(0)] | None, Examples((None, 4))] = None
    """the sweep starts `merge_layers` below this layer; None: below the last one"""
    keep: Literal["differences", "last"] = "differences"
    """what is left of a collapse: the sum of the paper, or its last layer, which is what the released code leaves"""
    examples: Count = 5
    """training items of each data whose last states are compared"""
    max_length: Annotated[int, Range(8)] = 512
    """tokens of such an item at most"""

    makes = ("compress.stitch",)
    proposes = False
    roles = ("base", "data*")
    reduces_to = (
        Reduces({"layers": 0}, "base"),
        Reduces({"layers": None, "threshold": 1.0}, "base"),
    )
    departures = (
        "yangyifei729/LaCo 8483587: both notebooks take each difference from the layer as the earlier differences have "
        "left it, not from θ_i, so what they keep is the last of the collapsed layers, with layer i's norms, and the "
        "others are lost. Ours is the paper's sum, norms included; keep: last leaves the last layer whole "
        "(tests/golden/test_compress_laco.py::test_released_code_leaves_the_last_layer)",
    )

    def fits(self, space: Space, objectives: Sequence[str] = ()) -> None:
        most = max(0, space.layers - 1 - self.low)
        if self.layers is not None and self.layers > most:
            what = f"{self.layers} layers cannot go from {space.layers}"
            raise LuthierError(what, where=f"{self.id}.layers", do=f"let {most} go at most")

    def leaves(self, layers: int) -> int:
        return layers - (self.layers or 0)

    def least(self, layers: int) -> int:
        return 0 if self.layers == 0 else layers

    def study(self, space: Space, evaluate: Evaluate, budget: Budget, ctx: Ctx) -> Table:
        seen: dict[Transform, float] = {}
        close = self._closeness(space, evaluate, ctx, seen)
        threshold = self.threshold
        stack, refused = self._sweep(space.layers, threshold, close, ctx)
        while self.layers is not None and space.layers - len(stack) < self.layers:
            if refused is None:
                what = f"{self.layers} layers do not go in one sweep, only {space.layers - len(stack)}"
                raise LuthierError(what, where=f"{self.id}.layers", do="raise merge_layers or high, or lower interval")
            threshold = math.nextafter(refused, -math.inf)
            stack, refused = self._sweep(space.layers, threshold, close, ctx)
        chosen = _candidate(stack)
        evaluate(chosen)
        joined = [f"{one.first}-{one.last}" for one in stack if one.last > one.first]
        notes = (f"collapsed into one: {', '.join(joined) or 'none'}", f"threshold: {threshold:.4f}")
        return evaluate.table(chosen, (*notes, f"{len(seen)} collapses compared"))

    def _sweep(
        self, count: int, threshold: float, close: Callable[[Transform], float], ctx: Ctx
    ) -> tuple[list[Merged], float | None]:
        """The layers that are left at this threshold, and the highest cosine that was refused."""
        stack = [Merged(layer, layer, ((layer, 1.0),)) for layer in range(count)]
        end = 1 if self.layers is None else count - self.layers
        top = count - 1 if self.high is None else min(self.high, count - 1)
        at, refused = max(self.low, top - self.merge_layers), None
        for _ in ctx.progress(range(at - self.low + 1), what=f"threshold {threshold:.4f}"):
            more = min(self.merge_layers - 1, len(stack) - at - 1, len(stack) - end)
            if at < self.low or more < 1:
                break
            tried = [*stack[:at], self._merged(stack[at : at + more + 1]), *stack[at + more + 1 :]]
            cosine = close(_candidate(tried))
            if cosine > threshold:
                stack, at = tried, at - self.interval
            else:
                refused, at = cosine if refused is None else max(refused, cosine), at - 1
        return stack, refused

    def _merged(self, several: Sequence[Merged]) -> Merged:
        """θ_0 + Σ (θ_k - θ_0), where each θ may be a sum itself."""
        bottom, *above = several
        found: dict[int, float] = {layer: (1.0 - len(above)) * share for layer, share in bottom.share}
        for layer, share in (pair for one in above for pair in one.share):
            found[layer] = found.get(layer, 0.0) + share
        share = tuple((layer, value) for layer, value in found.items() if value)
        return Merged(bottom.first, above[-1].last, share if self.keep == "differences" else above[-1].share)

    def _closeness(
        self, space: Space, evaluate: Evaluate, ctx: Ctx, seen: dict[Transform, float]
    ) -> Callable[[Transform], float]:
        """candidate → the mean cosine between its last states and the whole model's."""
        whole: list[Tensor] = []

        def states(candidate: Transform) -> list[Tensor]:
            with evaluate.open(candidate) as (model, tokenizer), torch.inference_mode():
                draw = (drawn(source, tokenizer, self.examples, self.max_length, ctx) for source in ctx.role("data"))
                return [_last(model, row) for rows in draw for _, row in rows]

        def close(candidate: Transform) -> float:
            if not whole:
                whole.extend(states(of_base(range(space.layers))))
            if candidate not in seen:
                pairs = zip(states(candidate), whole, strict=True)
                cosines = [torch.cosine_similarity(y, x, dim=0).item() for y, x in pairs]
                mean = math.fsum(cosines) / len(cosines)
                seen[candidate] = mean if math.isfinite(mean) else -1.0
            return seen[candidate]

        return close


def _last(model: Any, row: Row) -> Tensor:
    """The states behind the final norm, all of the item's in one vector (T * D,), fp64."""
    ids_1T = torch.tensor([row.input_ids], device=model.device)
    return model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state.flatten().double().cpu()


def _candidate(stack: Sequence[Merged]) -> Transform:
    def entry(one: Merged) -> Entry:
        terms = {f"base.{layer}": value for layer, value in one.share}
        return next(iter(terms)) if list(terms.values()) == [1.0] else terms

    return stitched([entry(one) for one in stack])
