"""DARE against a slow twin that draws every entry's 32 bits on its own, binomial bounds, and mergekit 0.1.5."""

import math

import numpy as np
import pytest
import torch

from luthier.engine.pieces import CHUNK, Inputs, Memory
from luthier.engine.slices import sliced
from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit import noise
from luthier.kit.context import Context
from luthier.kit.noise import below
from luthier.merge.dare import Dare
from luthier.merge.linear import Linear

# Changes in sixty-fourths, so that the sums below are exact.
BASE = [0.5, -0.25, 1.0, 0.0, -1.0, 0.75, 0.125, -0.5]
MOVED = [[8, -1, -16, 2, 0, -9, 4, 12], [-8, 3, 5, -6, 1, 10, -4, -2], [7, -2, -3, 24, -5, -20, 11, -13]]
CTX = Context(step="golden")


def merged(method, base, changes, ctx=CTX, name="w"):
    base = torch.tensor(base)
    experts = [{name: base + torch.tensor(c)} for c in changes]
    return transform_tensors(method, {name: base}, experts, ctx)[name].tolist()


def hand(method, moved=MOVED, base=BASE, ctx=CTX):
    return merged(method, base, [[m / 64 for m in row] for row in moved], ctx)


def stays(key, count, density):
    """An entry stays if its 32 bits, 16 from each of two Philox streams, are below the density."""
    upper, lower = (np.random.Philox(key=k).random_raw(count).tolist() for k in (key, key + 2**64))
    parts = [[r >> s & 0xFFFF for r in raw for s in (0, 16, 32, 48)] for raw in (upper, lower)]
    return [u * 65536 + v < round(density * 2**32) for u, v, _ in zip(*parts, range(count), strict=False)]


def twin(base, changes, density, rescale, weights, vote, normalize, scale=1.0, ctx=CTX):
    """DARE entry by entry on named lists of floats, in doubles."""
    thinned = []
    for e, change in enumerate(changes):
        row = {}
        for name, values in change.items():
            left = [c * s for c, s in zip(values, stays(ctx.key(name, e), len(values), density), strict=True)]
            before, after = (sum(map(abs, v)) for v in (values, left))
            by = {"expectation": 1 / density, "none": 1, "l1": before / after if after else 1}[rescale]
            row[name] = [weights[e] * by * v for v in left]
        thinned.append(row)
    sums = {n: [math.fsum(t[n][i] for t in thinned) for i in range(len(base[n]))] for n in base}
    net = sum((s > 0) - (s < 0) for v in sums.values() for s in v)
    tie = {"none": 0, "plus": 1, "majority": (net > 0) - (net < 0)}[vote]
    made = {}
    for n in base:
        made[n] = []
        for i, total in enumerate(sums[n]):
            sign = (total > 0) - (total < 0) or tie
            taken = [
                (t[n][i], w) for t, w in zip(thinned, weights, strict=True) if vote == "none" or t[n][i] * sign > 0
            ]
            value = sum(v for v, _ in taken) / (sum(w for _, w in taken) or 1 if normalize else 1)
            made[n].append(base[n][i] + scale * value)
    return made


@pytest.mark.parametrize("rescale", ["expectation", "l1", "none"])
@pytest.mark.parametrize("vote", ["none", "plus", "majority"])
@pytest.mark.parametrize(
    ("weights", "normalize"), [(None, False), ((0.5, 2.0, -1.25), False), ((0.5, 2.0, 1.25), True)]
)
def test_equals_a_slow_twin(rescale, vote, weights, normalize):
    """Small whole numbers, so that ties abound; a lean that makes the majority plus, or minus."""
    gen = torch.Generator().manual_seed(5)
    for lean in (-1, 1):
        sizes = {"a": 70, "b": 5, "c": 131}
        base = {n: torch.randint(-9, 9, (k,), generator=gen).float() for n, k in sizes.items()}
        changes = [
            {n: torch.randint(-3, 4, (k,), generator=gen).float() + lean for n, k in sizes.items()} for _ in "123"
        ]
        changes[1] = {n: -c if n == "a" else c for n, c in changes[0].items()}  # cancels wherever both stay
        experts = [{n: base[n] + c[n] for n in sizes} for c in changes]
        fields = {"rescale": rescale, "vote": vote, "normalize": normalize}
        made = transform_tensors(Dare(density=0.5, weights=weights, scale=1.5, **fields), base, experts, CTX)
        slow = twin({n: t.tolist() for n, t in base.items()}, [{n: t.tolist() for n, t in c.items()} for c in changes],
                    0.5, weights=weights or (1, 1, 1), scale=1.5, **fields)  # fmt: skip
        for n in sizes:
            assert made[n].tolist() == pytest.approx(slow[n], rel=1e-5, abs=1e-5), n


