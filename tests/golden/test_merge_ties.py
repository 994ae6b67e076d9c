"""TIES against hand calculation, a slow twin in plain Python, and numbers from mergekit 0.1.5."""

import itertools
import math
import random

import pytest
import torch

from luthier.engine.pieces import CHUNK
from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit import select
from luthier.kit.bracket import Bracket
from luthier.kit.context import Context
from luthier.merge.ties import Ties

# Changes in sixty-fourths, so that every sum below is exact. Entry 0 cancels between the first two.
BASE = [0.5, -0.25, 1.0, 0.0, -1.0, 0.75, 0.125, -0.5]
MOVED = [[8, -1, -16, 2, 0, -9, 4, 12], [-8, 3, 5, -6, 1, 10, -4, -2], [7, -2, -3, 24, -5, -20, 11, -13]]


def merged(method, base, changes, name="w"):
    """base, changes: numbers; the result's entries in fp32."""
    base = torch.tensor(base)
    experts = [{name: base + torch.tensor(c)} for c in changes]
    return transform_tensors(method, {name: base}, experts, Context(step="golden"))[name].tolist()


def hand(method, moved=MOVED, base=BASE):
    return merged(method, base, [[m / 64 for m in row] for row in moved])


def test_by_hand():
    """Half of each: {8, -16, -9, 12}, {-8, 5, -6, 10}, {24, -20, 11, -13}. Sums: 0, none, -11, 18, none, -19,
    11, -1: two up, three down, so the cancelled entry goes down with the second expert's -8 alone."""
    means = [-8, 0, -16, 24, 0, (-9 - 20) / 2, 11, -13]
    assert hand(Ties(density=0.5)) == [b + m / 64 for b, m in zip(BASE, means, strict=True)]
    assert hand(Ties(density=0.5, scale=2.0)) == [b + m / 32 for b, m in zip(BASE, means, strict=True)]
    summed = [-8, 0, -16, 24, 0, -29, 11, -13]
    assert hand(Ties(density=0.5, normalize=False)) == [b + m / 64 for b, m in zip(BASE, summed, strict=True)]


def test_majority_is_counted_not_weighed():
    """Entry 0 cancels; one entry goes far up, two go a little down: the majority is down."""
    moved = [[8, 60, -1, -1], [-8, 60, -1, -1]]
    assert hand(Ties(density=1.0), moved, [0.0] * 4) == [-8 / 64, 60 / 64, -1 / 64, -1 / 64]
    assert hand(Ties(density=1.0, on_tie="plus"), moved, [0.0] * 4)[0] == 8 / 64
    up = [[8, 60, 1, -1], [-8, 60, 1, -1]]
    assert hand(Ties(density=1.0), up, [0.0] * 4)[0] == 8 / 64


def test_density_keeps_what_it_says():
    """Rounded down, at least one; all that equal the smallest kept stay too; 0 keeps the base."""
    row = [[1.0, -2.0, 3.0, 4.0, -5.0, 6.0, 7.0]]
    for density, keep in [(0.0, 0), (0.1, 1), (0.3, 2), (0.57, 3), (0.6, 4), (0.99, 6), (1.0, 7)]:
        kept = [x for x in merged(Ties(density=density), [0.0] * 7, row) if x]
        assert kept == [x for x in row[0] if abs(x) > 7 - keep]
    assert merged(Ties(density=0.25), [0.0] * 4, [[2.0, -2.0, 1.0, 2.0]]) == [2.0, -2.0, 0.0, 2.0]


def test_model_scope_weighs_tensors_against_each_other():
    """One tensor moved ten times as far: it keeps everything, the other nothing, unless scope is tensor."""
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    expert = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([10.0, 20, 30, 40])}
    whole = transform_tensors(Ties(density=0.5), base, [expert], Context())
    each = transform_tensors(Ties(density=0.5, scope="tensor"), base, [expert], Context())
    assert (whole["a"].tolist(), whole["b"].tolist()) == ([0.0] * 4, [10.0, 20, 30, 40])
    assert (each["a"].tolist(), each["b"].tolist()) == ([0.0, 0, 3, 4], [0.0, 0, 30, 40])


def test_majority_is_the_models_even_when_trimmed_by_tensor():
    """Entries of `b` outvote those of `a`."""
    base = {"a": torch.zeros(3), "b": torch.zeros(4)}
    experts = [
        {"a": torch.tensor([s, 1.0, 1.0]), "b": torch.tensor([-1.0, -1.0, -1.0, -1.0])} for s in (2.0, -2.0)
    ]  # fmt: skip
    made = transform_tensors(Ties(density=1.0, scope="tensor"), base, experts, Context())
    assert made["a"].tolist() == [-2.0, 1.0, 1.0]


