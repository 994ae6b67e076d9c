"""Breadcrumbs against hand calculation, a slow twin in plain Python, the paper's code and mergekit 0.1.5."""

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
from luthier.merge.breadcrumbs import Breadcrumbs

# Two rows; changes in sixty-fourths, so that every sum below is exact.
BASE = [[0.5, -0.25, 1.0, 0.0, -1.0, 0.75, 0.125, -0.5], [0.25, 0.5, -0.75, 1.5, -0.125, 0.0, 2.0, -1.0]]
MOVED = [
    [[8, -1, -16, 2, 0, -9, 4, 12], [1, -2, 3, -24, 5, -6, 7, -40]],
    [[-8, 3, 5, -6, 1, 10, -4, -2], [-30, 20, -11, 13, -14, 15, 26, 17]],
    [[7, -2, -3, 24, -5, -20, 11, -13], [6, 4, 1, -8, -9, 2, -10, 32]],
]


def merged(method, base, changes):
    """base, changes: nested numbers; the result's entries in fp32."""
    base = torch.tensor(base)
    experts = [{"w": base + torch.tensor(c)} for c in changes]
    return transform_tensors(method, {"w": base}, experts, Context(step="golden"))["w"].flatten().tolist()


def hand(method, rows=slice(None)):
    moved = [torch.tensor(m)[rows] / 64 for m in MOVED]
    return merged(method, torch.tensor(BASE)[rows].tolist(), [m.tolist() for m in moved])


def left(row, density, gamma):
    """One row of whole numbers after the drop: top and small ones gone."""
    return [
        v * 64 for v in merged(Breadcrumbs(density=density, gamma=gamma), [[0.0] * len(row)], [[[v / 64 for v in row]]])
    ]


def test_by_hand():
    """Of eight, int(0.13 * 8) = 1 goes at the top, then 4 stay: of 8 1 16 2 0 9 4 12 these are 8 9 4 12."""
    assert left(MOVED[0][0], 0.5, 0.13) == [8, 0, 0, 0, 0, -9, 4, 12]
    assert left(MOVED[0][1], 0.5, 0.13) == [0, 0, 0, -24, 5, -6, 7, 0]
    assert left(MOVED[0][0], 0.25, 0.3) == [8, 0, 0, 0, 0, -9, 0, 0]
    assert left(MOVED[0][0], 0.5, 0.0) == [8, 0, -16, 0, 0, -9, 0, 12]
    assert left(MOVED[0][0], 1.0, 0.0) == MOVED[0][0]


def test_scale_weights_and_mean():
    """Second rows, one outlier dropped and four kept of each: (0 0 0 -24 5 -6 7 0), (0 20 0 0 0 15 26 17),
    (6 0 0 -8 -9 0 -10 0)."""
    rows = [[0, 0, 0, -24, 5, -6, 7, 0], [0, 20, 0, 0, 0, 15, 26, 17], [6, 0, 0, -8, -9, 0, -10, 0]]
    shares = {"density": 0.5, "gamma": 0.13}
    added = [b + sum(c) / 64 for b, c in zip(BASE[1], zip(*rows, strict=True), strict=True)]
    assert hand(Breadcrumbs(**shares), [1]) == added
    scaled = [b + (2 * x - y + z) / 128 for b, x, y, z in zip(BASE[1], *rows, strict=True)]
    assert hand(Breadcrumbs(scale=0.5, weights=[2, -1, 1], **shares), [1]) == scaled
    mean = [b + (2 * x + y + z) / 256 for b, x, y, z in zip(BASE[1], *rows, strict=True)]
    assert hand(Breadcrumbs(weights=[2, 1, 1], normalize=True, **shares), [1]) == mean


def test_equals_of_what_stays_stay():
    """Nothing that equals a kept entry is dropped, at either end; and a change of one magnitude stays whole."""
    assert left([5, 5, 5, 3, 3, 3, 1, 1], 0.5, 0.25) == [5, 5, 5, 3, 3, 3, 0, 0]
    assert left([9, 9, 5, 3, 3, -3, 1, 1], 0.25, 0.25) == [0, 0, 5, 3, 3, -3, 0, 0]
    assert left([-2] * 8, 0.25, 0.25) == [-2] * 8


def test_outliers_give_way_to_the_density():
    """At density 0.75 of eight only two may go at the top, whatever gamma says."""
    assert left(MOVED[0][0], 0.75, 0.5) == [8, -1, 0, 2, 0, -9, 4, 0]
    assert left(MOVED[0][0], 1.0, 0.5) == MOVED[0][0]


