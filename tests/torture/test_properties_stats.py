"""Statistics, verdicts and schedules."""

import itertools
import json
import math
import random
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import SEEDS, often, randn

from luthier.errors import LuthierError
from luthier.kit import stats, verdict
from luthier.kit.context import Context
from luthier.kit.schedule import at

DIFFS = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=12)
SHORT = st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=2, max_size=9)


def rng(seed):
    return torch.Generator().manual_seed(seed)


@given(DIFFS, SEEDS, st.sampled_from([0.5, 2.0, 8.0]), st.integers(-4, 4))
@often(25)
def test_bootstrap_moves_and_stretches_with_its_data(diffs, seed, scale, shift):
    one = stats.paired_bootstrap(diffs, resamples=300, generator=rng(seed))
    other = stats.paired_bootstrap([scale * d + shift for d in diffs], resamples=300, generator=rng(seed))
    for a, b in ((one.mean, other.mean), (one.low, other.low), (one.high, other.high)):
        assert b == pytest.approx(scale * a + shift, abs=1e-9)
    assert min(diffs) - 1e-9 <= one.low <= one.high <= max(diffs) + 1e-9 and 0 < one.p <= 1


@given(DIFFS, SEEDS)
@often(20)
def test_bootstrap_mirrors_and_p_is_even(diffs, seed):
    one = stats.paired_bootstrap(diffs, resamples=300, generator=rng(seed))
    other = stats.paired_bootstrap([-d for d in diffs], resamples=300, generator=rng(seed))
    assert (other.low, other.high, other.p) == pytest.approx((-one.high, -one.low, one.p), abs=1e-9)


@given(DIFFS, SEEDS, st.integers(1, 5))
@often(20)
def test_equal_weights_are_no_weights(diffs, seed, weight):
    plain = stats.paired_bootstrap(diffs, resamples=200, generator=rng(seed))
    same = stats.paired_bootstrap(diffs, resamples=200, generator=rng(seed), weights=[weight] * len(diffs))
    assert (same.mean, same.low, same.high, same.p) == pytest.approx((plain.mean, plain.low, plain.high, plain.p))
    flips = [stats.sign_flip(diffs, resamples=5000, weights=w) for w in (None, [weight] * len(diffs))]
    assert flips[0].p == flips[1].p and flips[0].low == pytest.approx(flips[1].low, abs=1e-6)


@given(SHORT)
@often(25)
def test_sign_flip_counts_all_flips(diffs):
    want = sum(
        abs(sum(s * d for s, d in zip(signs, diffs, strict=True))) >= abs(sum(diffs)) - 1e-12
        for signs in itertools.product((-1, 1), repeat=len(diffs))
    ) / 2 ** len(diffs)  # fmt: skip
    got = stats.sign_flip(diffs)
    assert got.p == want and got.low <= got.mean <= got.high


@given(SHORT, st.permutations(range(9)))
@often(15)
def test_sign_flip_does_not_care_for_order_or_side(diffs, order):
    turned = [diffs[i] for i in order if i < len(diffs)]
    one, two, three = stats.sign_flip(diffs), stats.sign_flip(turned), stats.sign_flip([-d for d in diffs])
    assert one.p == two.p == three.p and (two.low, two.high) == pytest.approx((one.low, one.high), abs=1e-6)
    assert (three.low, three.high) == pytest.approx((-one.high, -one.low), abs=1e-6)


@given(st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=6, max_size=9))
@often(15)
def test_sign_flip_rejects_what_lies_outside_its_interval(diffs):
    got = stats.sign_flip(diffs, 0.9)
    for edge, way in ((got.low, -1), (got.high, 1)):
        if math.isfinite(edge):
            width = 1e-5 * (1 + abs(edge))
            assert stats.sign_flip([d - edge - way * width for d in diffs], 0.9).p <= 0.1 + 1e-12