def test_by_hand():
    """With this seed the first expert keeps the entries marked x, and they are doubled."""
    kept = ["x.x.xxx.", "...xxx.."]
    found = [stays(CTX.key("w", e), 8, 0.5) for e in (0, 1)]
    for e in (0, 1):
        alone = hand(Dare(density=0.5, weights=[1 - e, e]), MOVED[:2])
        assert alone == [b + m / 32 * s for b, m, s in zip(BASE, MOVED[e], found[e], strict=True)]
    assert ["".join(".x"[s] for s in row) for row in found] == kept


def test_pieces_continue_the_draw():
    """A tensor of several pieces, and the same one entry later: places count from the tensor's start."""
    size = 2 * CHUNK + 17
    found = torch.tensor(stays(CTX.key("w", 0), size, 0.25))
    made = transform_tensors(Dare(density=0.25), {"w": torch.zeros(size)}, [{"w": torch.ones(size)}], CTX)["w"]
    assert torch.equal(made, found * 4.0)


def test_shares_and_expectation():
    """Of 2^18 entries each stays with the density, experts apart, and the sum of the change is kept."""
    size, density = 1 << 18, 0.1
    base, ones = {"w": torch.zeros(size)}, {"w": torch.ones(size)}
    spread = math.sqrt(size * density * (1 - density))
    alone = [transform_tensors(Dare(weights=w), base, [ones, ones], CTX)["w"] for w in ([1, 0], [0, 1])]
    for made in alone:
        assert set(made.unique().tolist()) == {0.0, 10.0}
        assert abs(float(made.sum()) / 10 - size * density) < 5 * spread
    both = int((alone[0] * alone[1] > 0).sum())
    assert abs(both - size * density**2) < 5 * math.sqrt(size * density**2)


def test_seeds_steps_and_tensors_draw_apart():
    ones = torch.ones(4000)
    draw = lambda ctx: transform_tensors(
        Dare(density=0.5), {"a": 0 * ones, "b": 0 * ones}, [{"a": ones, "b": ones}], ctx
    )  # noqa: E731,E501
    first = draw(CTX)
    others = [draw(CTX.with_(seed=1))["a"], draw(CTX.with_(step="other"))["a"], first["b"]]
    for other in others:
        assert abs(int((first["a"] == other).sum()) - 2000) < 5 * math.sqrt(1000)


