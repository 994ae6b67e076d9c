"""DELLA against a slow twin that draws every entry's 32 bits on its own, binomial bounds, the paper's code and
mergekit 0.1.5."""

import math

import numpy as np
import pytest
import torch

from luthier.engine.pieces import Inputs, Memory
from luthier.engine.slices import sliced
from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.merge.della import Della, shares

# Two rows; changes in sixty-fourths.
BASE = [[0.5, -0.25, 1.0, 0.0, -1.0, 0.75, 0.125, -0.5], [0.25, 0.5, -0.75, 1.5, -0.125, 0.0, 2.0, -1.0]]
MOVED = [
    [[8, -1, -16, 2, 0, -9, 4, 12], [1, -2, 3, -24, 5, -6, 7, -40]],
    [[-8, 3, 5, -6, 1, 10, -4, -2], [-30, 20, -11, 13, -14, 15, 26, 17]],
    [[7, -2, -3, 24, -5, -20, 11, -13], [6, 4, 1, -8, -9, 2, -10, 32]],
]
CTX = Context(step="golden")
ADDED = {"vote": "none", "normalize": False}


def merged(method, base, changes, ctx=CTX):
    base = torch.tensor(base)
    experts = [{"w": base + torch.tensor(c)} for c in changes]
    return transform_tensors(method, {"w": base}, experts, ctx)["w"].flatten().tolist()


def hand(method, moved=MOVED, base=BASE):
    return merged(method, base, [(torch.tensor(m) / 64).tolist() for m in moved])


def draws(key, count):
    """The 32 bits of each entry: 16 from each of two Philox streams."""
    upper, lower = (np.random.Philox(key=k).random_raw(count).tolist() for k in (key, key + 2**64))
    parts = [[r >> s & 0xFFFF for r in raw for s in (0, 16, 32, 48)] for raw in (upper, lower)]
    return [u * 65536 + v for u, v, _ in zip(*parts, range(count), strict=False)]


def chances(row, density, epsilon):
    """How likely each entry stays: equal ones rank in their order."""
    order = sorted(range(len(row)), key=lambda i: (abs(row[i]), i))
    last = len(row) - 1
    return [density + epsilon * (2 * order.index(i) / last - 1 if last else 0) for i in range(len(row))]


def stays(key, rows, density, epsilon):
    """(the chance, whether it stays) of every entry."""
    found = [p for row in rows for p in chances(row, density, epsilon)]
    return [(p, d < round(p * 2**32)) for p, d in zip(found, draws(key, len(found)), strict=True)]


def twin(base, changes, density, epsilon, rescale, weights, vote, normalize, scale, ctx=CTX):
    """DELLA entry by entry on named lists of rows, in doubles."""
    thinned = []
    for e, change in enumerate(changes):
        row = {}
        for name, rows in change.items():
            left = [(c, p, s) for c, (p, s) in
                    zip(sum(rows, []), stays(ctx.key(name, e), rows, density, epsilon), strict=True)]  # fmt: skip
            after = sum(abs(c) for c, _, s in left if s)
            by = sum(abs(c) for c, _, _ in left) / after if rescale == "l1" and after else 1
            row[name] = [weights[e] * by * c / (p if rescale == "expectation" else 1) if s else 0.0 for c, p, s in left]
        thinned.append(row)
    flat = {n: sum(rows, []) for n, rows in base.items()}
    sums = {n: [math.fsum(t[n][i] for t in thinned) for i in range(len(v))] for n, v in flat.items()}
    net = sum((s > 0) - (s < 0) for v in sums.values() for s in v)
    tie = {"none": 0, "plus": 1, "majority": (net > 0) - (net < 0)}[vote]
    made = {}
    for n, values in flat.items():
        made[n] = []
        for i, total in enumerate(sums[n]):
            sign = (total > 0) - (total < 0) or tie
            taken = [
                (t[n][i], w) for t, w in zip(thinned, weights, strict=True) if vote == "none" or t[n][i] * sign > 0
            ]
            value = sum(v for v, _ in taken) / (sum(w for _, w in taken) or 1 if normalize else 1)
            made[n].append(values[i] + scale * value)
    return made


