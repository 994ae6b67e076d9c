"""Averages by hand, and numbers from mergekit 0.1.5."""

import pytest
import torch

from luthier.engine.pieces import Inputs, Memory
from luthier.engine.slices import sliced
from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.merge.linear import Linear

BASE = [0.5, -0.25, 1.0, 0.0, -1.0, 0.75, 0.125, -0.5]
MOVED = [[8, -1, -16, 2, 0, -9, 4, 12], [-8, 3, 5, -6, 1, 10, -4, -2], [7, -2, -3, 24, -5, -20, 11, -13]]


def merged(method, base=None):
    experts = [{"w": torch.tensor(BASE) + torch.tensor(row) / 64} for row in MOVED]
    return transform_tensors(method, base, experts, Context())["w"].tolist()


def test_mean_by_hand():
    means = [(a + b + c) / 3 / 64 for a, b, c in zip(*MOVED, strict=True)]
    assert merged(Linear()) == pytest.approx([b + m for b, m in zip(BASE, means, strict=True)], abs=1e-7)


@pytest.mark.parametrize(
    ("fields", "theirs"),
    [
        ({"weights": [0.7, 0.5, 0.3], "normalize": False},
         [0.807812512, -0.371874988, 1.350000024, 0.087500006, -1.515625119, 1.010937452, 0.251562506, -0.6953125]),
        ({"weights": [3.0, 1.0, 1.0]},
         [0.571874976, -0.25625, 0.856249988, 0.075000003, -1.012500048, 0.634374976, 0.18437500, -0.434374988]),
    ],
)  # fmt: skip
def test_mergekits_numbers(fields, theirs):
    assert merged(Linear(**fields)) == pytest.approx(theirs, abs=1e-7)


def test_base_is_not_averaged_in():
    assert merged(Linear(), {"w": torch.full((8,), 100.0)}) == merged(Linear())


def test_weights_by_depth_and_name():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["model.norm.weight"]
    experts = [{n: torch.full((2,), v) for n in names} for v in (1.0, 5.0)]
    method = Linear(weights=[[1.0, 0.0], {"*": [0.0, 1.0], "*norm*": 3.0}])
    made = transform_tensors(method, None, experts, Context())
    assert [made[n].tolist() for n in names] == [[1.0] * 2, [3.0] * 2, [5.0] * 2, [5.0] * 2]


def test_weights_that_cancel():
    with pytest.raises(LuthierError, match="^weights: they sum to 0 at w"):
        merged(Linear(weights=[1.0, -2.0, 1.0]))
    made = merged(Linear(weights=[1.0, -2.0, 1.0], normalize=False))
    assert made == pytest.approx([(a - 2 * b + c) / 64 for a, b, c in zip(*MOVED, strict=True)])
    assert merged(Linear(weights=[1e-7, 1e-7, 1e-7])) == pytest.approx(merged(Linear()), rel=1e-5)


def test_one_weight_an_expert():
    with pytest.raises(LuthierError, match="weights: 2 numbers for 3 experts"):
        merged(Linear(weights=[0.5, 0.5]))
    with pytest.raises(LuthierError, match="weights: no pattern matches 'w'"):
        merged(Linear(weights=[{"x": 1.0}, 1.0, 1.0]))


def test_an_expert_alone_in_a_slice_keeps_its_weight():
    """Layers of one expert each: the mean of one is itself, a sum its own weight's share."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    experts = tuple(Memory({n: torch.full((1, 4), v) for n in names}) for v in (1.0, 2.0))
    for normalize, wanted in ((True, [[1.0] * 4, [2.0] * 4]), (False, [[3.0] * 4, [10.0] * 4])):
        method = Linear(weights=[3.0, 5.0], normalize=normalize)
        whole = Inputs(None, experts, experts[0].tensors, method.granularity, config={"num_hidden_layers": 2})
        inputs = method.plan(sliced(whole, [[(0, 0, 1)], [(1, 1, 2)]], method))
        made = [method.transform(piece, Context()).flatten().tolist() for piece in inputs.pieces()]
        assert made == wanted
