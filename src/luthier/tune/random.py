"""Random mask: trains a keyed random choice of entries, the control every chosen mask must beat.

Paper: none (a control; the "random" rows of arXiv 2506.00772 are of this kind).
Same budget, targets and machinery as any method that selects entries, with no look at the weights.
M, N: rows and columns of a matrix.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from luthier.checkpoint.delta import Delta
from luthier.checkpoint.roles import live_roles
from luthier.errors import LuthierError
from luthier.fields import Count, Share
from luthier.flows import Ctx
from luthier.kit.sparse import Selected, budget, matching, per_matrix, pick
from luthier.shapes import Reduces, Tune


class Random(Tune):
    share: Share | None = None
    """share of each target matrix that trains; null means 0.05 unless lora_rank is given"""
    lora_rank: Count | None = None
    """train as many entries of each matrix as LoRA of this rank would: (rows + columns) * rank"""
    every: Count | None = 200
    """steps between two draws of the mask; null keeps the first one"""
    block: Literal[1, 4] = 1
    """4 selects 4 x 4 squares instead of single entries"""
    targets: tuple[str, ...] = ("linear",)
    """what may train: globs of parameter names or of roles, or the word linear (every matrix inside the blocks)"""
    count: Literal["leaf", "entry"] = "leaf"
    """whose steps the optimizer's bias correction counts: the matrix's, or each entry's own"""
    reduces_to = Reduces({"share": 1.0}, "tune.full", given={"targets": "linear", "dtype": "float32"})

    def check(self) -> None:
        if self.share is not None and self.lora_rank is not None:
            raise LuthierError("share and lora_rank are two ways to say the same", where=self.id, do="give one of them")

    def bind(self, model: nn.Module, ctx: Ctx) -> Selected:
        weights = matching(model, self.targets, live_roles(model))

        def choose(name: str, weight: Tensor, step: int) -> Tensor:
            return per_matrix(weight, lambda i, W_MN: self._draw(W_MN, ctx, (name, i, step)))

        first = {name: choose(name, weight, 0) for name, weight in weights.items()}
        return Selected(
            model, weights, first, partial(Delta.sparse, model=model), choose, self.every, self.count == "entry"
        )

    def _draw(self, W_MN: Tensor, ctx: Ctx, item: tuple[str, int, int]) -> Tensor:
        score_MN = torch.rand(W_MN.shape, generator=ctx.rng("mask", *item)).to(W_MN.device)
        return pick(score_MN, budget(W_MN.shape, self.share, self.lora_rank), self.block)