@pytest.mark.parametrize("rescale", ["expectation", "l1", "none"])
@pytest.mark.parametrize("vote", ["none", "plus", "majority"])
@pytest.mark.parametrize(
    ("weights", "normalize"), [(None, False), ((0.5, 2.0, -1.25), False), ((0.5, 2.0, 1.25), True)]
)
def test_equals_a_slow_twin(rescale, vote, weights, normalize):
    """Equal magnitudes abound in the rows; more than 64 rows; a lean to either side; the first two cancel at times."""
    for lean in (-1, 1):
        gen = torch.Generator().manual_seed(lean + 1)
        sizes = {"a": (67, 5), "b": (1, 4), "c": (6, 21), "d": (5, 1)}
        base, *changes = (
            {n: torch.randint(-3, 4, k, generator=gen).float() + lean for n, k in sizes.items()} for _ in "1234"
        )
        changes[1] = {n: -c for n, c in changes[0].items()}
        fields = {
            "density": 0.5,
            "epsilon": 0.25,
            "rescale": rescale,
            "vote": vote,
            "normalize": normalize,
            "scale": 1.5,
        }
        if rescale != "none" and vote != "none":  # what cancels exactly does so in their sum's last bit, or does not
            changes[1] = {n: torch.randint(-3, 4, k, generator=gen).float() + lean * 1.37 for n, k in sizes.items()}
            changes[0] = {n: c + 0.21 for n, c in changes[0].items()}
        experts = [{n: base[n] + c[n] for n in sizes} for c in changes]
        moved = [{n: e[n] - base[n] for n in sizes} for e in experts]
        made = transform_tensors(Della(weights=weights, **fields), base, experts, CTX)
        slow = twin({n: t.tolist() for n, t in base.items()}, [{n: t.tolist() for n, t in c.items()} for c in moved],
                    weights=weights or (1, 1, 1), **fields)  # fmt: skip
        for n in sizes:
            assert made[n].flatten().tolist() == pytest.approx(slow[n], rel=1e-5, abs=1e-5), n


def test_chances_by_hand():
    """Of 8 1 16 2 0 9 4 12 the ranks are 4 1 7 2 0 5 3 6."""
    row = chances(MOVED[0][0], 0.5, 0.35)
    assert row == pytest.approx([0.55, 0.25, 0.85, 0.35, 0.15, 0.65, 0.45, 0.75])
    assert shares(0.5, 0.35, 8).tolist() == pytest.approx(sorted(row))
    assert shares(0.7, 0.1, 1).tolist() == [0.7] and shares(0.7, 0.1, 2).tolist() == pytest.approx([0.6, 0.8])


# declare-lab/della 8067515, `sparsify.rank_magnitude(change, density=0.7, epsilon=0.14 / 2)` of the first change, as a
# matrix: an entry that stayed, over what became of it, until each had stayed. The fifth of the first row did not move.
PAPERS = [0.71, 0.65, 0.77, 0.67, 0.73, 0.69, 0.75, 0.63, 0.65, 0.67, 0.75, 0.69, 0.71, 0.73, 0.77]


def test_chances_are_the_papers():
    mine = [p for row in MOVED[0] for p in chances(row, 0.7, 0.07)]
    assert [m for m, moved in zip(mine, sum(MOVED[0], []), strict=True) if moved] == pytest.approx(PAPERS, abs=1e-5)
    assert (Della().density, Della().epsilon, Della().vote, Della().normalize) == (0.7, 0.07, "plus", True)


def test_every_rank_stays_as_often_as_it_should():
    """Of 4,096 rows of 16 entries: each rank's share within binomial bounds, and the expected change is the change."""
    rows, columns = 4096, 16
    gen = torch.Generator().manual_seed(0)
    change = torch.stack([torch.randperm(columns, generator=gen) for _ in range(rows)]).float() + 1
    method = Della(density=0.5, epsilon=0.4, **ADDED)
    made = transform_tensors(method, {"w": torch.zeros(rows, columns)}, [{"w": change}], CTX)["w"]
    for rank, p in enumerate(shares(0.5, 0.4, columns).tolist()):
        at = change == rank + 1
        assert abs(int((made[at] != 0).sum()) - rows * p) < 5 * math.sqrt(rows * p * (1 - p))
        assert made[at].max().item() == pytest.approx((rank + 1) / p, rel=1e-6)


def test_the_ends_are_certain():
    """Density and epsilon that add up to 1 or take all away: the largest stays, the smallest goes."""
    change = torch.arange(1.0, 5.0).repeat(3000, 1)
    for density in (0.3, 0.7, 0.1, 0.9, 0.5):
        epsilon = min(density, 1 - density)
        method = Della(density=density, epsilon=round(epsilon, 12), rescale="none", **ADDED)
        made = transform_tensors(method, {"w": 0 * change}, [{"w": change}], CTX)["w"]
        assert density > 0.5 or not made[:, 0].any()
        assert density < 0.5 or made[:, 3].all()
        assert float((made != 0).float().mean()) == pytest.approx(density, abs=0.02)


def test_nothing_and_everything_stays():
    for rescale in ("expectation", "l1", "none"):
        assert hand(Della(density=0.0, epsilon=0.0, rescale=rescale)) == sum(BASE, [])
        whole = hand(Della(density=1.0, epsilon=0.0, rescale=rescale, **ADDED))
        assert whole == (torch.tensor(BASE) + torch.tensor(MOVED).sum(0) / 64).flatten().tolist()


