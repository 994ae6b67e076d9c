"""SLERP: go from the base to one expert along an arc rather than the straight line, tensor by tensor.

Paper: none (Shoemake 1985, Animating rotation with quaternion curves; for weights a common practice).

A tensor is one vector. The base's factor is sin((1-t) angle) / sin(angle), the expert's sin(t angle) /
sin(angle), and they multiply the tensors as they are, of whatever lengths. The angles come from one pass over
both models. A tensor of zeros has no direction and counts as at a right angle, as in the common tools.

Footguns: fine-tunes of one base are so close that most cosines are above `threshold`, where SLERP silently
becomes the straight line of `merge.interpolate`; the log says for how many tensors. Changes are not rotated,
whole weights are: an arc between task vectors is mergekit's nuslerp, another method.

N: entries of a stretch.  E: the base and the expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.fields import Schedule, Unit
from luthier.flows import Ctx, Piece
from luthier.kit.angles import along_arc, cosines, grams
from luthier.kit.deltas import one_each
from luthier.kit.schedule import at
from luthier.shapes import Reduces, Transform

STRAIGHT = 1 - 1e-12
"""Above this cosine arc and line are the same in fp64, and opposite tensors span no arc."""


class Slerp(Transform):
    t: Schedule = 0.5
    """where on the arc, from 0, the base, to 1, the expert: a number, a list by depth, or {glob: either}"""
    threshold: Unit = 0.9995
    """cosine above which, in magnitude, a tensor is interpolated linearly; 1 keeps to the arc"""

    takes = 1
    reduces_to = (
        Reduces({"t": 0.0}, "base"),
        Reduces({"t": 1.0}, "identity"),
        Reduces({"threshold": 0.0}, "merge.interpolate", tolerance=1e-6),
    )

    def plan(self, inputs: Any) -> Any:
        one_each("t", (self.t,), inputs)
        one_each("threshold", (self.threshold,), inputs)
        return inputs

    def survey(self, inputs: Any, ctx: Ctx) -> dict[str, tuple[float, float]]:
        """The factors of base and expert, by tensor name."""
        found = grams(inputs, _pair)
        factors, straight = {}, 0
        for name, gram_EE in found.items():
            cosine = float(cosines(gram_EE)[0, 1])
            t, threshold = (at(field, name, inputs.tensors[name].depth) for field in (self.t, self.threshold))
            line = abs(cosine) > min(threshold, STRAIGHT)
            factors[name] = (1 - t, t) if line else along_arc(cosine, t)
            straight += line
        ctx.emit("log", text=f"{self.id}: {straight} of {len(found)} tensors are interpolated linearly, not on an arc")
        return factors

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        base_N, expert_N = _pair(tensors)
        of_base, of_expert = ctx.survey[tensors.name]
        return torch.mul(base_N, of_base).add_(expert_N, alpha=of_expert)


def _pair(piece: Piece) -> tuple[Tensor, Tensor]:
    assert piece.base is not None  # the engine has refused a missing base before the first piece
    return piece.base, piece.experts[0]