@given(SEEDS)
@often(3, 40)
def test_intervals_cover_about_as_often_as_they_say(seed):
    hits = {"bootstrap": 0, "flip": 0, "t": 0}
    for i in range(60):
        diffs = (randn(seed + i, 24) + 0.5).tolist()
        for name, got in (("bootstrap", stats.paired_bootstrap(diffs, 0.9, 300, rng(seed + i))),
                          ("flip", stats.sign_flip(diffs, 0.9, 300, rng(seed + i))),
                          ("t", stats.paired_t(diffs, 0.9))):  # fmt: skip
            hits[name] += got.low <= 0.5 <= got.high
    assert all(count >= 40 for count in hits.values()), hits  # 54 are expected; below 40 is beyond five deviations


@given(DIFFS)
@often(25)
def test_t_intervals_are_those_of_numpy(diffs):
    got, n = stats.paired_t(diffs), len(diffs)
    mean, error = float(np.mean(diffs)), float(np.std(diffs, ddof=1)) / math.sqrt(n)
    assert got.mean == pytest.approx(mean, abs=1e-12)
    assert (got.high - got.low) / 2 == pytest.approx(stats.t_quantile(0.975, n - 1) * error, rel=1e-6, abs=1e-9)
    assert error == 0 or (got.p < 0.05) == (got.low > 0 or got.high < 0) or min(abs(got.low), abs(got.high)) < 1e-6


@given(st.integers(1, 40), st.floats(0.501, 0.9999))
@often(40)
def test_t_quantiles_invert_the_distribution(freedom, p):
    t = stats.t_quantile(p, freedom)
    assert stats.t_cdf(t, freedom) == pytest.approx(p, abs=1e-9)
    assert stats.t_cdf(-t, freedom) == pytest.approx(1 - p, abs=1e-9)
    assert t >= stats.t_quantile(p, freedom + 1) - 1e-9


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 1))
@often(40)
def test_false_discovery_control_is_the_step_up_procedure(ps, level):
    adjusted = stats.benjamini_hochberg(ps)
    ranked = sorted(ps)
    most = max((i for i, p in enumerate(ranked, 1) if p * (len(ps) / i) <= level), default=0)
    cut = ranked[most - 1] if most else -1.0
    assert [a <= level for a in adjusted] == [p <= cut for p in ps]
    assert all(p <= a <= 1 for p, a in zip(ps, adjusted, strict=True))


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=12))
@often(40)
def test_rank_correlation_against_numpy(pairs):
    a, b = ([float(p[i]) for p in pairs] for i in (0, 1))

    def ranks(x):
        return [sum(y < v for y in x) + (sum(y == v for y in x) + 1) / 2 for v in x]

    got = stats.spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert got is None
        return
    assert got == pytest.approx(float(np.corrcoef(ranks(a), ranks(b))[0, 1]), abs=1e-9)
    assert stats.spearman([math.exp(x) for x in a], b) == pytest.approx(got) == stats.spearman(b, a)


CONTRAST = st.fixed_dictionaries({
    "data": st.just("d"), "metric": st.sampled_from(["nll", "accuracy", "score"]),
    "diff": st.floats(-1, 1), "low": st.floats(-1, 1), "high": st.floats(-1, 1),
}).map(lambda c: c | {"low": min(c["low"], c["high"]), "high": max(c["low"], c["high"])})  # fmt: skip


@given(st.lists(CONTRAST, max_size=4))
@often(60)
def test_verdicts_follow_their_rule(contrasts):
    good = [(c["high"] < 0 if c["metric"] == "nll" else c["low"] > 0) for c in contrasts]
    bad = [(c["low"] > 0 if c["metric"] == "nll" else c["high"] < 0) for c in contrasts]
    want = "shown" if contrasts and all(good) else "refuted" if any(bad) else "not shown"
    assert verdict.judge(contrasts) == want
    assert verdict.note("q?", contrasts).startswith(f"q? -> {want}: ")
    mirrored = [c | {"low": -c["high"], "high": -c["low"]} for c in contrasts]
    if len(contrasts) == 1:
        opposite = {"shown": "refuted", "refuted": "shown", "not shown": "not shown"}
        assert verdict.judge(mirrored) == opposite[want]


