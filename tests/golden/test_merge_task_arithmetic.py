"""Sums of changes by hand, and numbers from mergekit 0.1.5."""

import pytest
import torch

from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.merge.task_arithmetic import TaskArithmetic

BASE = [0.5, -0.25, 1.0, 0.0, -1.0, 0.75, 0.125, -0.5]
MOVED = [[8, -1, -16, 2, 0, -9, 4, 12], [-8, 3, 5, -6, 1, 10, -4, -2], [7, -2, -3, 24, -5, -20, 11, -13]]


def merged(method, moved=MOVED):
    base = torch.tensor(BASE)
    experts = [{"w": base + torch.tensor(row) / 64} for row in moved]
    return transform_tensors(method, {"w": base}, experts, Context())["w"].tolist()


def test_sum_by_hand():
    sums = [sum(column) / 64 for column in zip(*MOVED, strict=True)]
    assert merged(TaskArithmetic()) == [b + s for b, s in zip(BASE, sums, strict=True)]
    assert merged(TaskArithmetic(scale=0.5)) == [b + s / 2 for b, s in zip(BASE, sums, strict=True)]


def test_a_negative_weight_takes_the_change_away():
    forgets = merged(TaskArithmetic(weights=[-1.0]), MOVED[:1])
    assert forgets == [b - m / 64 for b, m in zip(BASE, MOVED[0], strict=True)]
    assert merged(TaskArithmetic(weights=[1.0, -1.0]), [MOVED[0], MOVED[0]]) == BASE


@pytest.mark.parametrize(
    ("fields", "theirs"),
    [
        ({"weights": [0.7, 0.5, 0.3], "scale": 0.5},
         [0.528906226, -0.248437494, 0.925000012, 0.043750003, -1.0078125, 0.692968726, 0.157031253, -0.47265625]),
        ({"weights": [0.7, 0.5, 0.3], "scale": 1 / 1.5},
         [0.538541675, -0.247916669, 0.899999976, 0.058333337, -1.010416627, 0.673958361, 0.167708337, -0.463541687]),
    ],
)  # fmt: skip
def test_mergekits_numbers(fields, theirs):
    assert merged(TaskArithmetic(**fields)) == pytest.approx(theirs, abs=1e-7)


def test_scale_and_weights_by_depth():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    base = {n: torch.ones(2) for n in names}
    experts = [{n: torch.full((2,), v) for n in names} for v in (2.0, 5.0)]
    method = TaskArithmetic(scale=[1.0, 3.0], weights=[1.0, {"*": 0.0, "*.2.*": 0.5}])
    made = transform_tensors(method, base, experts, Context())
    assert [made[n].tolist() for n in names] == [[2.0] * 2, [3.0] * 2, [10.0] * 2]


def test_one_weight_an_expert():
    with pytest.raises(LuthierError, match="weights: 1 numbers for 3 experts"):
        merged(TaskArithmetic(weights=[1.0]))
    with pytest.raises(LuthierError, match="merge.task_arithmetic: needs a base"):
        transform_tensors(TaskArithmetic(), None, [{"w": torch.ones(2)}], Context())
