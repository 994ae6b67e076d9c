"""A rational point where a polynomial is negative: small grid first, then descent in floats, checked in fractions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np

from luthier.kit.polynomial import Exponents, Polynomial
from luthier.kit.problem import Problem

MOST_POINTS, MOST_POWERS = 2000, 100_000
"""of the grid, and what may be multiplied to look at them"""
STARTS, STEPS, ROUNDS = 8, 60, 3
"""of the descent; each round measures what is left anew"""
PENALTY, INSIDE = 1e4, (0.0, 1e-3, 3e-2)
"""On squares of what constraints lack, in p's size; how far inside inequalities a descent is held, in turn."""
MOST_FLOATS = 2_000_000
"""powers that a descent may take, all steps together; beyond that there are fewer starts"""
ROUNDED = (0, 2, 6, 12, 24)
"""binary places that a float's point is rounded to"""
Point = tuple[Fraction, ...]


def below_zero(asked: Problem, moments: Mapping[Exponents, float], bound: Fraction = Fraction(0)) -> Point | None:
    """A point where the constraints hold and p < bound, exactly. moments: of a functional, whose mean is tried."""
    p = asked.polynomial
    for point in itertools.chain(_grid(p), _descended(asked, moments, bound)):
        if p.at(point) < bound and asked.holds(point):
            return point
    return None


def _grid(p: Polynomial) -> Iterator[Point]:
    """The first points of 0, 1, -1, 2, -2 in every variable; () for a constant."""
    powers = 1 + len(p.terms) * (1 + len(p.variables))
    every = itertools.product((0, 1, -1, 2, -2), repeat=len(p.variables))
    for point in itertools.islice(every, min(MOST_POINTS, 1 + MOST_POWERS // powers)):
        yield tuple(map(Fraction, point))


def _descended(asked: Problem, moments: Mapping[Exponents, float], bound: Fraction) -> Iterator[Point]:
    """Where descents went below the bound, rounded."""
    value = Floats(asked.polynomial)
    scale = max((abs(float(c)) for _, c in asked.polynomial.terms), default=1.0)
    for found in descents(asked, moments):
        if value.at(found)[0] < float(bound) + 1e-9 * scale:
            for bits in ROUNDED:
                yield tuple(Fraction(round(float(v) * 2**bits), 2**bits) for v in found)


def descents(asked: Problem, moments: Mapping[Exponents, float]) -> Iterator[np.ndarray]:
    """Where descents of p end, with a penalty on what the constraints lack: from the functional's mean and afar."""
    p = asked.polynomial
    work = 1 + len(p.terms) * len(p.variables) * STEPS * ROUNDS
    starts = min(STARTS, MOST_FLOATS // work)
    if not p.variables or starts == 0:
        return
    from scipy.optimize import minimize

    least, nonneg, zero = Floats(p), [Floats(g) for g in asked.nonneg], [Floats(h) for h in asked.zero]
    scale = max((abs(float(c)) for _, c in p.terms), default=1.0)
    weight = PENALTY * scale

    def value(x: np.ndarray, size: float, inside: float = 0.0) -> tuple[float, np.ndarray]:
        total, slope = least.at(x)
        for g in nonneg:
            room, way = g.at(x)
            lack = room - inside
            if lack < 0:
                total, slope = total + weight * lack * lack, slope + 2 * weight * lack * way
        for h in zero:
            off, way = h.at(x)
            total, slope = total + weight * off * off, slope + 2 * weight * off * way
        return total / size, slope / size

    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        afar = (rng.standard_normal(len(p.variables)) * 2.0 ** (n - 2) for n in range(starts))
        for start, inside in zip(itertools.chain(_means(p, moments), afar), itertools.cycle(INSIDE), strict=False):
            found = start
            for _ in range(ROUNDS):  # what is left is small beside where it began
                left, slope = value(found, 1.0)
                size = max(abs(left), float(np.abs(slope).max()), 1e-9 * scale)
                found = minimize(value, found, (size, inside), "L-BFGS-B", jac=True, options={"maxiter": STEPS}).x
                if not np.isfinite(found).all():
                    break
            if np.isfinite(found).all() and np.abs(found).max() < 1e9:
                yield found


def _means(p: Polynomial, moments: Mapping[Exponents, float]) -> list[np.ndarray]:
    """The functional's mean, if it knows one."""
    count = len(p.variables)
    first = [tuple(int(i == j) for j in range(count)) for i in range(count)]
    whole = moments.get((0,) * count, 0.0)
    if whole <= 1e-12 or not any(moments.get(m) for m in first):
        return []
    return [np.array([moments.get(m, 0.0) / whole for m in first])]


class Floats:
    """A polynomial and its slope in floats."""

    def __init__(self, p: Polynomial):
        self.powers = np.array([m for m, _ in p.terms], dtype=float).reshape(len(p.terms), len(p.variables))
        self.factors = np.array([float(c) for _, c in p.terms])

    def at(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        if not len(self.factors):
            return 0.0, np.zeros(len(x))
        each = x**self.powers
        slope = np.empty(len(x))
        for i in range(len(x)):
            others = each.copy()
            others[:, i] = self.powers[:, i] * x[i] ** np.maximum(self.powers[:, i] - 1, 0)
            slope[i] = self.factors @ others.prod(axis=1)
        return float(self.factors @ each.prod(axis=1)), slope
