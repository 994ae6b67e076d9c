"""Several changes into one: added up, or those alone that agree with the sign the larger mass elects (TIES).

N: entries of a stretch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.flows import Piece
from luthier.kit.deltas import each


def weigh_(changes: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Multiply each change by its factor, in place; their sum, in order."""
    for change_N, factor in zip(changes, factors, strict=True):
        if factor != 1:
            change_N.mul_(factor)
    return functools.reduce(torch.add, changes)


def tied(vote: str, inputs: Any, summed: Callable[[Piece], Tensor]) -> float | None:
    """What a tie elects: None without a vote ("none"), 1 for "plus"; for "majority" the sign that most entries of
    all tensors elect by their weighted sums, 0 where these balance."""
    if vote != "majority":
        return {"none": None, "plus": 1.0}[vote]
    votes = sum(inputs.each(lambda piece: float(summed(piece).sign().sum())))
    return float((votes > 0) - (votes < 0))


def elect_(changes: Sequence[Tensor], total_N: Tensor, weights: Sequence[float], tie: float, normalize: bool) -> Tensor:
    """Of weighted changes and their sum: the sum of those that have the sum's sign, or their weighted mean.

    tie: the sign of entries whose sum is 0; 0 leaves them 0.  normalize: divide by the weights of those that
    agree.  The changes are used up.
    """
    sign_N = total_N.sign()
    sign_N.add_(1 - sign_N.abs(), alpha=tie)
    merged_N, count_N = torch.zeros_like(sign_N), torch.zeros_like(sign_N)
    for weight, change_N in zip(weights, changes, strict=True):
        agreeing_N = change_N.mul_(sign_N).clamp_(min=0)  # the magnitude, zero where the sign is the other
        merged_N.add_(agreeing_N)
        count_N.add_(agreeing_N.sign_(), alpha=weight)
    if normalize:
        merged_N.div_(count_N.add_(1 - count_N.sign().abs_()))  # where nobody agrees, by 1
    return merged_N.mul_(sign_N)


def fuse_(
    changes: Sequence[Tensor], factors: Sequence[float], weights: Sequence[float], tie: float | None, normalize: bool
) -> Tensor:
    """Changes times their factors into one. tie: None adds them all; else see `elect_`.

    factors: the weights, and what else a change is multiplied by.  normalize: divide by the sum of the weights,
    of all or of those that agree.  The changes are used up.
    """
    if tie is not None:
        return elect_(changes, weigh_(changes, factors), weights, tie, normalize)
    total_N = torch.zeros_like(changes[0])
    for factor, change_N in zip(factors, changes, strict=True):
        total_N.add_(change_N, alpha=factor)
    return total_N.div_(sum(weights)) if normalize else total_N


def divisible(weights: Sequence[Any] | None, inputs: Any) -> None:
    """Refuse, before anything is read, weights that sum to 0 where all are divided by their sum.

    inputs: what a Transform's `plan` is given.
    """
    for name, tensor in inputs.tensors.items() if weights is not None else ():
        if name not in inputs.reads and abs(sum(each(weights, 1.0, tensor, len(inputs.experts)))) < 1e-8:
            raise LuthierError(f"they sum to 0 at {name}", where="weights", do="set normalize: false")