def test_an_expert_alone_in_a_slice_keeps_its_number():
    """Layers of one expert each: the second has its own density, weight and draw, as if both were there."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    method = Dare(densities=[1.0, 0.5], weights=[2.0, 3.0])
    base, *experts = (Memory({n: torch.full((1, 8), v) for n in names}) for v in (0.0, 1.0, 1.0))
    whole = Inputs(base, tuple(experts), base.tensors, method.granularity, config={"num_hidden_layers": 2})
    inputs = method.plan(sliced(whole, [[(None, 0, 1), (0, 0, 1)], [(None, 1, 2), (1, 1, 2)]], method))
    seen = CTX.with_(survey=method.survey(inputs, CTX))
    made = [method.transform(piece, seen).flatten().tolist() for piece in inputs.pieces()]
    assert made == [[2.0] * 8, [6.0 * s for s in stays(CTX.key(names[1], 1), 8, 0.5)]]


def test_schedules_by_depth_and_name():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["lm_head.weight"]
    base = {n: torch.zeros(4000) for n in names}
    expert = {n: torch.ones(4000) for n in names}
    method = Dare(density={"*": [0.0, 1.0], "lm_head*": 0.25}, rescale="none")
    made = transform_tensors(method, base, [expert], CTX)
    for name, share in zip(names, (0, 0.5, 1, 0.25), strict=True):
        assert abs(float(made[name].sum()) - 4000 * share) <= 5 * math.sqrt(4000 * share * (1 - share))


def test_the_default_drops_nine_in_ten_and_multiplies_by_ten():
    assert Dare() == Dare(density=0.1, rescale="expectation", vote="none", normalize=False, scale=1.0)


def test_nothing_stays():
    for rescale in ("expectation", "l1", "none"):
        for vote in ("none", "majority"):
            assert hand(Dare(density=0.0, rescale=rescale, vote=vote)) == BASE


def test_averages():
    """The paper's averaging: the mean of the models after the drop."""
    assert hand(Dare(density=1.0, normalize=True)) == pytest.approx(
        transform_tensors(Linear(), None, [{"w": torch.tensor(BASE) + torch.tensor(m) / 64} for m in MOVED], CTX)["w"]
    )


# mergekit 0.1.5, `merge_tensors(..., base_index=0)` in fp32 on the numbers above: dare_linear and dare_ties at
# density 1, which draws nothing.
MERGEKIT = [
    (
        "dare_linear",
        {"vote": "none"},
        {},
        [0.557812512, -0.246875003, 0.850000024, 0.087500006, -1.015625, 0.635937512, 0.189062506, -0.4453125],
    ),
    (
        "dare_linear",
        {"vote": "none"},
        {"normalize": True, "scale": 0.8},
        [0.530833364, -0.248333335, 0.920000017, 0.046666671, -1.008333325, 0.689166665, 0.159166664, -0.470833331],
    ),
    (
        "dare_ties",
        {"vote": "plus"},
        {},
        [0.620312512, -0.2265625, 0.810937524, 0.134375006, -1.0234375, 0.557812512, 0.220312506, -0.368750006],
    ),
    (
        "dare_ties",
        {"vote": "plus"},
        {"normalize": True, "scale": 0.8},
        [0.596249998, -0.212500006, 0.848749995, 0.107500009, -1.0625, 0.596249998, 0.201250017, -0.349999994],
    ),
]


@pytest.mark.parametrize(("theirs", "form", "fields", "values"), MERGEKIT)
def test_mergekit_parity_where_nothing_is_drawn(theirs, form, fields, values):
    assert hand(Dare(density=1.0, weights=[0.7, 0.5, 0.3], **form, **fields)) == pytest.approx(values, abs=1e-7)


# mergekit 0.1.5, `sparsify.rescaled_masked_tensor(change, mask, RescaleNorm.l1)` in fp32, with our masks at density
# 0.5 of the three changes above; then `merge_tensors` of base + those by task_arithmetic, and by ties at density 1
# without normalize.
RESCALED = [
    [0.175675675, -0.0, -0.351351351, 0.0, 0.0, -0.197635129, 0.087837838, 0.0],
    [-0.0, 0.0, 0.0, -0.215073526, 0.035845589, 0.358455896, -0.0, -0.0],
    [0.160290956, -0.045797415, -0.0, 0.549569011, -0.114493534, -0.457974136, 0.0, -0.0],
]
L1_ADDED = [0.835966647, -0.295797408, 0.64864862, 0.334495485, -1.078647852, 0.452846646, 0.212837845, -0.5]
L1_VOTED = [0.835966647, -0.295797408, 0.64864862, 0.549569011, -1.114493489, 0.09439075, 0.212837845, -0.5]


