"""WIDEN against hand calculation, a slow twin in plain Python, and numbers of the released code."""

import math

import pytest
import torch

from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.merge.widen import Widen

EMBED, MATRIX, VECTOR, HEAD = NAMES = [
    "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight",
    "lm_head.weight",
]  # fmt: skip
SHAPES = [(5, 4), (3, 4), (4,), (5, 4)]


def merged(method, base, experts):
    made = transform_tensors(method, base, experts, Context(step="golden"))
    return {name: tensor.tolist() for name, tensor in made.items()}


def matrix(method, base, *experts, name=MATRIX):
    one = lambda rows: {name: torch.tensor(rows, dtype=torch.float32)}  # noqa: E731
    return merged(method, one(base), [one(e) for e in experts])[name]


def test_by_hand():
    """Two experts, four columns of one row: lengths are sizes, and no direction turns, so the ranks of direction are
    0 to 3 in both. The first's lengths move by 1, 2, 3, 4, the second's by 4, 3, 2, 1: ranks 0..3 and 3..0, in
    quarters. Above the mean of 3/8 are the last two, whose score is 1; the others' is the softmax with the other's."""
    made = matrix(Widen(), [[10.0, 10, 10, 10]], [[11.0, 12, 13, 14]], [[14.0, 13, 12, 11]])
    low = [1 / (1 + math.exp(3 / 4)), 1 / (1 + math.exp(1 / 4))]  # of ranks 0 against 3, and 1 against 2
    turned = [0.5, 0.5, 1.0, 1.0]
    one = [(low[0] + turned[0]) / 2, (low[1] + turned[1]) / 2, 1.0, 1.0]
    other = [(1.0 + turned[0]) / 2, (1.0 + turned[1]) / 2, (low[1] + turned[2]) / 2, (low[0] + turned[3]) / 2]
    assert made[0] == pytest.approx(
        [10 + a * u + b * v for a, u, b, v in zip(one, (1, 2, 3, 4), other, (4, 3, 2, 1), strict=True)], rel=1e-6
    )


def test_directions_by_hand():
    """Columns of length 5 that only turn: the second by more, so it has rank 1 in both experts and is added in full;
    the first has rank 0 in both and half a softmax of equals, in length as in direction."""
    base = [[5.0, 5.0], [0.0, 0.0]]
    turned = [[4.0, 3.0], [3.0, 4.0]]
    made = matrix(Widen(calibration=2.0), base, turned, turned)
    lengths = [0.5, 2.0]  # equal ones keep their order
    weights = [(lengths[0] + 0.5) / 2, (lengths[1] + 2.0) / 2]
    assert made[0] == pytest.approx([5 + 2 * weights[0] * -1, 5 + 2 * weights[1] * -2], rel=1e-6)
    assert made[1] == pytest.approx([2 * weights[0] * 3, 2 * weights[1] * 4], rel=1e-6)


def test_equal_differences_keep_the_columns_order():
    """A thousand columns twice as long as before: the second five hundred count as above the mean."""
    made = matrix(Widen(calibration=3.0), [[1.0] * 1000], [[2.0] * 1000])
    assert made == [[2.0] * 500 + [4.0] * 500]


def test_columns_of_zeros_have_not_turned():
    """Nor has a column that is twice as long; it comes first, so its weight is (3 + 1) / 2."""
    assert matrix(Widen(calibration=3.0), [[3.0, 0.0], [4.0, 0.0]], [[6.0, 0.0], [8.0, 0.0]]) == [[9.0, 0], [12.0, 0]]


def test_defaults_are_the_papers():
    assert Widen() == Widen(above_average_ratio=1.0, calibration=1.0)


@pytest.mark.parametrize("name", [VECTOR, EMBED])
def test_vectors_by_hand(name):
    """Changes (3, 1) and (1, 1): 3 is above its mean of 2 and gets the calibration, entries at the mean do not."""
    made = matrix(Widen(calibration=0.75), [1.0, 1.0], [4.0, 2.0], [2.0, 2.0], name=name)
    softmax = 1 / (1 + math.exp(2))
    assert made == pytest.approx([1 + 0.75 * 3 + softmax, 1 + 0.5 + 0.5], rel=1e-6)


