"""Task arithmetic: add what the experts changed to the base; a negative weight takes a skill away.

Paper: arXiv 2212.04089.  One scale for the sum, which the paper chooses on held-out data.

Footgun: with `scale` 1 and many experts of one task the changes add up and overshoot.

N: entries of a stretch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.fields import Schedule
from luthier.flows import Ctx, Piece
from luthier.kit.deltas import add, changes, each, one_each
from luthier.kit.schedule import at
from luthier.shapes import Reduces, Transform


class TaskArithmetic(Transform):
    scale: Schedule = 1.0
    """factor of the summed changes: a number, a list by depth, or {glob: either}"""
    weights: tuple[Schedule, ...] | None = None
    """one factor an expert within the sum; none means 1 each"""

    partial = True
    reduces_to = (
        Reduces({"scale": 0.0}, "base"),
        Reduces({"weights": (0.25, 0.75)}, "merge.linear", given={"experts": 2}, tolerance=1e-6),
    )

    def plan(self, inputs: Any) -> Any:
        one_each("weights", self.weights, inputs)
        return inputs

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        total_N = torch.zeros_like(tensors.experts[0])
        weights = each(self.weights, 1.0, tensors, len(tensors.experts))
        for weight, change_N in zip(weights, changes(tensors), strict=True):
            total_N.add_(change_N, alpha=weight)
        return add(tensors, total_N, at(self.scale, tensors.name, tensors.depth))
