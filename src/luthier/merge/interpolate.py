"""Interpolation: a point on the straight line from one model to another, such as Instruct to Thinking.

Paper: arXiv 2510.10977.  (1 - share) * base + share * expert. It is `merge.linear` of two models whose
weights are shares, except that one of them is the base, which lends config and tokenizer and where the
share is 0: a share may then vary by depth or module and mean how much of the expert is in there.

The paper tells three stages from Qwen3-4B Instruct (base) to Thinking (expert). Up to 0.4 answers grow
longer, without thinking; from 0.4 to 0.6 thinking sets in and accuracy with it; above 0.6 every answer is
thought through, and only the tokens still grow. With 30B-A3B the middle stage is 0.5 to 0.8. The first
third of the layers hardly matters; for 36 layers and the rest at 0.8 that is
{"*": 0.8, "model.layers.[0-9].*": 0.0, "model.layers.1[01].*": 0.0}. Without the feed-forward layers
({"*": 0.8, "*.mlp.*": 0.0}) thinking is lost.

Footgun: config, chat template and tokenizer are the base's, and a template decides about thinking, too. The
paper's script takes them from the model at lambda = 1: copy the Thinking model's template if thinking is wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.fields import Schedule
from luthier.flows import Ctx, Piece
from luthier.kit.deltas import one_each
from luthier.kit.schedule import at
from luthier.shapes import Reduces, Transform


class Interpolate(Transform):
    share: Schedule = 0.5
    """the expert's share, the paper's lambda: a number, a list by depth, or {glob: either}"""

    takes = 1
    reduces_to = (
        Reduces({"share": 0.0}, "base"),
        Reduces({"share": 1.0}, "identity"),
        Reduces({"share": 1.0}, "merge.task_arithmetic", given={"experts": 1}, tolerance=1e-6),
    )
    departures = (
        "wutaiqiang/MI 2e039ee: `mi.py` computes b + lambda * (i - b) in the dtype the weights are stored in, so in "
        "bfloat16 the difference, its product and the sum are each rounded; some entries end one step off "
        "(tests/golden/test_merge_interpolate.py::test_released_code_rounds_three_times)",
    )

    def plan(self, inputs: Any) -> Any:
        one_each("share", (self.share,), inputs)
        return inputs

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        assert tensors.base is not None  # the engine has refused a missing base before the first piece
        return torch.lerp(tensors.base, tensors.experts[0], at(self.share, tensors.name, tensors.depth))
