"""Toy mean: the average of the experts, or a part of the way there.

Paper: none (made for the tests).

N: entries of a stretch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.fields import Share
from luthier.flows import Ctx, Piece
from luthier.shapes import Reduces, Transform


class Toy(Transform):
    pull: Share = 1.0
    """share of the way from the base to the average"""

    reduces_to = Reduces({"pull": 1.0}, "mean", tolerance=1e-6)
    departures = ("nobody 0.0.0: it is published nowhere (tests/test_testing.py::test_a_sound_toy_passes)",)

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        total_N = torch.zeros_like(tensors.experts[0])
        for expert_N in tensors.experts:
            total_N.add_(expert_N)
        return torch.lerp(tensors.base, total_N / len(tensors.experts), self.pull)