def test_seeds_steps_and_experts_draw_apart():
    ones = torch.ones(1, 4000)
    draw = lambda ctx, w: merged(Della(density=0.5, weights=w, **ADDED), (0 * ones).tolist(), [ones.tolist()] * 2, ctx)  # noqa: E731,E501
    first = np.array(draw(CTX, [1, 0])) > 0
    for other in (draw(CTX, [0, 1]), draw(CTX.with_(seed=1), [1, 0]), draw(CTX.with_(step="other"), [1, 0])):
        assert abs(int((first == (np.array(other) > 0)).sum()) - 2000) < 5 * math.sqrt(1000)


def test_an_expert_alone_in_a_slice_keeps_its_number():
    """Layers of one expert each: the second has its own density, weight and draw, as if both were there."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    method = Della(densities=[1.0, 0.5], epsilon=0.0, weights=[2.0, 3.0], **ADDED)
    base, *experts = (Memory({n: torch.full((1, 8), v) for n in names}) for v in (0.0, 1.0, 1.0))
    whole = Inputs(base, tuple(experts), base.tensors, method.granularity, config={"num_hidden_layers": 2})
    inputs = method.plan(sliced(whole, [[(None, 0, 1), (0, 0, 1)], [(None, 1, 2), (1, 1, 2)]], method))
    seen = CTX.with_(survey=method.survey(inputs, CTX))
    made = [method.transform(piece, seen).flatten().tolist() for piece in inputs.pieces()]
    assert made == [[2.0] * 8, [6.0 * s for s in [s for _, s in stays(CTX.key(names[1], 1), [[1.0] * 8], 0.5, 0.0)]]]


# mergekit 0.1.5, `merge_tensors(..., base_index=0)` in fp32 on the numbers above: della and della_linear at density 1,
# which draws nothing; then with our masks at density 0.5 and epsilon 0.35 `rescaled_masked_tensor(change, mask,
# RescaleNorm.l1)` of each change, and base + those by task_arithmetic, and by ties at density 1.
MERGEKIT = [
    (
        {},
        [
            0.620312512,
            -0.203125,
            0.810937524,
            0.134375006,
            -1.078125,
            0.557812512,
            0.220312506,
            -0.3125,
            -0.21875,
            0.71875,
            -0.921875,
            1.200000048,
            -0.314453125,
            0.158203125,
            2.233072996,
            -1.625,
        ],
    ),
    (
        {"normalize": False, "scale": 0.8},
        [
            0.596249998,
            -0.231250003,
            0.848749995,
            0.107500009,
            -1.018749952,
            0.596249998,
            0.201250017,
            -0.395000011,
            0.0625,
            0.639999986,
            -0.818750024,
            1.25999999,
            -0.246250004,
            0.101250008,
            2.223750114,
            -1.350000024,
        ],
    ),
    (
        {"vote": "none", "normalize": False},
        [
            0.557812512,
            -0.246875003,
            0.850000024,
            0.087500006,
            -1.015625,
            0.635937512,
            0.189062506,
            -0.4453125,
            0.0546875,
            0.653124988,
            -0.798437476,
            1.301562548,
            -0.221874997,
            0.060937501,
            2.232812405,
            -1.154687524,
        ],
    ),
    (
        {"vote": "none", "normalize": True, "scale": 0.8},
        [
            0.530833364,
            -0.248333335,
            0.920000017,
            0.046666671,
            -1.008333325,
            0.689166665,
            0.159166664,
            -0.470833331,
            0.145833343,
            0.581666648,
            -0.775833309,
            1.394166708,
            -0.176666662,
            0.032500003,
            2.124166727,
            -1.082499981,
        ],
    ),
]
L1_ADDED = [
    0.581842363,
    -0.25,
    0.67592597,
    0.26839757,
    -1.087611556,
    0.470825583,
    0.206018507,
    -0.727790177,
    -0.405556858,
    1.077216387,
    -0.75,
    0.873710275,
    -0.637689948,
    0.035044644,
    2.625824451,
    -1.249470949,
]
L1_VOTED = [
    0.642346621,
    -0.25,
    0.67592597,
    0.420535743,
    -1.087611556,
    0.483630955,
    0.206018507,
    -0.727790177,
    -0.510690808,
    0.788608193,
    -0.75,
    1.186855078,
    -0.381344974,
    0.035044644,
    2.400523663,
    -1.810185194,
]


@pytest.mark.parametrize(("fields", "theirs"), MERGEKIT)
def test_mergekit_parity_where_nothing_is_drawn(fields, theirs):
    assert hand(Della(density=1.0, epsilon=0.0, weights=[0.7, 0.5, 0.3], **fields)) == pytest.approx(theirs, abs=2e-7)


def test_mergekit_rescales_by_l1():
    """Given the same masks, theirs is ours with rescale: l1, before and after the vote; the paper's is another."""
    method = Della(density=0.5, epsilon=0.35, rescale="l1")
    assert hand(method.replace(**ADDED)) == pytest.approx(L1_ADDED, abs=2e-7)
    assert hand(method) == pytest.approx(L1_VOTED, abs=5e-7)
    assert hand(method.replace(rescale="expectation")) != pytest.approx(L1_VOTED, abs=1e-3)


