"""Intervals and p-values for paired differences, and false-discovery control. No distribution tables needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

_CHUNK = 1 << 22  # resampled values held at once


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, and the two-sided p-value of the mean being zero."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    diffs: Sequence[float], level: float = 0.95, resamples: int = 10_000,
    generator: Generator | None = None, weights: Sequence[float] | None = None,
) -> Interval:  # fmt: skip
    """Percentile bootstrap of the (weighted) mean of paired differences.

    weights: what each pair counts for, such as its tokens; pairs are resampled with their weights.
    p is twice the smaller share of resampled means on either side of zero, never below 2 / (resamples + 1).
    """
    d_N = torch.tensor(diffs, dtype=torch.float64)
    w_N = torch.ones_like(d_N) if weights is None else torch.tensor(weights, dtype=torch.float64)
    if len(d_N) < 2:
        return _too_few(d_N)
    means = []
    for start in range(0, resamples, step := max(1, _CHUNK // len(d_N))):
        rows = min(step, resamples - start)
        drawn_RN = torch.randint(len(d_N), (rows, len(d_N)), generator=generator)
        means.append((d_N * w_N)[drawn_RN].sum(1) / w_N[drawn_RN].sum(1))
    means_R = torch.cat(means)
    tail = (1 - level) / 2
    low, high = torch.quantile(means_R, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    side = 1 + min(int((means_R <= 0).sum()), int((means_R >= 0).sum()))
    return Interval(float((d_N * w_N).sum() / w_N.sum()), low, high, min(1.0, 2 * side / (resamples + 1)))


def sign_flip(
    diffs: Sequence[float], level: float = 0.95, resamples: int = 10_000,
    generator: Generator | None = None, weights: Sequence[float] | None = None,
) -> Interval:  # fmt: skip
    """Sign-flip test of the (weighted) mean, all 2^n flips if they are no more than `resamples`.

    The interval holds the shifts that the same test, on the same flips, does not reject; it exists if
    the flips can reach the level (six pairs for 95 %), else it is infinite.
    """
    d_N = torch.tensor(diffs, dtype=torch.float64)
    w_N = torch.ones_like(d_N) if weights is None else torch.tensor(weights, dtype=torch.float64)
    if len(d_N) < 2:
        return _too_few(d_N)
    v_N = w_N / w_N.sum()
    exact = 2 ** len(d_N) <= resamples
    mean = float(d_N @ v_N)
    signs = _all_signs(len(d_N)) if exact else _drawn_signs(len(d_N), resamples, generator)
    pairs = [(s_RN @ (d_N * v_N), s_RN @ v_N) for s_RN in signs]
    a_R, b_R = (torch.cat(parts) for parts in zip(*pairs, strict=True))  # flipped and shifted: a - shift * b

    def p_of(shift: float) -> float:
        hits = int(((a_R - shift * b_R).abs() >= abs(mean - shift) * (1 - 1e-12) - 1e-15).sum())
        return hits / len(a_R) if exact else (hits + 1) / (len(a_R) + 1)

    return Interval(mean, _edge(p_of, mean, d_N, -1, 1 - level), _edge(p_of, mean, d_N, 1, 1 - level), p_of(0.0))


def paired_t(diffs: Sequence[float], level: float = 0.95) -> Interval:
    """Student's paired t test and interval, for a few seeds."""
    d_N = torch.tensor(diffs, dtype=torch.float64)
    if len(d_N) < 2:
        return _too_few(d_N)
    mean, error, freedom = float(d_N.mean()), float(d_N.std()) / math.sqrt(len(d_N)), len(d_N) - 1
    half = t_quantile(0.5 + level / 2, freedom) * error
    if error == 0:
        return Interval(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    return Interval(mean, mean - half, mean + half, 2 * (1 - t_cdf(abs(mean) / error, freedom)))


def benjamini_hochberg(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: reject those at or below q to keep the false-discovery rate at q."""
    order = sorted(range(len(ps)), key=lambda i: ps[i], reverse=True)
    adjusted, least = [1.0] * len(ps), 1.0
    for place, i in enumerate(order):
        least = min(least, ps[i] * (len(ps) / (len(ps) - place)))  # in this order never below p itself
        adjusted[i] = least
    return adjusted


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The rank correlation, ties by their mean rank; None where one side does not vary."""
    ranks = [_ranks(torch.tensor(x, dtype=torch.float64)) for x in (a, b)]
    a_N, b_N = (r_N - r_N.mean() for r_N in ranks)
    spread = float(a_N.norm() * b_N.norm())
    return float(a_N @ b_N) / spread if spread else None


def _ranks(x_N: Tensor) -> Tensor:
    less_N = (x_N[:, None] > x_N).sum(1)
    return less_N + ((x_N[:, None] == x_N).sum(1).double() + 1) / 2


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's distribution with a whole number of degrees of freedom.

    The finite sums in theta = atan(t / sqrt(freedom)) (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    if freedom % 2:
        term, total = cosine, cosine if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = 2 / math.pi * (theta + sine * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = sine * total
    return 0.5 + inside / 2


def t_quantile(p: float, freedom: int) -> float:
    """The t with t_cdf(t) = p, for p in (0.5, 1)."""
    high = 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    return _bisect(lambda t: t_cdf(t, freedom) < p, 0.0, high)


def _all_signs(n: int) -> Iterator[Tensor]:
    codes = torch.arange(2**n)[:, None]
    yield ((codes >> torch.arange(n)) & 1).double() * 2 - 1


def _drawn_signs(n: int, resamples: int, generator: Generator | None) -> Iterator[Tensor]:
    for start in range(0, resamples, step := max(1, _CHUNK // n)):
        yield torch.randint(2, (min(step, resamples - start), n), generator=generator).double() * 2 - 1


def _edge(p_of: Callable[[float], float], mean: float, d_N: Tensor, side: int, alpha: float) -> float:
    """The last shift from the mean towards `side` that is not rejected at alpha."""
    width = 1e-12 + float((d_N - mean).abs().max())
    for _ in range(24):
        if p_of(mean + side * width) <= alpha:
            return _bisect(lambda shift: p_of(shift) > alpha, mean, mean + side * width)
        width *= 2
    return side * math.inf


def _bisect(inside: Callable[[float], bool], start: float, end: float) -> float:
    for _ in range(60):
        middle = (start + end) / 2
        start, end = (middle, end) if inside(middle) else (start, middle)
    return (start + end) / 2


def _too_few(d_N: Tensor) -> Interval:
    mean = float(d_N.mean()) if len(d_N) else math.nan
    return Interval(mean, -math.inf, math.inf, 1.0)