def test_schedules_by_depth_and_name():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["lm_head.weight"]
    base = {n: torch.zeros(4) for n in names}
    expert = {n: torch.tensor([1.0, 2.0, 3.0, 4.0]) for n in names}
    method = Ties(density={"*": [0.25, 1.0], "lm_head*": 0.5}, scope="tensor", scale=[0.0, 2.0])
    made = [transform_tensors(method, base, [expert], Context())[n].tolist() for n in names]
    assert made == [[0.0] * 4, [0.0, 0.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0], [0.0, 0.0, 6.0, 8.0]]


def test_weights_may_vary_by_name():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    experts = [{n: torch.tensor([1.0, 1.0]) for n in base}, {n: torch.tensor([3.0, -2.0]) for n in base}]
    method = Ties(density=1.0, weights=[1.0, {"*": 1.0, "b": 3.0}])
    made = transform_tensors(method, base, experts, Context())
    assert made["a"].tolist() == [2.0, -2.0] and made["b"].tolist() == [2.5, -2.0]


# mergekit 0.1.5, `merge_tensors(..., base_index=0)` in fp32 on the numbers above.
MERGEKIT = [
    (
        {"weights": [1.0, 1.0, 1.0], "density": 0.5},
        [0.625, -0.25, 0.75, 0.375, -1.0, 0.5234375, 0.296875, -0.703125],
    ),
    (
        {"weights": [0.7, 0.5, 0.3], "densities": [0.5, 0.75, 0.25], "scale": 0.8},
        [0.600000024, -0.212500006, 0.800000012, 0.300000012, -1.0, 0.596249998, 0.075000003, -0.349999994],
    ),
    (
        {"weights": [0.7, 0.5, 0.3], "density": 0.5, "normalize": False},
        [0.587499976, -0.25, 0.824999988, 0.112500004, -1.0, 0.557812512, 0.176562503, -0.368750006],
    ),
    (
        {"weights": [1.0, 1.0, -1.0], "density": 1.0},
        [0.265625, -0.171875, 0.75, -0.46875, -0.90625, 1.21875, -0.109375, -0.109375],
    ),
]


@pytest.mark.parametrize(("fields", "theirs"), MERGEKIT)
def test_mergekit_form_is_mergekits(fields, theirs):
    assert hand(Ties(scope="tensor", on_tie="plus", **fields)) == pytest.approx(theirs, abs=1e-7)


def test_a_negative_weight_alone_divides_by_itself():
    """As in mergekit: the weighted changes 1 and -3 elect minus, and -3 over the weight -1 is 3."""
    assert merged(Ties(density=1.0, weights=[1.0, -1.0]), [0.0], [[1.0], [3.0]]) == [3.0]


def test_the_default_keeps_a_fifth():
    row = [float(v) for v in range(1, 21)]
    assert [v for v in merged(Ties(), [0.0] * 20, [row]) if v] == [17.0, 18.0, 19.0, 20.0]


def test_mergekit_form_differs_from_the_paper():
    """Two tensors of different reach, weights that turn a vote, a tie: each changes the result."""
    theirs = hand(Ties(scope="tensor", on_tie="plus", weights=[0.7, 0.5, 0.3], density=0.5))
    assert theirs != hand(Ties(density=0.5))
    assert theirs[0] > BASE[0] > hand(Ties(density=0.5))[0]
    assert hand(Ties(density=1.0)) != hand(Ties())  # their default trims nothing, the paper's keeps a fifth


def twin(base, changes, density, scope, weights, scale, normalize, on_tie):
    """TIES entry by entry on named lists of floats: a full sort, sums in doubles."""
    names = list(base)
    groups = [names] if scope == "model" else [[n] for n in names]
    trimmed = [{n: list(c[n]) for n in names} for c in changes]
    for change, keep in itertools.product(trimmed, groups):
        sizes = sorted((abs(x) for n in keep for x in change[n]), reverse=True)
        cut = sizes[max(1, int(density * len(sizes))) - 1]
        for n in keep:
            change[n] = [x if abs(x) >= cut else 0.0 for x in change[n]]
    weighed = [{n: [w * x for x in c[n]] for n in names} for c, w in zip(trimmed, weights, strict=True)]
    sums = {n: [math.fsum(column) for column in zip(*(c[n] for c in weighed), strict=True)] for n in names}
    balance = sum((s > 0) - (s < 0) for n in names for s in sums[n])
    tie = 1 if on_tie == "plus" else (balance > 0) - (balance < 0)
    made = {}
    for n in names:
        made[n] = []
        for i, total in enumerate(sums[n]):
            sign = (total > 0) - (total < 0) or tie
            agree = [(c[n][i], w) for c, w in zip(weighed, weights, strict=True) if c[n][i] * sign > 0]
            value = sum(x for x, _ in agree)
            made[n].append(base[n][i] + scale * (value / (sum(w for _, w in agree) or 1) if normalize else value))
    return made


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("on_tie", ["majority", "plus"])
@pytest.mark.parametrize(("weights", "normalize"), [(None, True), (None, False), ((0.5, 2.0, 1.25, 1.0), True)])
def test_equals_a_slow_twin(scope, on_tie, weights, normalize):
    """Small whole numbers, so that ties of sums and of magnitudes abound and everything is exact."""
    for seed in range(6):
        draw = random.Random(seed)
        sizes = {"a": 40, "b": 3, "c": 57}
        base = {n: [float(draw.randint(-9, 9)) for _ in range(k)] for n, k in sizes.items()}
        lean = 1 if seed % 2 else -1
        changes = [{n: [float(draw.randint(-5, 5) + lean) for _ in range(k)] for n, k in sizes.items()} for _ in "1234"]
        slow = twin(base, changes, 0.3, scope, weights or (1,) * 4, 1.5, normalize, on_tie)
        tensors = {n: torch.tensor(v) for n, v in base.items()}
        experts = [{n: tensors[n] + torch.tensor(c[n]) for n in sizes} for c in changes]
        method = Ties(density=0.3, scope=scope, scale=1.5, weights=weights, normalize=normalize, on_tie=on_tie)
        made = transform_tensors(method, tensors, experts, Context())
        for n in sizes:
            assert made[n].tolist() == pytest.approx(slow[n], rel=1e-6, abs=1e-6)