def draws(seed):
    """Sixty-fourths from a congruential generator, as named tensors."""
    state, found = seed * 7919 + 1, {}
    for name, shape in zip(NAMES, SHAPES, strict=True):
        values = []
        for _ in range(math.prod(shape)):
            state = (state * 1103515245 + 12345) % 2**31
            values.append(((state >> 16) % 129 - 64) / 64)
        found[name] = torch.tensor(values).view(shape)
    return found


# MergeLLM 9178ef9, `MergingMethod("widen_merging").widen_merging(base, experts, [], ratio, calibration)` on a module
# with an Embedding, a Linear, a norm and a head of the tensors of `draws(0)`, the experts below: (ratio, calibration,
# experts, the merged tensors).
# fmt: off
RELEASED = [
    (1.0, 1.0, 2, [
        [0.2189715, -0.0386805, 0.1052956, 0.8204898, 0.5423003, 0.3676884, -0.3512667, -0.0919122, 0.4104385,
         0.3827184, -0.4619043, 0.8461801, -0.5272691, -0.1949978, 0.6568275, 1.5475791, 0.3145731,
         -0.4617649, 0.3000902, -1.0962125],
        [-1.3531766, 0.1962436, 0.9149783, 0.9593887, -0.5150229, 0.6032323, -0.826435, 0.6668493, -0.6747693,
         -0.4121802, 0.5713245, 1.3051953],
        [-1.4257812, 0.1441744, 0.2536977, 0.4636375],
        [0.6563309, -0.1903324, 0.4901153, -1.2410237, 0.5912201, 0.2396766, 0.3898271, -0.321284, -0.7478242,
         -0.0398187, -0.2208222, 0.5065274, -0.6112776, -0.0174967, -1.0536097, -0.4616762, 0.8043028,
         -0.4082051, 0.6838319, 0.1765806],
    ]),
    (1.0, 1.0, 3, [
        [0.3468187, 0.2644891, -0.217407, 0.9225589, 0.4964051, 0.3382448, -0.3138495, -0.0910082, 0.3339221,
         0.3472567, -0.3968868, 0.9350499, -0.0204898, -0.6348453, 0.4481615, 1.9437325, -0.0509099,
         -0.2925072, 0.226235, -1.3852422],
        [-1.4027129, 0.2412961, 0.6473994, 0.8307281, -0.5829706, 0.5481203, -1.0717198, 0.998879, -0.5446336,
         -0.1624496, 0.9501973, 1.2432036],
        [-1.8710938, 0.0471614, 0.1820667, 0.9491265],
        [0.3687886, -0.0322028, 0.6132191, -1.3130971, 0.1472156, 0.4503121, 0.137709, -0.421578, -0.7496685,
         0.1130858, 0.0558165, 0.5212013, -0.8640732, 0.0074266, -0.8593985, -0.7086717, 1.1005408,
         -0.3178031, 0.7586517, -0.020527],
    ]),
    (0.5, 0.8, 2, [
        [0.2126856, -0.0113009, 0.0833744, 0.8219626, 0.559375, 0.384375, -0.365625, -0.109375, 0.4738911,
         0.3756885, -0.5337508, 0.8571188, -0.4768785, -0.1719509, 0.6529213, 1.4737508, 0.2696513, -0.479343,
         0.3582934, -1.0325406],
        [-1.3195919, 0.13125, 0.8837394, 0.9602752, -0.5254655, 0.621875, -0.8261192, 0.6628601, -0.6922098,
         -0.425, 0.5405804, 1.3139124],
        [-1.296875, 0.08125, 0.2536977, 0.3971105],
        [0.608023, -0.2004887, 0.5354278, -1.253125, 0.6896939, 0.2865516, 0.4077958, -0.403125, -0.6846523,
         -0.0554437, -0.2489472, 0.478125, -0.6094196, -0.0198405, -1.035641, -0.525, 0.739273, -0.4027364,
         0.6447694, 0.3375],
    ]),
    (1.5, 0.25, 3, [
        [0.1886156, 0.2674187, -0.1998289, 0.7321292, 0.431952, 0.2752565, -0.2596503, -0.0250902, 0.3711516,
         0.3348469, -0.4307318, 0.9745357, -0.124026, -0.2575687, 0.5583997, 1.3865285, -0.0329437,
         -0.4497942, 0.497225, -0.9782091],
        [-1.2164243, 0.188832, 0.7293963, 0.8769224, -0.6892425, 0.8073151, -0.9859202, 0.8832901, -0.5796409,
         -0.0577771, 0.5118093, 1.1071149],
        [-1.1493189, -0.2214497, 0.1820667, 0.6935673],
        [0.5071754, -0.1909616, 0.710943, -1.0928195, 0.2878711, 0.4913881, 0.319585, -0.6373569, -0.7882352,
         -0.0090749, -0.1767638, 0.6671766, -0.7687904, 0.010251, -0.8769206, -0.7356401, 0.9961835,
         -0.3802579, 0.5732097, 0.3485555],
    ]),
]
# fmt: on


