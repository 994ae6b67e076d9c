"""CABS: experts take turns; each keeps the largest changes of every block that those before have left.

Paper: arXiv 2503.01874.  Balanced: of each `block` of consecutive weights the same number is kept (n:m pruning), so
that no region of the model is emptied. Conflict-aware: what an expert keeps the later ones may not, so that kept
changes do not overlap; then they are added. The paper's 64:256 is `density` 0.25 of `block` 256.

Notable: the order of the experts is theirs in the recipe, and matters. Where the free entries of a block do not
suffice, all of them are kept and the largest of the others: overlap is as small as the density allows. An entry that
an expert keeps without having moved it stays free.

Footguns: from experts times density above 1 on there is overlap. Blocks run over rows. At the end of a tensor there
may be a shorter block, which keeps its share rounded down, but at least one.

N: entries of a stretch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.fields import Count, Schedule, Unit
from luthier.flows import Ctx, Piece
from luthier.kit.blocks import largest_in_blocks
from luthier.kit.deltas import add, changes, each, one_each
from luthier.kit.schedule import at
from luthier.shapes import Reduces, Transform

STRETCH = 1 << 16
"""Entries shown at once; blocks must not straddle two of them."""


class Cabs(Transform):
    density: Unit = 0.25
    """share of each block that an expert keeps: a number, a list by depth, or {glob: either}"""
    block: Count = 256
    """consecutive entries that are pruned together: a power of two up to 65,536"""
    scale: Schedule = 1.0
    """factor of the summed changes: a number, a list by depth, or {glob: either}"""
    weights: tuple[Schedule, ...] | None = None
    """one factor an expert within the sum; none means 1 each"""

    ordered = True
    partial = True
    reduces_to = (
        Reduces({"density": 1.0}, "merge.task_arithmetic"),
        Reduces({"scale": 0.0}, "base"),
    )
    departures = (
        "zongzhenyang/CABS a41f891: from half a block on, prune_task_vector_7b.py keeps m - n + m/2 entries of the "
        "second expert instead of n; at 64:128 it is not pruned at all; ours keeps n, the free ones first "
        "(tests/golden/test_merge_cabs.py::test_released_code_keeps_more_of_the_second)",
        "zongzhenyang/CABS a41f891: where a tensor's size is no multiple of m, prune_task_vector_7b.py breaks off and "
        "`n_m_block_pruning` drops the changes at the end, small tensors whole; ours prunes a shorter block "
        "(tests/golden/test_merge_cabs.py::test_released_code_drops_the_end)",
    )

    def check(self) -> None:
        if STRETCH % self.block:
            raise LuthierError(
                f"{self.block} does not divide 65,536", where=f"{self.id}.block", do="use a power of two"
            )

    def plan(self, inputs: Any) -> Any:
        one_each("weights", self.weights, inputs)
        return inputs

    def transform(self, tensors: Piece, ctx: Ctx) -> Tensor:
        density = at(self.density, tensors.name, tensors.depth)
        moved = changes(tensors)
        total_N, taken_N = torch.zeros_like(moved[0]), torch.zeros_like(moved[0], dtype=torch.bool)
        for change_N, weight in zip(moved, each(self.weights, 1.0, tensors, len(moved)), strict=True):
            change_N.mul_(largest_in_blocks(change_N, self.block, density, taken_N))
            total_N.add_(change_N, alpha=weight)
            taken_N |= change_N != 0
        return add(tensors, total_N, at(self.scale, tensors.name, tensors.depth))
