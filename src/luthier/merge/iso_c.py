"""Iso-C and Iso-CTS: the experts' summed change with all its singular values made equal.

Paper: arXiv 2502.04959.  Per matrix: the sum U Σ Vᵀ of all changes becomes σ U Vᵀ, where σ is the mean singular
value, so that directions in which few experts moved count as much as those they share (Iso-C). With `common`
below 1 the weakest directions of the sum give way, in equal number, to the strongest that each expert has outside
of the rest; both sides are made orthonormal anew (Iso-CTS). What is no matrix is averaged.

Notable: no SVD is taken, only eigendecompositions of the short side (`kit.spectra`). The mean is over directions
that have weight; the others stay empty.

Footguns: the weakest directions are lifted to the mean, and in experts stored in 16 bits these hold rounding: choose
`scale` on held-out data. An embedding is a matrix like others here. Stacked experts (three dimensions) are averaged.

M, N: rows and columns.  S, L: the short and the long side.  Q: directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.fields import Schedule, Unit
from luthier.flows import Ctx, Piece
from luthier.kit.deltas import add, changes
from luthier.kit.schedule import at
from luthier.kit.spectra import beside, narrow, orthonormal, strongest, wide
from luthier.shapes import Reduces, Transform


class IsoC(Transform):
    scale: Schedule = 1.0
    """factor of the merged change: a number, a list by depth, or {glob: either}"""
    common: Unit = 1.0
    """share of the directions that come from the sum: 1 is Iso-C, the paper's Iso-CTS has 0.8"""

    granularity = "tensor"
    partial = True
    reduces_to = (
        Reduces({"scale": 0.0}, "base"),
        Reduces({}, "identity", given={"experts": 1, "rank": 1}, tolerance=1e-5),
        Reduces({"common": 0.0}, "identity", given={"experts": 1, "rank": 1}, tolerance=1e-5),
    )
    departures = (
        "danielm1405/iso-merging d34010a, tanganke/fusion_bench b29d045: `iso_c` gives the mean singular value also to "
        "directions in which nothing moved, in the arbitrary pairs an SVD has for the value zero; merges of adapters "
        "get changes as large as the trained ones that nobody trained; ours leaves such directions empty "
        "(tests/golden/test_merge_iso_c.py::test_released_code_fills_low_ranks_with_noise)",
    )

    def cubic(self, experts: int) -> float:
        return 1.0 if self.common == 1.0 else 1.0 + experts

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        moved = changes(tensors)
        if len(tensors.shape) == 2:
            merged = self._even(moved, at(self.common, tensors.name, tensors.depth))
        else:
            merged = torch.stack(moved).mean(0)
        return add(tensors, merged, at(self.scale, tensors.name, tensors.depth))

    def _even(self, moved: list[Tensor], common: float) -> Tensor:
        """The merged change of a matrix."""
        each_SL = [wide(change_MN) for change_MN in moved]
        count, own = _shares(min(moved[0].shape), len(moved), common)
        U_SQ, sigma_Q, V_LQ = strongest(sum(each_SL[1:], each_SL[0]), count)
        if own:
            by_rows = moved[0].shape[0] <= moved[0].shape[1]  # the paper projects the rows' side, short or long
            rest = [A_SL - (U_SQ @ (U_SQ.T @ A_SL) if by_rows else (A_SL @ V_LQ) @ V_LQ.T) for A_SL in each_SL]
            U_SQ, sigma_Q, V_LQ = beside([(U_SQ, sigma_Q, V_LQ), *(strongest(A_SL, own) for A_SL in rest)])
            U_SQ, V_LQ = orthonormal(U_SQ), orthonormal(V_LQ)
        level = sigma_Q.sum() / max(1, len(sigma_Q))
        return narrow(level * U_SQ @ V_LQ.T, moved[0])


def _shares(short: int, experts: int, common: float) -> tuple[int, int]:
    """How many directions come from the sum, and how many from each expert; together they fill the short side."""
    own = min(round((short - int(short * common)) / experts), short // experts)
    return short - own * experts, own
