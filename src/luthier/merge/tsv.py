"""TSV-Merge: of each expert's change the strongest singular directions, made orthogonal to the others', summed.

Paper: arXiv 2412.00081.  Per matrix: T experts' changes are cut to their r/T strongest of r singular directions,
which are set side by side; the left and the right ones are each replaced by the nearest orthonormal set (orthogonal
Procrustes), and the matrix is put together again with its singular values. What is no matrix is averaged.

Notable: no SVD is taken, only eigendecompositions of the short side (`kit.spectra`). Directions without weight are
left out, so changes of low rank (adapters) are merged by what they have.

Footguns: an embedding is a matrix like others here. Stacked experts (three dimensions) are averaged. The left-over
r - T floor(r/T) directions are nobody's.

M, N: rows and columns.  S, L: the short and the long side.  Q: directions of all experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.fields import Schedule, Unit
from luthier.flows import Ctx, Piece
from luthier.kit.deltas import add, changes
from luthier.kit.schedule import at
from luthier.kit.select import kept
from luthier.kit.spectra import beside, narrow, orthonormal, strongest, wide
from luthier.shapes import Reduces, Transform


class Tsv(Transform):
    scale: Schedule = 1.0
    """factor of the merged change: a number, a list by depth, or {glob: either}"""
    share: Unit | None = None
    """share of its singular directions that each expert keeps; none means 1/T, the paper's"""

    granularity = "tensor"
    partial = True
    reduces_to = (
        Reduces({}, "merge.task_arithmetic", given={"experts": 1}, tolerance=1e-6),
        Reduces({"scale": 0.0}, "base"),
    )
    departures = (
        "AntoAndGar/task_singular_vectors a6c9718, tanganke/fusion_bench 1f1eba8: a change of rank below r/T fills its "
        "share with the arbitrary vectors an SVD gives for the value zero, and these turn the other experts' "
        "directions; merges of adapters depend on the linear algebra library; ours leaves such directions out "
        "(tests/golden/test_merge_tsv.py::test_released_code_fills_low_ranks_with_noise)",
        "AntoAndGar/task_singular_vectors a6c9718, tanganke/fusion_bench 1f1eba8: where experts' directions coincide, "
        "the orthonormal set is completed by arbitrary vectors, which enter the merge at full weight; ours keeps to "
        "what the experts span (tests/golden/test_merge_tsv.py::test_released_code_invents_where_experts_agree)",
    )

    def cubic(self, experts: int) -> float:
        return 2.0 + experts / 2

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        moved = changes(tensors)
        merged = self._joined(moved, tensors) if len(tensors.shape) == 2 else torch.stack(moved).mean(0)
        return add(tensors, merged, at(self.scale, tensors.name, tensors.depth))

    def _joined(self, moved: list[Tensor], piece: Piece) -> Tensor:
        """The merged change of a matrix."""
        short = min(piece.shape)
        if self.share is None:
            count = max(1, short // len(moved))
        else:
            count = kept(at(self.share, piece.name, piece.depth), short)
        U_SQ, sigma_Q, V_LQ = beside([strongest(wide(change_MN), count) for change_MN in moved])
        return narrow((orthonormal(U_SQ) * sigma_Q) @ orthonormal(V_LQ).T, moved[0])