def test_large_tensors_take_the_sampled_way(monkeypatch):
    """Above 2^20 entries a sample finds the bracket: the same thresholds as a full sort."""
    gen = torch.Generator().manual_seed(3)
    size = select.SMALL + CHUNK + 17
    base = torch.randn(size, generator=gen)
    experts = [base + torch.randn(size, generator=gen) * torch.linspace(0.1, 1, size) for _ in range(2)]
    changes = [e - base for e in experts]
    cuts = [c.abs().sort(descending=True).values[int(0.1 * size) - 1] for c in changes]
    kept = torch.stack([torch.where(c.abs() >= cut, c, 0) for c, cut in zip(changes, cuts, strict=True)])
    sign = kept.sum(0).sign()
    agree = kept * (kept * sign > 0)
    slow = base + agree.sum(0) / (agree != 0).sum(0).clamp(min=1)
    monkeypatch.setattr(Bracket, "narrower", None)  # one pass has to do
    made = transform_tensors(Ties(density=0.1), {"w": base}, [{"w": e} for e in experts], Context())["w"]
    assert torch.allclose(made, slow, atol=1e-6)


def released_trim(values, share):
    """The threshold of ties-merging 44e7891 in our words: the (d - int(d * share))-th smallest magnitude stays."""
    at = len(values) - int(len(values) * share)
    cut = torch.tensor(values).abs().kthvalue(at).values
    return [v for v in values if abs(v) >= cut]


def test_released_code_keeps_one_more():
    values = [float(v) for v in range(1, 11)]
    assert len(released_trim(values, 0.2)) == 3
    assert [v for v in merged(Ties(density=0.2), [0.0] * 10, [values]) if v] == [9.0, 10.0]
    with pytest.raises((RuntimeError, IndexError)):
        released_trim(values, 1.0)
    assert merged(Ties(density=1.0), [0.0] * 10, [values]) == values


def test_released_code_turns_balance_negative():
    """One entry up, one down, one that cancels: their sign of 0 is not above 0, so the negative change is taken."""
    changes = torch.tensor([[1.0, -1.0, 4.0], [1.0, -1.0, -4.0]])
    sign = changes.sum(0).sign()
    assert sign.sum() == 0  # no majority: 0 stays 0
    theirs = changes * torch.where(sign > 0, changes > 0, changes < 0)
    assert theirs[:, 2].tolist() == [0.0, -4.0]
    assert merged(Ties(density=1.0), [0.0] * 3, changes.tolist()) == [1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"density": [0.1, 0.9]}, "set scope: tensor"),
        ({"densities": [0.5, {"*": 0.5}]}, "set scope: tensor"),
        ({"density": 1.5}, "from 0.0 up to 1.0"),
        ({"scope": "tensors"}, "did you mean 'tensor'?"),
    ],
)
def test_fields_that_cannot_be(fields, says):
    with pytest.raises(LuthierError, match="merge.ties") as fault:
        Ties(**fields)
    assert says in str(fault.value)


@pytest.mark.parametrize("field", ["weights", "densities"])
def test_one_number_an_expert(field):
    with pytest.raises(LuthierError, match=f"{field}: 2 numbers for 3 experts"):
        hand(Ties(**{field: [0.5, 0.5]}))
    hand(Ties(density=[0.5, 0.5], scope="tensor", **{field: [0.5, 0.5, 0.5]}))


def test_a_threshold_of_a_tensor_that_comes_in_pieces():
    """Of 70,000 entries the largest half lie in the first piece: a threshold a piece would keep half of either."""
    size, half = 70_000, 35_000
    change = torch.arange(size, 0, -1, dtype=torch.float32)
    made = transform_tensors(Ties(density=0.5, scope="tensor"), {"w": torch.zeros(size)}, [{"w": change}], Context())[
        "w"
    ]
    assert torch.equal(made, torch.where(torch.arange(size) < half, change, 0.0))
