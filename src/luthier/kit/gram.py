"""Which monomials the squares of a polynomial can hold.

If p is a sum of squares of polynomials q, every q holds only monomials a that survive these rules; each
of them only ever removes what no q can hold, so a reduced basis loses no sum of squares:

    box           a lies between half the smallest and half the largest exponents and degrees of p
    Newton        2a lies in the convex hull of p's exponents
    consistency   2a is an exponent of p, or the sum of two other surviving monomials; applied until
                  nothing changes (else the coefficient of x^2a in p, a sum of squares, would be 0)

Iterated consistency from the box ends inside the half Newton polytope, without a hull or a linear program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from luthier.kit.polynomial import Exponents, Polynomial, graded

MOST = 5000
"""candidates that are looked at, at most"""


def everything(p: Polynomial) -> int:
    """How many monomials have at most half of p's degree."""
    return math.comb(len(p.variables) + p.degree // 2, p.degree // 2)


def full(p: Polynomial) -> list[Exponents] | None:
    """All monomials of at most half of p's degree; None if they are more than MOST."""
    if everything(p) > MOST:
        return None
    return graded(up_to(len(p.variables), p.degree // 2))


def up_to(count: int, degree: int) -> Iterator[Exponents]:
    """All monomials of at most this degree."""
    return _between([0] * count, [degree] * count, 0, degree)


def box(p: Polynomial) -> list[Exponents] | None:
    """The monomials whose double lies within p's exponents and degrees; None if they are more than MOST."""
    low, high = _halves(zip(*p.support, strict=True))
    (least,), (most,) = _halves([[sum(e) for e in p.support]])
    found = []
    for exponents in _between(low, high, least, most):
        found.append(exponents)
        if len(found) > MOST:
            return None
    return graded(found)


def _halves(columns: Iterable[Iterable[int]]) -> tuple[list[int], list[int]]:
    """Half of the smallest, rounded up, and half of the largest number of each column, rounded down."""
    several = [tuple(c) for c in columns]
    return [-(-min(c) // 2) for c in several], [max(c) // 2 for c in several]


def _between(low: Sequence[int], high: Sequence[int], least: int, most: int) -> Iterator[Exponents]:
    """Every tuple between the bounds whose sum lies between least and most."""
    if any(a > b for a, b in zip(low, high, strict=True)) or max(least, sum(low)) > min(most, sum(high)):
        return
    if not low:
        yield ()
        return
    rest_low, rest_high = sum(low[1:]), sum(high[1:])
    for first in range(max(low[0], least - rest_high), min(high[0], most - rest_low) + 1):
        for rest in _between(low[1:], high[1:], least - first, most - first):
            yield (first, *rest)


def consistent(p: Polynomial, candidates: Sequence[Exponents]) -> list[Exponents]:
    """What iterated diagonal consistency leaves of the candidates.

    Monomials are compared by 64-bit keys that add up like exponents. Two monomials with one key could
    only keep a monomial too many, never lose one.
    """
    codes = keys(candidates)
    support = set(keys(p.support).tolist())
    alive = np.ones(len(codes), dtype=bool)
    order = np.argsort(codes)
    witness: dict[int, tuple[int, int]] = {i: (i, i) for i, key in enumerate((2 * codes).tolist()) if key in support}
    changed = True
    while changed:
        changed = False
        for i in np.flatnonzero(alive).tolist():
            if i in witness and all(alive[j] for j in witness[i]):
                continue
            found = _pair(i, codes, order, alive)
            changed = changed or found is None
            alive[i] = found is not None
            if found is not None:
                witness[i] = found
    return [a for a, lives in zip(candidates, alive, strict=True) if lives]


def _pair(i: int, codes: np.ndarray, order: np.ndarray, alive: np.ndarray) -> tuple[int, int] | None:
    """Two living monomials other than i whose product is the square of i."""
    others = 2 * codes[i : i + 1] - codes  # of arrays, so that it wraps round in silence
    place = order[np.minimum(np.searchsorted(codes, others, sorter=order), len(codes) - 1)]
    hits = np.flatnonzero((codes[place] == others) & alive[place] & alive & (np.arange(len(codes)) != i))
    return (int(hits[0]), int(place[hits[0]])) if len(hits) else None


def keys(monomials: Sequence[Exponents]) -> np.ndarray:
    """One number a monomial, linear in its exponents, modulo 2^64."""
    width = len(monomials[0]) if monomials else 0
    weights = [pow(0x9E3779B97F4A7C15, i + 1, 1 << 64) for i in range(width)]
    exponents = np.array(monomials, dtype=np.uint64).reshape(len(monomials), width)
    return exponents @ np.array(weights, dtype=np.uint64)


def newton(p: Polynomial, candidates: Sequence[Exponents]) -> list[Exponents]:
    """The candidates in the half Newton polytope.

    A linear program looks for a plane between 2a and p's exponents; a is left out only if the plane,
    rounded to whole numbers, separates them exactly.
    """
    from scipy.optimize import linprog

    points = np.array(p.support, dtype=float)
    kept = []
    for a in candidates:
        double = 2 * np.array(a, dtype=float)
        rows = np.hstack([points, -np.ones((len(points), 1))])
        found = linprog(np.append(-double, 1.0), A_ub=rows, b_ub=np.zeros(len(points)),
                        bounds=[(-1, 1)] * len(a) + [(None, None)], method="highs")  # fmt: skip
        plane = [] if found.x is None else [round(w * 2**20) for w in found.x[:-1]]
        inside = not plane or 2 * _dot(plane, a) <= max(_dot(plane, s) for s in p.support)
        if inside:
            kept.append(a)
    return kept


def _dot(plane: Sequence[int], exponents: Exponents) -> int:
    return sum(w * e for w, e in zip(plane, exponents, strict=True))
