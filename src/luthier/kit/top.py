"""The k largest of many scores: exact, in order, without a sort."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def threshold(score: Tensor, k: int) -> Tensor:
    """The k-th largest value of a flat, non-negative fp32 `score`, as a scalar tensor.

    On the CPU the values are compared as integers, which for non-negative floats is the same order
    and, by numpy's vectorised partition, some twenty times faster than `kthvalue`.
    """
    place = score.numel() - k
    if score.device.type == "cpu" and score.dtype == torch.float32:
        keys = np.partition(score.view(torch.int32).numpy(), place)
        return torch.tensor(keys[place : place + 1].copy()).view(torch.float32)[0]
    return score.kthvalue(place + 1).values


def top_indices(score: Tensor, k: int) -> Tensor:
    """Ascending flat indices (int64) of exactly the k largest entries of a non-negative score.

    Among equals the first ones are taken, so the answer depends on nothing but the values.
    """
    flat = score.reshape(-1)
    k = min(k, flat.numel())
    least = threshold(flat, k)
    chosen = (flat >= least).nonzero().view(-1)
    surplus = chosen.numel() - k
    if surplus:
        equal = (flat[chosen] == least).nonzero().view(-1)
        keep = torch.ones_like(chosen, dtype=torch.bool)
        keep[equal[-surplus:]] = False
        chosen = chosen[keep]
    return chosen


def jaccard(a: Tensor, b: Tensor) -> float:
    """Size of the intersection over size of the union of two sets of distinct indices."""
    both = torch.isin(a, b).sum().item()
    return both / max(a.numel() + b.numel() - both, 1)
