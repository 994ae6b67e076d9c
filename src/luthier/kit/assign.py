"""Which thing stands for which: one to one, with the largest total likeness."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from luthier.errors import LuthierError

ROWS = 1024
"""rows of a table of likeness that are made at once"""


def assigned(like: Callable[[slice], Tensor], count: int) -> Tensor:
    """For each of `count` things the other that stands for it; itself, unless others are more alike in total.

    like: rows of the table of likeness, one a thing, one column an other.  If every thing's most alike is
    another one, that is the answer; else the Hungarian method finds it (scipy).
    """
    found, same = [], 0.0
    for start in range(0, count, ROWS):
        rows = slice(start, min(start + ROWS, count))
        table = like(rows)
        found.append(table.max(1))
        same += float(table[:, rows].diagonal().double().sum())
    best, order = sum(float(f.values.double().sum()) for f in found), torch.cat([f.indices for f in found])
    if len(order.unique()) < count:
        table = torch.cat([like(slice(start, min(start + ROWS, count))) for start in range(0, count, ROWS)])
        order = _hungarian(table)
        best = float(table.gather(1, order[:, None]).double().sum())
    return order if best > same else torch.arange(count)


def _hungarian(table: Tensor) -> Tensor:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        do = "pip install 'luthier[protect]'"
        raise LuthierError("units that resemble one another are told apart by scipy", do=do) from None
    return torch.from_numpy(linear_sum_assignment(table.numpy(), maximize=True)[1])


def cosines(first_NX: Tensor, second_MX: Tensor) -> Tensor:
    """The cosine of every row with every other's, fp32; 0 for a row of zeros."""
    first_NX, second_MX = (torch.nn.functional.normalize(t, dim=1).float() for t in (first_NX, second_MX))
    return first_NX @ second_MX.T
