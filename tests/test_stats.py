"""Intervals and p-values, against hand calculations, printed tables and independent slow twins."""

import itertools
import math
import random

import pytest
import torch

from luthier.kit.stats import benjamini_hochberg, paired_bootstrap, paired_t, sign_flip, spearman, t_cdf, t_quantile


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("freedom", "p", "t"),  # any printed table of Student's distribution
    [(1, 0.975, 12.706), (2, 0.975, 4.303), (3, 0.95, 2.353), (4, 0.975, 2.776), (9, 0.995, 3.250), (30, 0.975, 2.042)],
)
def test_t_quantiles_are_those_of_the_tables(freedom, p, t):
    assert t_quantile(p, freedom) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 12])
def test_t_cdf_is_the_integral_of_its_density(freedom):
    c = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    steps = 4000
    for t in (0.3, 1.0, 2.5, -1.7):
        x = [(i + 0.5) / steps * t for i in range(steps)]
        area = sum(c * (1 + v * v / freedom) ** (-(freedom + 1) / 2) for v in x) * t / steps
        assert t_cdf(t, freedom) == pytest.approx(0.5 + area, abs=1e-7)


def test_paired_t_by_hand():
    # diffs 1..5: mean 3, standard deviation sqrt(2.5), error sqrt(0.5); t = 3 / sqrt(0.5) = 4.243 at 4 degrees
    got = paired_t([1, 2, 3, 4, 5])
    assert (got.mean, got.low, got.high) == pytest.approx((3, 3 - 2.7764 * 0.5**0.5, 3 + 2.7764 * 0.5**0.5), abs=1e-4)
    assert got.p == pytest.approx(0.0132, abs=1e-4)
    assert paired_t([2.0, 2.0]).p == 0.0 and paired_t([0.0, 0.0]).p == 1.0
    assert paired_t([1.0]).high == math.inf


def test_bootstrap_against_a_slow_twin():
    diffs, weights = [0.5, -0.2, 0.9, 0.1, 0.4, -0.1, 0.7], [1, 2, 3, 1, 5, 2, 1]
    got = paired_bootstrap(diffs, resamples=20_000, generator=rng(), weights=weights)
    plain, means = random.Random(1), []
    for _ in range(20_000):
        drawn = [plain.randrange(7) for _ in diffs]
        means.append(sum(diffs[i] * weights[i] for i in drawn) / sum(weights[i] for i in drawn))
    means.sort()
    assert got.mean == pytest.approx(sum(d * w for d, w in zip(diffs, weights, strict=True)) / sum(weights))
    assert (got.low, got.high) == pytest.approx((means[500], means[19_500]), abs=0.015)
    assert got.p == pytest.approx(2 * sum(m <= 0 for m in means) / 20_000, abs=0.005)


def test_bootstrap_is_decided_by_its_generator_not_by_chunks(monkeypatch):
    diffs = torch.randn(50, generator=rng()).tolist()
    first = paired_bootstrap(diffs, resamples=1000, generator=rng(3))
    torch.rand(5)
    assert paired_bootstrap(diffs, resamples=1000, generator=rng(3)) == first
    monkeypatch.setattr("luthier.kit.stats._CHUNK", 50 * 64)
    again = paired_bootstrap(diffs, resamples=1000, generator=rng(3))
    assert again.low == pytest.approx(first.low) and again.p == pytest.approx(first.p)


def test_bootstrap_narrows_with_the_level_and_mirrors():
    diffs = torch.randn(40, generator=rng()).tolist()
    wide, narrow = (paired_bootstrap(diffs, level, 4000, rng(1)) for level in (0.99, 0.8))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    turned = paired_bootstrap([-d for d in diffs], 0.99, 4000, rng(1))
    assert (turned.low, turned.high) == pytest.approx((-wide.high, -wide.low))


def test_sign_flip_p_against_all_flips():
    diffs = [0.5, -0.2, 0.9, 0.3, 0.4, -0.1, 0.7]
    mean = abs(sum(diffs))
    flipped = [
        abs(sum(s * d for s, d in zip(signs, diffs, strict=True))) for signs in itertools.product((-1, 1), repeat=7)
    ]
    assert sign_flip(diffs).p == sum(f >= mean - 1e-12 for f in flipped) / 2**7


def test_sign_flip_interval_holds_the_shifts_the_test_does_not_reject():
    diffs = torch.randn(12, generator=rng(4)).add(0.3).tolist()
    got = sign_flip(diffs, 0.9)
    for edge, way in ((got.low, 1), (got.high, -1)):
        assert sign_flip([d - edge - way * 1e-6 for d in diffs], 0.9).p > 0.1
        assert sign_flip([d - edge + way * 1e-6 for d in diffs], 0.9).p <= 0.1
    assert sign_flip([1, 2, 3, 4, 5]).high == math.inf  # five pairs cannot reach 95 %
    assert sign_flip([1, 2, 3, 4, 5, 6]).p == 2 / 64


def test_sign_flip_by_drawing_comes_near_all_flips():
    diffs = torch.randn(14, generator=rng(5)).add(0.4).tolist()
    every, some = sign_flip(diffs, resamples=2**14), sign_flip(diffs, resamples=8000, generator=rng())
    assert some.p == pytest.approx(every.p, abs=0.02)
    assert (some.low, some.high) == pytest.approx((every.low, every.high), abs=0.1)


def test_both_cover_the_truth_about_as_often_as_they_say():
    for way in (paired_bootstrap, sign_flip):
        hits = 0
        for seed in range(150):
            got = way((torch.randn(30, generator=rng(seed)) + 0.5).tolist(), 0.9, 400, rng(seed + 1000))
            hits += got.low <= 0.5 <= got.high
        assert 0.8 <= hits / 150 <= 0.97


def test_benjamini_hochberg_by_hand():
    # sorted p: .01 .02 .03 .5; times 4/rank: .04 .04 .04 .5
    assert benjamini_hochberg([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.04, 0.5, 0.04, 0.04])
    assert benjamini_hochberg([0.01, 0.04]) == pytest.approx([0.02, 0.04])
    assert benjamini_hochberg([0.9, 0.8]) == pytest.approx([0.9, 0.9])
    assert benjamini_hochberg([]) == []


def test_spearman_by_hand():
    """Ranks 1 2 3 4 against 2 1 4 3: one minus 6 * 4 / (4 * 15). Ties share their mean rank."""
    assert spearman([1, 20, 30, 400], [0.2, 0.1, 9, 8]) == pytest.approx(0.6)
    assert spearman([1, 2, 3], [-1, -2, -3]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [3, 4, 5]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert spearman([1, 1, 1], [3, 4, 5]) is None