@pytest.mark.parametrize(("ratio", "calibration", "count", "theirs"), RELEASED)
def test_released_codes_numbers(ratio, calibration, count, theirs):
    base = draws(0)
    experts = [{n: base[n] + far / (4 if i == 0 else 2) for n, far in draws(i + 1).items()} for i in range(count)]
    made = transform_tensors(Widen(above_average_ratio=ratio, calibration=calibration), base, experts, Context())
    for name, expected in zip(NAMES, theirs, strict=True):
        assert made[name].flatten().tolist() == pytest.approx(expected, abs=2e-6), name


def test_released_code_ranks_zeros_highest():
    """The first of the tables above, but half the change for both and the second token's row zero in all models.
    MergeLLM 9178ef9 gives the first rows below; once that row counts as turned least, the weights are others."""
    base = draws(0)
    experts = [{n: base[n] + far / 2 for n, far in draws(i).items()} for i in (1, 2)]
    for model in (base, *experts):
        model[EMBED][1].zero_()
    theirs = [[0.2449258, -0.0646348, 0.1386654, 0.8853756], [0.0] * 4, [0.4536895, 0.3884837, -0.5214649, 0.8115007]]
    made = transform_tensors(Widen(), base, experts, Context())[EMBED].tolist()
    assert made[1:3] == [pytest.approx(row, abs=2e-6) for row in theirs[1:]]
    assert made[0] == pytest.approx([0.2749948, -0.0947039, 0.1773256, 0.9605482], abs=2e-6) != theirs[0]
    columns = [m[EMBED].tolist() for m in (base, *experts)]
    assert made == [pytest.approx(row, abs=2e-6) for row in twin(columns[0], columns[1:], 1.0, 1.0)]


def scores(values, unit, ratio, calibration):
    """values: one list an expert."""
    means = [math.fsum(v) / len(v) for v in values]
    return [
        [calibration if x > mean * ratio else math.exp(x / unit) / sum(math.exp(v[k] / unit) for v in values)
         for k, x in enumerate(row)]
        for row, mean in zip(values, means, strict=True)
    ]  # fmt: skip


def ranks(values):
    order = sorted(range(len(values)), key=values.__getitem__)  # stable
    return [order.index(k) for k in range(len(values))]