def test_shares_are_rounded_down():
    """As both published codes do: a share of less than one entry is none."""
    assert left([1, 2, 3, 4, 5, 6], 0.5, 0.16) == [0, 0, 0, 4, 5, 6]
    assert left([1, 2, 3, 4, 5, 6], 0.5, 0.17) == [0, 0, 3, 4, 5, 0]
    assert left([1, 2, 3, 4, 5, 6], 0.49, 0.17) == [0, 0, 0, 4, 5, 0]
    assert left([1, 2, 3, 4, 5, 6], 0.16, 0.17) == [0.0] * 6
    assert merged(Breadcrumbs(density=0.16, scope="tensor"), [0.0] * 6, [[1.0, 2, 3, 4, 5, 6]]) == [0.0] * 6


def test_nothing_stays():
    for scope in ("row", "tensor"):
        for gamma in (0.0, 0.5, 1.0):
            assert hand(Breadcrumbs(density=0.0, gamma=gamma, scope=scope)) == sum(BASE, [])


# rezazzr/breadcrumbs f89fc66, `TaskVectorMiddleKeep` on the changes above with top_k_keep, top_k_remove, and
# `apply_to` with a scaling coefficient: the matrix, and its second row as a vector.
PAPERS = [
    (
        0.5,
        0.13,
        0.5,
        [
            0.5546875,
            -0.25,
            1.0390625,
            -0.046875,
            -1.0,
            0.5234375,
            0.2109375,
            -0.5078125,
            0.296875,
            0.65625,
            -0.75,
            1.25,
            -0.15625,
            0.0703125,
            2.1796875,
            -0.8671875,
        ],
        [0.296875, 0.65625, -0.75, 1.25, -0.15625, 0.0703125, 2.1796875, -0.8671875],
    ),
    (
        0.25,
        0.3,
        1.0,
        [
            0.625,
            -0.25,
            1.078125,
            -0.09375,
            -1.0,
            0.609375,
            0.296875,
            -0.703125,
            0.25,
            0.8125,
            -0.75,
            1.375,
            -0.265625,
            -0.09375,
            2.109375,
            -0.734375,
        ],
        [0.25, 0.8125, -0.75, 1.375, -0.265625, -0.09375, 2.109375, -0.734375],
    ),
    (
        0.15,
        0.006,
        1.0,
        [0.5, -0.25, 0.75, 0.375, -1.0, 0.90625, 0.125, -0.5, -0.21875, 0.5, -0.75, 1.5, -0.125, 0.0, 2.0, -1.125],
        [-0.21875, 0.5, -0.75, 1.5, -0.125, 0.0, 2.0, -1.125],
    ),
    (
        0.5,
        0.0,
        1.0,
        [
            0.5,
            -0.25,
            0.828125,
            0.28125,
            -1.0,
            0.453125,
            0.296875,
            -0.515625,
            -0.21875,
            0.8125,
            -0.75,
            1.0,
            -0.265625,
            -0.09375,
            2.359375,
            -0.859375,
        ],
        [-0.21875, 0.8125, -0.75, 1.0, -0.265625, -0.09375, 2.359375, -0.859375],
    ),
]


@pytest.mark.parametrize(("density", "gamma", "scale", "matrix", "vector"), PAPERS)
def test_the_papers_code(density, gamma, scale, matrix, vector):
    method = Breadcrumbs(density=density, gamma=gamma, scale=scale)
    assert hand(method) == pytest.approx(matrix, abs=1e-7)
    assert hand(method, 1) == pytest.approx(vector, abs=1e-7)  # a vector is one row


