"""PCB-Merging against a hand calculation, a slow twin in plain Python, and numbers from the released scripts."""

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
from luthier.merge.pcb import Pcb

# Changes in sixty-fourths.
MOVED = [
    [8, -1, -16, 2, 0, -9, 4, 12, -30, 3],
    [-8, 3, 5, -6, 1, 10, -4, -2, 20, 7],
    [7, -2, -3, 24, -5, -20, 11, -13, 6, 1],
]


def merged(method, changes):
    """changes: numbers; the merged change of one tensor."""
    base = torch.zeros(len(changes[0]))
    experts = [{"w": torch.tensor(c)} for c in changes]
    return transform_tensors(method, {"w": base}, experts, Context(step="golden"))["w"].tolist()


def table(method):
    return merged(method, [[m / 64 for m in row] for row in MOVED])


def test_by_hand():
    """No clamping, half of four entries. Normalised magnitudes of the first: 1, 0, 1/3, 2/3; of the second:
    1/3, 0, 1, 2/3. Products with the sums (4, 0, -2, 4): the first claims (+, 0, -, +), the second (+, 0, +, +).
    Counting starts above the second largest claim of each with a ratio of a half, above the third with more."""
    first, second = [3.0, 0.0, 1.0, 2.0], [1.0, 0.0, -3.0, 2.0]

    def claim(size, change, total):
        return math.exp(2 * size**2) * math.tanh(change * total)

    one = [claim(s, c, t) for s, c, t in zip([1, 0, 1 / 3, 2 / 3], first, [4, 0, -2, 4], strict=True)]
    two = [claim(s, c, t) for s, c, t in zip([1 / 3, 0, 1, 2 / 3], second, [4, 0, -2, 4], strict=True)]
    assert sorted(one) == [one[2], one[1], one[3], one[0]] and sorted(two) == [two[1], two[0], two[3], two[2]]
    assert merged(Pcb(ratio=0.5, clamp=0.0), [first, second]) == [3.0, 0.0, -3.0, 0.0]
    v, w = (one[3] - one[1]) / (one[0] - one[1]), (two[3] - two[0]) / (two[2] - two[0])
    right = [3.0, 0.0, -3.0, (v * 2.0 + w * 2.0) / (v + w)]
    assert merged(Pcb(ratio=0.75, clamp=0.0), [first, second]) == pytest.approx(right)