GRADIENT = st.lists(st.floats(-9, 9), min_size=1, max_size=6)


@given(GRADIENT, st.floats(0, 1))
@often(60)
def test_a_gradient_over_depth_is_numpys_interpolation(values, depth):
    got = at(values, "model.layers.3.x", depth)
    if len(values) == 1:
        assert got == values[0]
    else:
        assert got == pytest.approx(float(np.interp(depth * (len(values) - 1), range(len(values)), values)), abs=1e-9)
    assert min(values) - 1e-9 <= got <= max(values) + 1e-9
    assert (
        at(values, "model.embed_tokens.weight", None) == values[0] and at(values, "lm_head.weight", None) == values[-1]
    )


@given(st.dictionaries(st.sampled_from(["*", "*mlp*", "a.*", "*.b", "?.b", "[ab].*", "zz"]),
    st.one_of(st.floats(-3, 3), GRADIENT)),
       st.sampled_from(["a.b", "a.mlp.b", "b.b", "c", "embed"]), st.one_of(st.none(), st.floats(0, 1)))  # fmt: skip
@often(60)
def test_of_globs_the_last_match_wins(globs, name, depth):
    hits = [value for glob, value in globs.items() if fnmatchcase(name, glob)]
    if not hits:
        with pytest.raises(LuthierError, match="no pattern matches"):
            at(globs, name, depth)
        return
    assert at(globs, name, depth) == at(hits[-1], name, depth)


KEYS = st.lists(st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.none()), max_size=3)


@given(st.integers(0, 2**63), st.text(max_size=8), KEYS, KEYS)
@often(60)
def test_randomness_is_keyed_by_all_it_is_given(seed, step, one, other):
    ctx = Context(seed=seed, step=step)
    first = torch.rand(3, generator=ctx.rng(*one))
    ctx.rng(*other), torch.rand(7)  # what else was drawn, and in what order, does not matter
    assert torch.equal(torch.rand(3, generator=Context(seed=seed, step=step).rng(*one)), first)
    assert 0 <= ctx.key(*one) < 2**63
    assume(json.dumps(one) != json.dumps(other))
    assert ctx.key(*one) != ctx.key(*other) and ctx.key(*one) != Context(seed=seed + 1, step=step).key(*one)
    assert ctx.key(*one) != Context(seed=seed, step=step + "x").key(*one)


@given(st.lists(st.integers(0, 9), max_size=12), st.booleans())
@often(20)
def test_progress_says_how_far_it_is(items, known):
    seen = []
    ctx = Context(step="s", watch=seen.append)
    assert list(ctx.progress(items if known else iter(items), what="w")) == items
    assert [e["done"] for e in seen[:-1]] == list(range(len(items)))
    assert all(e["total"] == (len(items) if known else None) and e["step"] == "s" for e in seen)


@given(st.lists(st.tuples(st.text("ab", min_size=1, max_size=3), st.floats(0, 1)), min_size=1, max_size=30),
    st.floats(0, 1),
       SEEDS)  # fmt: skip
@often(40)
def test_the_control_keeps_answers_and_moves_them(pairs, share, seed):
    from luthier.engine.splits import shuffle_answers
    from luthier.flows import Item

    items = [Item(id=str(i), prompt=str(i), answer=a) for i, (a, _) in enumerate(pairs)]
    got = shuffle_answers(items, seed)
    assert sorted(i.answer for i in got) == sorted(i.answer for i in items) and [i.id for i in got] == [
        i.id for i in items
    ]
    most = max(sum(i.answer == a for i in items) for a in {i.answer for i in items})
    stay = sum(a.answer == b.answer for a, b in zip(got, items, strict=True))
    assert stay == max(0, 2 * most - len(items))  # only what a majority forces
    assert random.Random(seed).random() == random.Random(seed).random()