def test_one_window_an_expert():
    """Each expert's entries are those of a lone twin with its density and epsilon, in a slice without the first too."""
    windows = [(1.0, 0.0), (0.5, 0.35), (0.3, 0.1)]
    densities, epsilons = zip(*windows, strict=True)
    fields = {"rescale": "expectation", "vote": "none", "normalize": False}
    wanted = torch.tensor(BASE).double().flatten()
    for e, (rows, window) in enumerate(zip(MOVED, windows, strict=True)):
        left = stays(CTX.key("w", e), rows, *window)
        wanted += torch.tensor([c / 64 / p if s else 0 for c, (p, s) in zip(sum(rows, []), left, strict=True)])
    assert hand(Della(densities=densities, epsilons=epsilons, **fields)) == pytest.approx(wanted.tolist(), abs=1e-6)
    assert hand(Della(densities=densities, epsilon=0.0, **fields)) != pytest.approx(wanted.tolist(), abs=1e-3)
    name = "model.layers.0.mlp.up_proj.weight"
    base, first, second = (Memory({name: torch.full((1, 8), v)}) for v in (0.0, 1.0, 1.0))
    method = Della(densities=[1.0, 0.5], epsilons=[0.0, 0.35], rescale="none", **ADDED)
    whole = Inputs(base, (first, second), base.tensors, method.granularity, config={"num_hidden_layers": 1})
    inputs = method.plan(sliced(whole, [[(None, 0, 1), (1, 0, 1)]], method))
    (piece,) = inputs.pieces()
    made = method.transform(piece, CTX.with_(survey=method.survey(inputs, CTX))).flatten().tolist()
    assert made == [float(s) for _, s in stays(CTX.key(name, 1), [[1.0] * 8], 0.5, 0.35)]


def test_schedules_by_depth_and_name():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["lm_head.weight"]
    base = {n: torch.zeros(2000, 2) for n in names}
    expert = {n: torch.tensor([1.0, 2.0]).repeat(2000, 1) for n in names}
    method = Della(density={"*": [0.2, 0.6], "lm_head*": 0.5}, epsilon=[0.2, 0.4], rescale="none", **ADDED)
    made = transform_tensors(method, base, [expert], CTX)
    for name, ends in zip(names, [(0.0, 0.4), (0.1, 0.7), (0.2, 1.0), (0.1, 0.9)], strict=True):
        for column, p in enumerate(ends):
            spread = 5 * math.sqrt(2000 * p * (1 - p)) + 1e-6
            assert abs(int((made[name][:, column] != 0).sum()) - 2000 * p) <= spread


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"density": 1.5}, "from 0.0 up to 1.0"),
        ({"density": 0.95}, "density 0.95 leaves no room for epsilon 0.07; set epsilon to 0.05 at most"),
        ({"density": 0.05}, "set epsilon to 0.05 at most"),
        ({"density": 0.3, "epsilon": 0.31}, "set epsilon to 0.3 at most"),
        ({"densities": [0.5, 0.05]}, "density 0.05 leaves no room"),
        ({"epsilon": 0.4}, "set epsilon to 0.3 at most"),
        ({"epsilons": [0.1, 0.4]}, "set epsilon to 0.3 at most"),
        ({"densities": [0.5, 1.0], "epsilons": [0.0, 0.1]}, "density 1 leaves no room for epsilon 0.1"),
    ],
)
def test_fields_that_cannot_be(fields, says):
    with pytest.raises(LuthierError, match="merge.della") as fault:
        Della(**fields)
    assert says in str(fault.value)


@pytest.mark.parametrize("fields", [{"density": {"*": 0.5, "w": 0.05}}, {"epsilon": {"w": 0.4}}])
def test_schedules_that_leave_no_room(fields):
    with pytest.raises(LuthierError, match="leaves no room for epsilon"):
        hand(Della(**fields))


@pytest.mark.parametrize("field", ["weights", "densities", "epsilons"])
def test_one_number_an_expert(field):
    with pytest.raises(LuthierError, match=f"{field}: 2 numbers for 3 experts"):
        hand(Della(**{field: [0.25, 0.25]}))


def test_weights_that_cancel():
    with pytest.raises(LuthierError, match="weights: they sum to 0 at w; set normalize: false"):
        hand(Della(weights=[1, -2, 1], vote="none"))
    hand(Della(weights=[1, -2, 1], **ADDED))
    hand(Della(weights=[1, -2, 1]))
