"""Linear merge: the weighted average of models, entry by entry; with equal weights, a uniform soup.

Paper: arXiv 2203.05482.  Averages whole models, so no base is needed; one that is given lends its
config, tokenizer and what is not a number, and is not averaged in.

Footgun: experts must descend from one model. Averages of unrelated models are noise.

N: entries of a stretch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from luthier.errors import LuthierError
from luthier.fields import Schedule
from luthier.flows import Ctx, Piece
from luthier.kit.deltas import each, one_each, summed
from luthier.kit.vote import divisible
from luthier.shapes import Reduces, Transform


class Linear(Transform):
    weights: tuple[Schedule, ...] | None = None
    """one factor an expert: a number, a list by depth, or {glob: either}; none means 1 each"""
    normalize: bool = True
    """divide by the sum of the weights, so that they are shares"""

    roles = ("base?", "experts*")
    partial = True
    reduces_to = Reduces({}, "identity", given={"experts": 1})

    def plan(self, inputs: Any) -> Any:
        one_each("weights", self.weights, inputs)
        if self.normalize:
            divisible(self.weights, inputs)
        return inputs

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        weights = each(self.weights, 1.0, tensors, tensors.count)
        total_N = summed(tensors, weights)
        if not self.normalize:
            return total_N
        if abs(sum(weights)) < 1e-8:
            raise LuthierError(f"the weights sum to 0 at {tensors.name}", where=self.id, do="set normalize: false")
        return total_N.div_(sum(weights))