def twin(base, experts, ratio, calibration):
    """A matrix as lists of columns, in doubles."""
    length = lambda column: math.hypot(*column)  # noqa: E731
    longer, turned = [], []
    for expert in experts:
        longer.append([abs(length(e) - length(b)) for e, b in zip(expert, base, strict=True)])
        both = [(math.fsum(x * y for x, y in zip(e, b, strict=True)), length(e) * length(b))
                for e, b in zip(expert, base, strict=True)]  # fmt: skip
        zero = [length(e) + length(b) == 0 for e, b in zip(expert, base, strict=True)]
        turned.append([0 if z else 1 - (d / n if n else 0) for (d, n), z in zip(both, zero, strict=True)])
    parts = [scores([ranks(v) for v in moved], len(base), ratio, calibration) for moved in (longer, turned)]
    weights = [[(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)]
    return [
        [b + sum(w[k] * (e[k][i] - b) for w, e in zip(weights, experts, strict=True)) for i, b in enumerate(column)]
        for k, column in enumerate(base)
    ]


@pytest.mark.parametrize(
    ("name", "rows", "columns"), [(MATRIX, 130, 12), (HEAD, 70, 9), (EMBED, 150, 3), (MATRIX, 2, 1)]
)
def test_equals_a_slow_twin(name, rows, columns):
    """More rows than a piece, and fewer. One column, or row of an embedding, is zero in all, one in the base."""
    gen = torch.Generator().manual_seed(rows)
    base = torch.randn(rows, columns, generator=gen)
    experts = [base + far * torch.randn(rows, columns, generator=gen) for far in (0.01, 0.3, 1.0)]
    by_row = name == EMBED
    if columns > 1:
        for k, held in ((1, [base, *experts]), (2, [base])):
            for tensor in held:
                (tensor[k] if by_row else tensor[:, k]).zero_()
    lists = [(t if by_row else t.T).double().tolist() for t in (base, *experts)]
    method = Widen(above_average_ratio=0.9, calibration=0.7)
    made = torch.tensor(matrix(method, base.tolist(), *(e.tolist() for e in experts), name=name))
    slow = torch.tensor(twin(lists[0], lists[1:], 0.9, 0.7))
    assert torch.allclose(made, slow if by_row else slow.T, atol=1e-5)


def test_a_head_is_weighed_by_column_and_an_embedding_by_row():
    gen = torch.Generator().manual_seed(0)
    base, one, other = (torch.randn(6, 6, generator=gen) for _ in range(3))
    head = matrix(Widen(), base.tolist(), one.tolist(), other.tolist(), name=HEAD)
    embed = matrix(Widen(), base.T.tolist(), one.T.tolist(), other.T.tolist(), name=EMBED)
    assert torch.equal(torch.tensor(head).T, torch.tensor(embed))


def test_small_turns_are_told_apart():
    """Columns that turn by some 1e-4: in fp32 all their cosines are 1, and the ranks are right all the same."""
    turns = [3e-4, 1e-4, 4e-4, 2e-4]
    base, still = ([[1.0] * 4, [0.0] * 4] for _ in range(2))
    one = [[(1 + k / 8) * f(t) for k, t in enumerate(turns)] for f in (math.cos, math.sin)]
    one, columns = torch.tensor(one).tolist(), lambda rows: list(zip(*rows, strict=True))
    slow = twin(columns(base), [columns(torch.tensor(one).tolist()), columns(still)], 1.0, 3.0)
    assert matrix(Widen(calibration=3.0), base, one, still)[1] == pytest.approx([c[1] for c in slow], rel=1e-5)


def test_higher_tensors_are_matrices_of_their_last_dimension():
    gen = torch.Generator().manual_seed(1)
    base, one, other = (torch.randn(6, 4, generator=gen) for _ in range(3))
    flat = matrix(Widen(), base.tolist(), one.tolist(), other.tolist())
    deep = matrix(Widen(), *(t.view(2, 3, 4).tolist() for t in (base, one, other)))
    assert torch.equal(torch.tensor(deep).view(6, 4), torch.tensor(flat))


def test_schedules():
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(3)]
    base, expert = {n: torch.zeros(2) for n in names}, {n: torch.tensor([1.0, 2.0]) for n in names}
    made = merged(Widen(above_average_ratio={"*": -1.0, "*.2.*": 9.0}, calibration=[0.0, 1.0]), base, [expert])
    assert [made[n] for n in names] == [[0.0, 0.0], [0.5, 1.0], [1.0, 2.0]]


@pytest.mark.parametrize("field", ["above_average_ratio", "calibration"])
def test_patterns_for_all(field):
    with pytest.raises(LuthierError, match=f"{field}: no pattern matches"):
        matrix(Widen(**{field: {"x": 1.0}}), [[1.0]], [[2.0]])