# duguodong7/pcb-merging 5897888 run on the numbers above: `PCB_merge`, whose clamp does nothing to ten entries but
# at the upper end, and `PCB` of pcb_ES.py with its merge.
RELEASED = [
    ("sum", 0.3, None, [0, 0, -0.25, 0.3125, 0, -0.3125, 0, -0.03125, -0.25, 0.109375]),
    ("pairs", 0.3, None, [0, 0, -0.25, 0.3125, 0, -0.301341802, 0, 0, 0.15625, 0.109375]),
    (
        "sum",
        0.6,
        None,
        [0.1231068, 0.046875, -0.25, 0.3125, 0.015625, -0.295006931, -0.029334405, -0.035972662, -0.25, 0.109375],
    ),
    (
        "pairs",
        0.6,
        None,
        [
            0, 0.046875, -0.249583155, 0.312156796, 0.015625, -0.299621224, 0.156655163, -0.03125, 0.156039014,
            0.107580028,
        ],
    ),
    (
        "sum",
        1.0,
        None,
        [
            -0.104363523, 0.043964114, -0.094561756, 0.122752793, 0.014436474, -0.287409276, -0.048398361,
            -0.034240451, -0.050186653, 0.106074341,
        ],
    ),
    (
        "pairs",
        1.0,
        None,
        [
            -0.032921787, 0.024808927, -0.122453436, 0.107772574, 0.009625742, -0.261669099, -0.00791379,
            0.044671435, 0.155701026, 0.089299567,
        ],
    ),
    (
        "pairs",
        0.6,
        (1.2, 0.8, 1.0),
        [
            0, 0.037500001, -0.299480557, 0.312164426, 0.0125, -0.301728696, 0.158394575, -0.025, 0.124894515,
            0.086602509,
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("inter", "ratio", "weights", "theirs"), RELEASED)
def test_equals_the_released_scripts(inter, ratio, weights, theirs):
    method = Pcb(inter=inter, ratio=ratio, weights=weights, clamp={"sum": 0.0001, "pairs": 0.01}[inter])
    assert table(method) == pytest.approx(theirs, abs=2e-7)


def test_released_scripts_differ():
    """Expert one claims the ninth entry by itself in one, the two that agree in the other."""
    key_steps, vision = table(Pcb(ratio=0.3)), table(Pcb(ratio=0.3, inter="pairs", clamp=0.01))
    assert key_steps[8] == -0.25 and vision[8] == 0.15625
    assert Pcb().inter == "sum" and Pcb().clamp == 0.0001
    wide = [[float((7 * i) % 101 + 1) for i in range(100)]]
    assert max(merged(Pcb(ratio=0.9, clamp=0.0001), wide)) > max(merged(Pcb(ratio=0.9, clamp=0.05), wide))


def twin(changes, ratio, clamp, inter):
    """Entry by entry on lists of floats, with full sorts."""
    count = len(changes[0])
    claims, held, sizes = [], [], []
    for change in changes:
        order = sorted(abs(x) for x in change)
        low, high = order[int(count * clamp)], order[max(0, int(count * (1 - clamp) - 1))]
        held.append([math.copysign(min(max(abs(x), low), high), x) if x else 0.0 for x in change])
        sizes.append([(min(max(abs(x), low), high) - low) / (high - low) for x in change])
    for change, size in zip(changes, sizes, strict=True):
        row = []
        for d in range(count):
            if inter == "sum":
                agree = math.tanh(change[d] * math.fsum(c[d] for c in changes))
            else:
                signed = [s[d] * ((c[d] > 0) - (c[d] < 0)) for c, s in zip(changes, sizes, strict=True)]
                mine = size[d] * ((change[d] > 0) - (change[d] < 0))
                agree = math.fsum(math.tanh(mine * s) for s in signed)
            row.append(math.exp(len(changes) * size[d] ** 2) * agree)
        order = sorted(row)
        cut, top = order[int(count * (1 - ratio))], order[-1]
        claims.append([max(x - cut, 0.0) / (top - cut) for x in row])
    totals = [max(math.fsum(column), 1e-12) for column in zip(*claims, strict=True)]
    return [math.fsum(w[d] * h[d] for w, h in zip(claims, held, strict=True)) / totals[d] for d in range(count)]


@pytest.mark.parametrize("inter", ["sum", "pairs"])
@pytest.mark.parametrize(("ratio", "clamp"), [(0.1, 0.0001), (0.35, 0.1), (0.95, 0.01), (1.0, 0.25)])
def test_equals_a_slow_twin(inter, ratio, clamp):
    for seed in range(4):
        draw = random.Random(seed)
        changes = [[draw.gauss(0, 1) for _ in range(150)] for _ in range(3)]
        changes = [torch.tensor(c).tolist() for c in changes]  # as fp32 holds them
        made, slow = merged(Pcb(ratio=ratio, clamp=clamp, inter=inter), changes), twin(changes, ratio, clamp, inter)
        assert made == pytest.approx(slow, rel=2e-4, abs=1e-6)


def test_bounds_are_the_whole_models():
    """Two tensors are merged like one that holds both."""
    draw = torch.Generator().manual_seed(0)
    changes = torch.randn(2, 90, generator=draw) * torch.linspace(0.1, 3, 90)
    experts = [{"a": c[:30].clone(), "b": c[30:].clone().view(6, 10)} for c in changes]
    made = transform_tensors(Pcb(), {"a": torch.zeros(30), "b": torch.zeros(6, 10)}, experts, Context())
    assert [*made["a"].tolist(), *made["b"].view(-1).tolist()] == merged(Pcb(), changes.tolist())


def test_schedules_by_name():
    base = {"a": torch.zeros(10), "b": torch.zeros(10)}
    experts = [{n: torch.tensor(row) / 64 for n in base} for row in MOVED]
    plain = transform_tensors(Pcb(ratio=1.0), base, experts, Context())["a"]
    method = Pcb(ratio=1.0, scale={"*": 2.0, "b": 0.5}, weights=({"*": 1.0, "b": 3.0},) * 3)
    made = transform_tensors(method, base, experts, Context())
    assert torch.allclose(made["a"], 2 * plain) and torch.allclose(made["b"], 1.5 * plain)


def test_large_models_take_the_sampled_way(monkeypatch):
    """Above 2^20 entries samples find the brackets: the same merge as with full sorts."""
    draw = torch.Generator().manual_seed(1)
    size = select.SMALL + CHUNK + 17
    c = torch.randn(2, size, generator=draw) * torch.linspace(0.1, 1, size)
    order = c.abs().sort(1).values
    low, high = order[:, int(size * 0.01), None], order[:, int(size * 0.99 - 1), None]
    held = c.sign() * c.abs().clamp(low, high)
    claim = torch.exp(2 * ((held.abs() - low) / (high - low)) ** 2) * torch.tanh(c * c.sum(0))
    order = claim.sort(1).values
    cut, top = order[:, int(size * 0.9), None], order[:, -1:]
    claim = (claim - cut).clamp(min=0) / (top - cut)
    slow = (claim * held).sum(0) / claim.sum(0).clamp(min=1e-12)
    monkeypatch.setattr(Bracket, "narrower", None)  # one pass has to do
    experts = [{"w": x.clone()} for x in c]
    made = transform_tensors(Pcb(clamp=0.01), {"w": torch.zeros(size)}, experts, Context())["w"]
    assert ((made - slow).abs() > 1e-5).sum() <= 2  # at a cut the last bit decides
    assert 0.1 < (made != 0).float().mean() < 0.2


def test_released_code_breaks_on_an_expert_that_did_not_move():
    """Normalised, it is 0 / 0, run as above; here it claims nothing and the other's changes stand."""
    first = [m / 64 for m in MOVED[0]]
    for still in (0.0, 1.0):
        made = merged(Pcb(ratio=0.5), [first, [still] * 10])
        assert all(math.isfinite(x) for x in made) and any(made)
    assert merged(Pcb(ratio=0.5), [first, [0.0] * 10]) == merged(Pcb(ratio=0.5), [first])


def test_the_default_counts_a_tenth():
    """Of a thousand: counting starts at the hundredth largest, at zero."""
    row = [float(v) for v in range(1, 1001)]
    assert [i for i, v in enumerate(merged(Pcb(), [row])) if v] == [*range(901, 1000)]


def test_small_claims_are_divided_by_what_they_are():
    """5e-6 claims some 1e-11 of what 1 does, alone: it stands. Below 1e-12 it fades, as released."""
    made = merged(Pcb(ratio=1.0, clamp=0.0), [[1.0, 5e-6, 1e-7, 0.0]])
    assert made[:2] == pytest.approx([1.0, 5e-6], rel=1e-5) and 0 < made[2] < 1e-9


def test_streams_too_long_to_keep_find_the_same(monkeypatch):
    """By histograms of bits, zeros and claims below zero among them."""
    draw = random.Random(5)
    changes = [[float(draw.randint(-3, 3)) for _ in range(400)] for _ in range(3)]
    methods = [Pcb(ratio=r, inter=i, clamp=0.01) for r in (0.1, 0.5, 0.9) for i in ("sum", "pairs")]
    plain = [merged(method, changes) for method in methods]
    monkeypatch.setattr(select, "KEPT", 10)
    assert [merged(method, changes) for method in methods] == plain


def test_few_entries():
    """The upper bound of two entries is the smaller one: both are clamped to it, as released."""
    assert merged(Pcb(ratio=1.0), [[3.0, 1.0]]) == [1.0, 0.0]
    assert merged(Pcb(ratio=1.0), [[2.0], [1.0]]) == [0.0]  # its claim is the least and the largest at once


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"ratio": 0.0}, "above 0.0 up to 1.0"), ({"clamp": 0.5}, "up to 0.25"), ({"inter": "pair"}, "'pairs'")],
)
def test_fields_that_cannot_be(fields, says):
    with pytest.raises(LuthierError, match="merge.pcb") as fault:
        Pcb(**fields)
    assert says in str(fault.value)


def test_one_number_an_expert():
    with pytest.raises(LuthierError, match="weights: 2 numbers for 3 experts"):
        table(Pcb(weights=(1.0, 1.0)))