# mergekit 0.1.5, `merge_tensors(..., base_index=0)` in fp32 on the numbers above, by breadcrumbs and breadcrumbs_ties.
MERGEKIT = [
    (
        {"density": 0.5, "gamma": 0.13},
        [
            0.609375,
            -0.25,
            0.75,
            0.0,
            -1.0,
            0.453125,
            0.359375,
            -0.515625,
            0.34375,
            0.8125,
            -0.921875,
            1.578125,
            -0.40625,
            0.140625,
            1.953125,
            -0.734375,
        ],
    ),
    (
        {"weights": [0.7, 0.5, 0.3], "densities": [0.5, 0.75, 0.25], "gammas": [0.07, 0.2, 0.0], "scale": 0.8},
        [
            0.519999981,
            -0.231250003,
            0.891250014,
            0.052500006,
            -1.0,
            0.658749998,
            0.100000001,
            -0.456250012,
            0.25,
            0.5,
            -0.818750024,
            1.371250033,
            -0.168750003,
            0.041250002,
            2.061249971,
            -0.773750007,
        ],
    ),
    (
        {"vote": "plus", "weights": [0.7, 0.5, 0.3], "density": 0.5, "gamma": 0.13},
        [
            0.620312512,
            -0.25,
            0.824999988,
            0.0,
            -1.0,
            0.557812512,
            0.220312506,
            -0.368750006,
            0.278124988,
            0.65625,
            -0.8359375,
            1.6015625,
            -0.276562512,
            0.1171875,
            2.076562405,
            -0.8671875,
        ],
    ),
    (
        {"vote": "plus", "weights": [1, 1, -1], "density": 0.8, "gamma": 0.3, "normalize": True},
        [
            0.265625,
            -0.171875,
            1.125,
            -0.09375,
            -0.90625,
            0.90625,
            -0.109375,
            -0.53125,
            0.34375,
            0.40625,
            -0.9375,
            1.828125,
            0.09375,
            0.234375,
            2.265625,
            -1.0,
        ],
    ),
    (
        {"weights": [0.7, 0.5, 0.3], "density": 0.75, "gamma": 0.5, "normalize": True},
        [
            0.538541675,
            -0.247916669,
            1.016666651,
            -0.016666668,
            -1.010416627,
            0.736458361,
            0.167708337,
            -0.510416687,
            0.276041657,
            0.497916669,
            -0.782291651,
            1.542708278,
            -0.189583331,
            0.040625002,
            2.019791603,
            -1.0,
        ],
    ),
    (
        {"vote": "plus", "weights": [0.7, 0.5, 0.3], "density": 1.0, "gamma": 0.5},
        [
            0.620312512,
            -0.2265625,
            0.810937524,
            0.134375006,
            -1.0234375,
            0.557812512,
            0.220312506,
            -0.368750006,
            0.015625,
            0.675000012,
            -0.8359375,
            1.200000048,
            -0.276562512,
            0.126562506,
            2.279687405,
            -1.4375,
        ],
    ),
]


@pytest.mark.parametrize(("fields", "theirs"), MERGEKIT)
def test_mergekit_form_is_mergekits(fields, theirs):
    assert hand(Breadcrumbs(scope="tensor", **fields)) == pytest.approx(theirs, abs=1e-7)


def test_scopes_differ():
    """The second row moved further: of the whole tensor it keeps more, and loses the outliers."""
    shares = {"density": 0.5, "gamma": 0.13}
    by_row, whole = (hand(Breadcrumbs(scope=s, **shares)) for s in ("row", "tensor"))
    kept = [[a != b for a, b in zip(made, sum(BASE, []), strict=True)] for made in (by_row, whole)]
    assert by_row != whole and sum(kept[1][8:]) > sum(kept[0][8:])


def twin(base, changes, scope, density, gamma, weights, vote, normalize, scale):
    """Breadcrumbs entry by entry on named lists of rows, by full sorts, sums in doubles."""
    thinned = []
    for change in changes:
        rows = {}
        for name, matrix in change.items():
            parts = matrix if scope == "row" else [sum(matrix, [])]
            out = []
            for part in parts:
                order, keep = sorted(map(abs, part), reverse=True), int(density * len(part))
                top = min(int(gamma * len(part)), len(part) - keep)
                band = order[top : top + keep]
                out += [v if band and band[-1] <= abs(v) <= band[0] else 0.0 for v in part]
            rows[name] = out
        thinned.append(rows)
    flat = {n: sum(rows, []) for n, rows in base.items()}
    sums = {n: [math.fsum(w * t[n][i] for w, t in zip(weights, thinned, strict=True)) for i in range(len(v))]
            for n, v in flat.items()}  # fmt: skip
    net = sum((s > 0) - (s < 0) for v in sums.values() for s in v)
    tie = {"none": 0, "plus": 1, "majority": (net > 0) - (net < 0)}[vote]
    made = {}
    for n, values in flat.items():
        made[n] = []
        for i, total in enumerate(sums[n]):
            sign = (total > 0) - (total < 0) or tie
            taken = [(w * t[n][i], w) for w, t in zip(weights, thinned, strict=True)
                     if vote == "none" or w * t[n][i] * sign > 0]  # fmt: skip
            value = sum(v for v, _ in taken) / (sum(w for _, w in taken) or 1 if normalize else 1)
            made[n].append(values[i] + scale * value)
    return made


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("vote", ["none", "plus", "majority"])
@pytest.mark.parametrize(
    ("weights", "normalize"), [(None, False), ((0.5, 2.0, -1.25), False), ((0.5, 2.0, 1.25), True)]
)
def test_equals_a_slow_twin(scope, vote, weights, normalize):
    """Small whole numbers, so that equal magnitudes and sums of 0 abound; more than 64 rows; a lean to either side."""
    for seed, (density, gamma) in enumerate([(0.3, 0.05), (0.5, 0.4), (0.2, 0.0), (0.9, 0.3)]):
        draw = random.Random(seed)
        sizes = {"a": (70, 7), "b": (1, 3), "c": (5, 21)}
        lean = 1 if seed % 2 else -1
        base, *changes = (
            {
                n: [[float(draw.randint(-9, 9) + lean) for _ in range(c)] for _ in range(r)]
                for n, (r, c) in sizes.items()
            }
            for _ in range(4)
        )
        fields = {
            "scope": scope,
            "density": density,
            "gamma": gamma,
            "vote": vote,
            "normalize": normalize,
            "scale": 1.5,
        }
        slow = twin(base, changes, weights=weights or (1, 1, 1), **fields)
        tensors = {n: torch.tensor(v) for n, v in base.items()}
        experts = [{n: tensors[n] + torch.tensor(c[n]) for n in sizes} for c in changes]
        made = transform_tensors(Breadcrumbs(weights=weights, **fields), tensors, experts, Context())
        for n in sizes:
            assert made[n].flatten().tolist() == pytest.approx(slow[n], rel=1e-6, abs=1e-6)


