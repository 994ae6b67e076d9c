"""Model Stock: pull the average of fine-tunes towards their base, the more the wider the angles between them.

Paper: arXiv 2403.19522.  Fine-tunes of one base lie on a thin shell around a centre, which is better than
they are. Per tensor, with N experts whose changes are at the angle a to one another, the point nearest to that
centre is base + t * mean change with t = N cos a / (1 + (N - 1) cos a): no scale is chosen, no data is needed.
The paper has one angle for all pairs; the tools take a mean over pairs, of cosines or of angles.

Footguns: the experts are to be runs of one task, which differ in seed or settings; changes at right angles
give t = 0, the base, so specialists of different tasks are lost. Changes that oppose each other give a
negative t, away from them all, without bound near cos a = -1 / (N - 1); at that point itself the base is kept.
A tensor that an expert did not move counts as at a right angle. With one expert t is 1.

R: rows.  C: columns.  E: experts.  P: pairs of them.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.flows import Ctx, Piece
from luthier.kit.angles import cosines, gram, grams
from luthier.kit.deltas import changes
from luthier.shapes import Reduces, Transform

SINGULAR = 1e-6
"""Smallest denominator of t."""


class ModelStock(Transform):
    filter_wise: bool = False
    """an angle for each row of a matrix rather than for the tensor"""
    average: Literal["cosine", "angle"] = "cosine"
    """what is averaged over pairs of more than two experts: their cosines (mergekit) or angles (fusion-bench)"""

    granularity = "row"
    reduces_to = (
        Reduces({}, "identity", given={"experts": 1}),
        Reduces({"filter_wise": True}, "identity", given={"experts": 1}),
    )
    departures = (
        "mergekit 0.1.5 (git a6e4028): `model_stock` divides by a product of norms of at least 1e-6, so changes whose "
        "norms are below a thousandth count as nearly at right angles and those tensors stay near the base "
        "(tests/golden/test_merge_model_stock.py::test_mergekit_holds_back_short_changes)",
    )

    def survey(self, inputs: Any, ctx: Ctx) -> dict[str, Tensor] | None:
        """t by tensor name, unless each row has its own."""
        if self.filter_wise:
            return None
        count = len(inputs.experts)
        return {name: self._share(gram_EE, count) for name, gram_EE in grams(inputs, changes).items()}

    def _share(self, gram_EE: Tensor, count: int) -> Tensor:
        """t from the inner products of the changes of `count` experts, (..., E, E)."""
        if count == 1:
            return torch.ones_like(gram_EE[..., 0, 0])
        one_P, other_P = torch.triu_indices(count, count, 1, device=gram_EE.device)
        cosines_P = cosines(gram_EE)[..., one_P, other_P]
        mean = cosines_P.mean(-1) if self.average == "cosine" else cosines_P.acos().mean(-1).cos()
        below = 1 + (count - 1) * mean
        return torch.where(below.abs() < SINGULAR, 0.0, count * mean / below)

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        changes_RC = changes(tensors)
        if self.filter_wise:
            share = self._share(gram(changes_RC), len(changes_RC))[:, None]
        else:
            share = ctx.survey[tensors.name]
        total_RC = functools.reduce(torch.add, changes_RC)
        assert tensors.base is not None
        return torch.addcmul(tensors.base, total_RC, (share / len(changes_RC)).to(total_RC))
