"""PCB-Merging: each entry of the merged change is an average, weighted by how much each expert claims it.

Paper: arXiv 2410.02396.  A claim is the product of two: how large the change is within its expert (intra: e to the
square of the normalised magnitude, times the number of experts), and whether the others agree (inter). Claims below
the `ratio` largest of an expert count nothing, the others from 0 to 1. Magnitudes are clamped at both tails first.
All these bounds are over the whole model.

Notable: two surveys find four numbers an expert, exactly and without a sort; then each entry stands for itself. The
softmax of the paper is e to the power here: its denominator is one number an expert, which cancels.

Footguns: what no expert claims stays at the base, by default nine entries in ten. The released scripts differ in
`inter` and in `clamp`, and choose a `weights` of about 1.2 each on held-out data.

N: entries of a stretch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from luthier.fields import Range, Schedule, Share
from luthier.flows import Ctx, Piece
from luthier.kit.deltas import add, changes, each, one_each
from luthier.kit.schedule import at
from luthier.kit.select import See, largest
from luthier.kit.sieve import magnitudes
from luthier.shapes import Reduces, Transform

NOBODY = 1e-12
"""The smallest sum of claims that is divided by, as released."""


class Pcb(Transform):
    ratio: Share = 0.1
    """share of each expert's entries whose claims count"""
    scale: Schedule = 1.0
    """factor of the merged change: a number, a list by depth, or {glob: either}"""
    weights: tuple[Schedule, ...] | None = None
    """one factor an expert, which multiplies its change but not its claims"""
    clamp: Annotated[float, Range(0.0, 0.25)] = 0.0001
    """share of the entries whose magnitude is clamped, at either end"""
    inter: Literal["sum", "pairs"] = "sum"
    """agreement: of a change with the sum of all (pcb-merging.py), or with each one, normalised (pcb_ES.py)"""

    reduces_to = (
        Reduces({"ratio": 1.0, "clamp": 0.0}, "merge.task_arithmetic", given={"experts": 1}, tolerance=1e-6),
        Reduces({"scale": 0.0}, "base"),
    )
    departures = (
        "duguodong7/pcb-merging 5897888: `PCB_merge` and pcb_ES.py weigh agreement by different formulas and clamp "
        "1 in 10,000 and 1 in 100 entries; their merges of the same experts differ; both are here, as `inter` and "
        "`clamp` (tests/golden/test_merge_pcb.py::test_released_scripts_differ)",
        "duguodong7/pcb-merging 5897888: an expert that did not move, or by one amount only, makes every entry of the "
        "merge NaN; here its claims count nothing "
        "(tests/golden/test_merge_pcb.py::test_released_code_breaks_on_an_expert_that_did_not_move)",
    )

    def plan(self, inputs: Any) -> Any:
        one_each("weights", self.weights, inputs)
        return inputs

    def survey(self, inputs: Any, ctx: Ctx) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """By expert: the bounds of its magnitudes, and the least claim that counts with the largest."""
        tails = self._tails(inputs)
        return tails, self._claimed(inputs, tails)

    def _tails(self, inputs: Any) -> list[tuple[float, float]]:
        """Between which magnitudes each expert is clamped."""
        count, experts = inputs.count, len(inputs.experts)
        low, high = int(count * self.clamp), int(count * (1 - self.clamp) - 1)  # places in ascending order

        def stream(sample: bool, see: See) -> Iterator[Any]:
            return inputs.each(lambda piece: see(2 * magnitudes(piece)), sample=sample)

        found = largest(stream, [count - low] * experts + [count - high] * experts, count, inputs.room)
        return list(zip(found[:experts], found[experts:], strict=True))

    def _claimed(self, inputs: Any, tails: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Each expert's smallest claim that may count, and its largest of all."""
        count, experts = inputs.count, len(inputs.experts)
        below = int(count * (1 - self.ratio))
        tops = [-torch.inf] * experts

        def side(piece: Piece, sign: int, see: See) -> tuple[Any, list[float]]:
            claims = self._claims(changes(piece), tails)
            return see([(sign * c_N).clamp_(min=0).abs_() for c_N in claims]), [float(c_N.max()) for c_N in claims]

        def stream(sample: bool, see: See, sign: int) -> Iterator[Any]:
            for seen, most in inputs.each(functools.partial(side, sign=sign, see=see), sample=sample):
                tops[:] = map(max, tops, most)
                yield seen

        cuts = largest(functools.partial(stream, sign=1), [count - below] * experts, count, inputs.room)
        if 0 in cuts:  # there it is not above zero: found from the other side
            under = largest(functools.partial(stream, sign=-1), [below + 1] * experts, count, inputs.room)
            cuts = [cut or -other for cut, other in zip(cuts, under, strict=True)]
        return list(zip(cuts, tops, strict=True))

    def _claims(self, moved: list[Tensor], tails: list[tuple[float, float]]) -> list[Tensor]:
        """What each expert claims of each entry."""
        sizes = [
            change_N.abs().clamp_(low, high).sub_(low).div_(high - low or 1.0)
            for change_N, (low, high) in zip(moved, tails, strict=True)
        ]
        if self.inter == "sum":
            total_N = functools.reduce(torch.add, moved)
            agreed = [(change_N * total_N).tanh_() for change_N in moved]
        else:
            signed = [change_N.sign().mul_(size_N) for change_N, size_N in zip(moved, sizes, strict=True)]
            agreed = [functools.reduce(torch.add, [(mine_N * s_N).tanh_() for s_N in signed]) for mine_N in signed]
        return [
            size_N.square_().mul_(len(moved)).exp_().mul_(agreed_N)
            for size_N, agreed_N in zip(sizes, agreed, strict=True)
        ]

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        tails, claimed = ctx.survey
        moved = changes(tensors)
        claims = self._claims(moved, tails)
        merged_N, total_N = torch.zeros_like(moved[0]), torch.zeros_like(moved[0])
        weights = each(self.weights, 1.0, tensors, len(moved))
        for change_N, claim_N, weight, tail, (cut, top) in zip(moved, claims, weights, tails, claimed, strict=True):
            claim_N.sub_(cut).clamp_(min=0).div_(top - cut or 1.0)
            total_N.add_(claim_N)
            clamped_N = change_N.abs().clamp_(*tail).mul_(change_N.sign_())
            merged_N.addcmul_(clamped_N, claim_N, value=weight)
        merged_N.div_(total_N.clamp_(min=NOBODY))
        return add(tensors, merged_N, at(self.scale, tensors.name, tensors.depth))