def test_mergekit_rescales_by_l1():
    """Given the same mask, theirs is ours with rescale: l1; and it is not 1 over the density."""
    masks = [stays(CTX.key("w", e), 8, 0.5) for e in range(3)]
    for e, (mask, theirs) in enumerate(zip(masks, RESCALED, strict=True)):
        alone = hand(Dare(density=0.5, rescale="l1", weights=[float(e == i) for i in range(3)]), base=[0.0] * 8)
        assert alone == pytest.approx(theirs, abs=1e-7) and [v != 0 for v in alone] == [
            s and m != 0 for s, m in zip(mask, MOVED[e], strict=True)
        ]
    assert hand(Dare(density=0.5, rescale="l1")) == pytest.approx(L1_ADDED, abs=2e-7)
    assert hand(Dare(density=0.5, rescale="l1", vote="plus")) == pytest.approx(L1_VOTED, abs=2e-7)
    assert hand(Dare(density=0.5)) != pytest.approx(L1_ADDED, abs=1e-3)


def test_masses_span_pieces_and_tensors():
    """The norm of a tensor, not of a piece of it or of the model."""
    gen = torch.Generator().manual_seed(1)
    base = {"a": torch.zeros(CHUNK + 999), "b": torch.zeros(7000)}
    change = {"a": torch.linspace(0, 1, CHUNK + 999), "b": torch.randn(7000, generator=gen)}
    made = transform_tensors(Dare(density=0.3, rescale="l1"), base, [change], CTX)
    for n in base:
        assert float(made[n].abs().sum(dtype=torch.float64)) == pytest.approx(float(change[n].abs().sum()), rel=1e-5)
        assert float((made[n] != 0).float().mean()) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"density": 1.5}, "from 0.0 up to 1.0"),
        ({"vote": "minus"}, "known: majority, none, plus"),
        ({"rescale": "l2"}, "did you mean 'l1'?"),
    ],
)
def test_fields_that_cannot_be(fields, says):
    with pytest.raises(LuthierError, match="merge.dare") as fault:
        Dare(**fields)
    assert says in str(fault.value)


@pytest.mark.parametrize("field", ["weights", "densities"])
def test_one_number_an_expert(field):
    with pytest.raises(LuthierError, match=f"{field}: 2 numbers for 3 experts"):
        hand(Dare(**{field: [0.5, 0.5]}))


def test_weights_that_cancel():
    with pytest.raises(LuthierError, match="weights: they sum to 0 at w; set normalize: false"):
        hand(Dare(weights=[1, -1], normalize=True), MOVED[:2])
    hand(Dare(weights=[1, -1]), MOVED[:2])
    hand(Dare(weights=[1, -1], normalize=True, vote="plus"), MOVED[:2])


@pytest.mark.parametrize("rescale", ["expectation", "l1"])
@pytest.mark.parametrize("vote", ["none", "plus", "majority"])
def test_every_entry_is_drawn_once(monkeypatch, rescale, vote):
    """However many passes there are: masses, votes that tie, the merge."""
    drawn = []
    monkeypatch.setattr(
        noise, "below", lambda key, start, *rest: drawn.append((key, start)) or below(key, start, *rest)
    )
    hand(Dare(density=0.5, rescale=rescale, vote=vote))
    assert sorted(drawn) == sorted((CTX.key("w", expert), 0) for expert in range(3))


@pytest.mark.parametrize(("fields", "bits"), [
    ({"vote": "majority"}, 4), ({"rescale": "l1"}, 4), ({}, 0), ({"vote": "plus"}, 0),
])  # fmt: skip
def test_what_is_drawn_is_kept_where_it_is_needed_again(fields, bits):
    """A bit an entry and model, whole bytes a tensor; the plan counts it among what goes to disk."""
    from luthier.engine.stream import plan_transform

    source = Memory({"w": torch.zeros(20, 3), "norm": torch.zeros(9)})
    planned = plan_transform(Dare(density=0.5, **fields), source, [source] * 3)
    assert planned.kept_bytes == bits * (8 + 2)
    assert plan_transform(Linear(), None, [source] * 3).kept_bytes == 0
