"""Several changes into one: added up, or those alone that agree with the sign the larger mass elects (TIES).

N: entries of a stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.flows import Piece
from luthier.kit.compiled import flat, kernels
from luthier.kit.deltas import each
from luthier.kit.select import positive

SIGN = -(1 << 31)
"""The sign's bit, of fp32 seen as integers."""


def weigh_(changes: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Multiply each change by its factor, in place; their sum, in order, which for one change is the change itself."""
    if (compiled := kernels()) and changes[0].device.type == "cpu":
        total_N = changes[0] if len(changes) == 1 else torch.empty_like(changes[0])
        for number, (change_N, factor) in enumerate(zip(changes, factors, strict=True)):
            compiled.weigh(flat(change_N), np.float32(factor), flat(total_N), number == 0)
        return total_N
    for change_N, factor in zip(changes, factors, strict=True):
        if factor != 1:
            change_N.mul_(factor)
    if len(changes) == 1:
        return changes[0]
    total_N = changes[0] + changes[1]
    for change_N in changes[2:]:
        total_N.add_(change_N)
    return total_N


def majority(changes: Sequence[Tensor], factors: Sequence[float]) -> float:
    """How many entries have a weighted sum above 0, less those below. The changes are used up."""
    return float(weigh_(changes, factors).sign().sum())


def tied(vote: str, inputs: Any, votes: Callable[[Piece], float]) -> float | None:
    """What a tie elects: None without a vote ("none"), 1 for "plus"; for "majority" the sign that most entries of
    all tensors elect, 0 where these balance.

    votes: of a piece, how many of its weighted sums are above 0, less those below.
    """
    if vote != "majority":
        return {"none": None, "plus": 1.0}[vote]
    found = sum(inputs.each(votes))
    return float((found > 0) - (found < 0))


def elect_(changes: Sequence[Tensor], total_N: Tensor, weights: Sequence[float], tie: float, normalize: bool) -> Tensor:
    """Of weighted changes and their sum: the sum of those that have the sum's sign, or their weighted mean.

    tie: the sign of entries whose sum is 0; 0 leaves them 0.  normalize: divide by the weights of those that
    agree.  The changes are used up.
    """
    if (compiled := kernels()) and total_N.device.type == "cpu":
        return _elected(compiled, changes, total_N, weights, tie, normalize)
    sign_N = (total_N + 0.0 if tie >= 0 else 0.0 - total_N).view(torch.int32)  # of a sum of 0 it is plus
    sign_N.bitwise_and_(SIGN)
    if tie < 0:
        sign_N.bitwise_xor_(SIGN)
    merged_N, counts = torch.zeros_like(total_N), _Counts(weights)
    for weight, change_N in zip(weights, changes, strict=True):
        change_N.view(torch.int32).bitwise_xor_(sign_N)
        merged_N.add_(change_N.clamp_(min=0))  # the magnitude, zero where the sign is the other
        if normalize:
            counts.add_(change_N, weight)
    if normalize:
        merged_N.div_(counts.total_N())
    if tie == 0:
        merged_N.masked_fill_(total_N == 0, 0.0)
    merged_N.view(torch.int32).bitwise_xor_(sign_N)
    return merged_N


def _elected(
    compiled: Any, changes: Sequence[Tensor], total_N: Tensor, weights: Sequence[float], tie: float, normalize: bool
) -> Tensor:
    """`elect_` by kernels."""
    counted = alike(weights)
    merged_N, counts_N = torch.zeros_like(total_N), torch.zeros_like(total_N)
    total, merged, counts = map(flat, (total_N, merged_N, counts_N))
    for weight, change_N in zip(weights, changes, strict=True):
        compiled.agree(flat(change_N), total, tie < 0, np.float32(1 if counted else weight), merged, counts)
    unit = np.float32(weights[0] if counted else 1)
    compiled.elected(total, tie < 0, tie == 0, normalize, unit, counts, merged)
    return merged_N


def alike(weights: Sequence[float]) -> bool:
    """Whether votes can be counted, and the weight multiplied in afterwards."""
    return len(set(weights)) == 1 and weights[0] != 0 and len(weights) < 256


class _Counts:
    """The weights of the changes that agree, added up entry by entry; where none does, a divisor that is not 0."""

    def __init__(self, weights: Sequence[float]):
        self.alike = alike(weights)  # then bytes count, 4 times faster
        self.weight, self.sum_N = weights[0], None

    def add_(self, agreeing_N: Tensor, weight: float) -> None:
        """agreeing_N: magnitudes of one change, 0 where it does not agree; used up."""
        found_N = positive(agreeing_N).view(torch.uint8) if self.alike else agreeing_N.sign_().mul_(weight)
        self.sum_N = found_N if self.sum_N is None else self.sum_N.add_(found_N)

    def total_N(self) -> Tensor:
        assert self.sum_N is not None
        if self.alike:
            number_N = self.sum_N.clamp_(min=1).to(torch.float32)
            return number_N if self.weight == 1 else number_N.mul_(self.weight)
        return self.sum_N.add_(1 - self.sum_N.sign().abs_())


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
        given = each(weights, 1.0, tensor, len(inputs.experts))
        if name in inputs.reads:
            given = [given[model] for model, _ in inputs.reads[name] if model is not None]
        if abs(sum(given)) < 1e-8:
            raise LuthierError(f"they sum to 0 at {name}", where="weights", do="set normalize: false")
