"""LIFT: trains the entries that are largest after the matrix is reduced to low rank.

Paper: arXiv 2506.00772.  M_ij trains iff |W'_ij| is among the k largest, W' the best rank-r
approximation of W; the mask is chosen anew every so many steps, and entries that stay keep their
moments. State exists for selected entries only.

Notable: the first mask is exact, from the Gram matrix of the short side, and is computed once for all
steps of a run that start from the same weights. Later masks follow the moving matrix by a few steps of
subspace iteration from the last one's vectors (`refresh: exact` decomposes anew instead).
Footguns: the mask is ill-conditioned where singular values near r are close: two decompositions that
both fit well may share half of their masks, which is why nothing randomised is used here and why a
run's state holds the mask. The paper's rank of 128 is 1/32 of a width of 4096; a rank of 128 on a
small model is not the same method, so the default is that fraction. With `count: leaf` (the paper) an
entry that joins late has no bias correction of its own and starts with a step about 3 times too long at
β2 = 0.999; `count: entry` mends it.
M, N: rows and columns of a matrix.  S = min(M, N).  Q: vectors kept, R: those used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from luthier.checkpoint.delta import Delta
from luthier.checkpoint.reader import check_finite
from luthier.checkpoint.roles import live_roles
from luthier.errors import LuthierError
from luthier.fields import Count, Share
from luthier.flows import Ctx
from luthier.kit.low_rank import leading, project, refine
from luthier.kit.sparse import Selected, budget, matching, per_matrix, pick
from luthier.shapes import Reduces, Tune


class Lift(Tune):
    share: Share | None = None
    """share of each target matrix that trains; null means 0.05 unless lora_rank is given"""
    lora_rank: Count | None = None
    """train as many entries of each matrix as LoRA of this rank would: (rows + columns) * rank"""
    rank: Count | None = None
    """rank of the approximation whose largest entries are chosen; null means 1/32 of the shorter side"""
    every: Count | None = 200
    """steps between two choices of the mask; null keeps the first one"""
    refresh: Literal["warm", "exact"] = "warm"
    """how a later mask is found: from the last one's vectors, or from a new decomposition"""
    block: Literal[1, 4] = 1
    """4 selects 4 x 4 squares instead of single entries"""
    targets: tuple[str, ...] = ("linear",)
    """what may train: globs of parameter names or of roles, or the word linear (every matrix inside the blocks)"""
    count: Literal["leaf", "entry"] = "leaf"
    """whose steps the optimizer's bias correction counts: the matrix's, or each entry's own"""
    reduces_to = Reduces({"share": 1.0}, "tune.full", given={"targets": "linear", "dtype": "float32"})
    departures = (
        "zihanghliu/LIFT 37f5305 to c4a679d: the mask word `lift_sparse` of the released scripts switches their "
        "selection to the smallest entries of the approximation, the paper trains the largest; figures rerun with "
        "those scripts are of another method (tests/test_tune_masks.py::test_the_largest_entries_train)",
    )

    def check(self) -> None:
        if self.share is not None and self.lora_rank is not None:
            raise LuthierError("share and lora_rank are two ways to say the same", where=self.id, do="give one of them")

    def bind(self, model: nn.Module, ctx: Ctx) -> Selected:
        weights = matching(model, self.targets, live_roles(model))
        made = ctx.cached("lift-mask", self._key(weights), lambda: self._first(weights, ctx))
        first = {name: made[f"{name}/index"] for name in weights}
        memory = {} if self.every is None or self.refresh == "exact" else {n: made[f"{n}/vectors"] for n in weights}

        def choose(name: str, weight: Tensor, step: int) -> Tensor:
            old = memory.get(name)
            index, vectors = self.mask(weight, old)
            if old is not None:
                memory[name] = vectors
            return index

        return Selected(
            model, weights, first, partial(Delta.sparse, model=model), choose, self.every, self.count == "entry", memory
        )

    def mask(self, weight: Tensor, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The selection in one parameter (a matrix or a stack of them), and the vectors it came from.

        vectors (stack, S, Q): those of an earlier mask; without them the answer is exact.
        """
        found: list[Tensor] = []

        def choose(i: int, W_MN: Tensor) -> Tensor:
            short = min(W_MN.shape)
            rank = min(self.rank or max(1, round(short / 32)), short)
            if vectors is None:
                V_SQ = leading(W_MN, max(2 * rank, rank + 16))
            else:
                V_SQ = refine(W_MN, vectors[i].to(W_MN.device))
            found.append(V_SQ)
            score_MN = project(W_MN, V_SQ[:, :rank]).abs_()
            return pick(score_MN, budget(W_MN.shape, self.share, self.lora_rank), self.block)

        index = per_matrix(weight, choose)
        return index, torch.stack(found)

    def _first(self, weights: Mapping[str, nn.Parameter], ctx: Ctx) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name in ctx.progress(list(weights), what="choosing the entries to train"):
            check_finite(name, weights[name], where="the model to tune")
            made[f"{name}/index"], made[f"{name}/vectors"] = self.mask(weights[name])
        return made

    def _key(self, weights: Mapping[str, nn.Parameter]) -> dict[str, object]:
        """What the first mask depends on, the weights' bytes included."""
        content = hashlib.sha256()
        for name, p in weights.items():
            content.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            content.update(p.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        fields = {name: getattr(self, name) for name in ("share", "lora_rank", "rank", "block")}
        return {"weights": content.hexdigest(), "form": "gram 2", **fields}
