"""The largest of every block of consecutive entries: exactly so many, in one partition, without a sort.

B, M: blocks and entries of a block.  N: entries of a stretch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from luthier.kit.select import kept


def largest_in_blocks(values_N: Tensor, block: int, density: float, later_N: Tensor | None = None) -> Tensor:
    """Which entries are among the largest magnitudes of their block: `kept(density, block)` of each, True or False.

    block: up to 65,536.  later_N: entries that come after all others of their block, whatever their magnitude.
    Of equals the first in place win. What is left at the end is a block of its own, however short.
    """
    whole = values_N.numel() // block * block
    found_N = torch.empty_like(values_N, dtype=torch.bool)
    for part, width in ((slice(0, whole), block), (slice(whole, None), values_N.numel() - whole)):
        if values_N[part].numel():
            later = None if later_N is None else later_N[part].view(-1, width)
            found_N[part] = _largest(values_N[part].view(-1, width), kept(density, width), later).view(-1)
    return found_N


def _largest(values_BM: Tensor, keep: int, later_BM: Tensor | None) -> Tensor:
    if keep == 0:
        return torch.zeros_like(values_BM, dtype=torch.bool)
    width = values_BM.shape[1]
    place_M = torch.arange(width - 1, -1, -1, device=values_BM.device)
    key_BM = values_BM.abs().view(torch.int32)  # floats that are not negative are ordered like their bits,
    if later_BM is not None:
        key_BM |= later_BM.int() << 31  # and with the sign's bit set they come below all others, in the same order
    key_BM = key_BM.long().bitwise_left_shift_(16).add_(place_M)  # no two of a block are the same
    return key_BM >= _rank(key_BM, width - keep)


def _rank(key_BM: Tensor, place: int) -> Tensor:
    """(B, 1): of each row what stands at `place` in ascending order."""
    if key_BM.device.type == "cpu":  # numpy partitions four times faster than kthvalue
        return torch.from_numpy(np.partition(key_BM.numpy(), place, axis=1)[:, place : place + 1])
    return key_BM.kthvalue(place + 1, dim=1, keepdim=True).values