def test_large_tensors_take_the_sampled_way(monkeypatch):
    """Above 2^20 entries a sample brackets both ends: the same as a full sort."""
    gen = torch.Generator().manual_seed(3)
    size = select.SMALL + CHUNK + 17
    change = torch.randn(size, generator=gen) * torch.linspace(0.1, 1, size)
    ranked = change.abs().sort(descending=True).values
    top, keep = int(0.01 * size), int(0.1 * size)
    slow = torch.where((change.abs() <= ranked[top]) & (change.abs() >= ranked[top + keep - 1]), change, 0)
    monkeypatch.setattr(Bracket, "narrower", None)  # one pass has to do
    method = Breadcrumbs(density=0.1, gamma=0.01, scope="tensor")
    made = transform_tensors(method, {"w": torch.zeros(size)}, [{"w": change}], Context())["w"]
    assert torch.equal(made, slow) and int((made != 0).sum()) == keep


def test_schedules_by_depth_and_name():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["lm_head.weight"]
    base = {n: torch.zeros(1, 4) for n in names}
    expert = {n: torch.tensor([[1.0, 2.0, 3.0, 4.0]]) for n in names}
    for scope in ("row", "tensor"):
        method = Breadcrumbs(
            density={"*": [0.25, 0.5], "lm_head*": 0.5}, gamma=[0.5, 0.0], scale=[1.0, 2.0], scope=scope
        )
        made = [transform_tensors(method, base, [expert], Context())[n].tolist()[0] for n in names]
        assert made == [[0.0, 2, 0, 0], [0.0, 0, 4.5, 0], [0.0, 0, 6, 8], [0.0, 0, 6, 8]]


def test_the_defaults_are_the_papers_trial():
    method = Breadcrumbs()
    assert (method.density, method.gamma, method.scope, method.vote) == (0.15, 0.006, "row", "none")
    row = [float(v) for v in range(1, 1001)]
    assert [v for v in merged(method, [0.0] * 1000, [row]) if v] == row[1000 - 156 : 1000 - 6]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"density": 1.5}, "from 0.0 up to 1.0"),
        ({"gamma": -0.1}, "from 0.0 up to 1.0"),
        ({"scope": "model"}, "known: row, tensor"),
    ],
)
def test_fields_that_cannot_be(fields, says):
    with pytest.raises(LuthierError, match="merge.breadcrumbs") as fault:
        Breadcrumbs(**fields)
    assert says in str(fault.value)


@pytest.mark.parametrize("field", ["weights", "densities", "gammas"])
def test_one_number_an_expert(field):
    with pytest.raises(LuthierError, match=f"{field}: 2 numbers for 3 experts"):
        hand(Breadcrumbs(**{field: [0.5, 0.5]}))


def test_weights_that_cancel():
    with pytest.raises(LuthierError, match="weights: they sum to 0 at w; set normalize: false"):
        hand(Breadcrumbs(weights=[1, -2, 1], normalize=True))
    hand(Breadcrumbs(weights=[1, -2, 1]))
    hand(Breadcrumbs(weights=[1, -2, 1], normalize=True, vote="plus"))
