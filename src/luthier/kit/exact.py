"""Exact answers from a solver's floats: a rational Gram matrix, its squares, a separating functional, a point.

A float is rounded to a multiple of 2^-k and then moved, in fractions, onto the affine space it must lie
in; whether the result is positive semidefinite is decided in whole numbers. Nothing here trusts a float.
Paper: Peyrl and Parrilo, Theoretical Computer Science 409 (2008).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from luthier.kit.gram import Products
from luthier.kit.polynomial import Exponents, Polynomial, Terms

MAX_DIGITS = 4000
"""of a number in a certificate: Python reads no more than 4300 from text"""
MOST_POINTS, MOST_POWERS = 2000, 100_000
"""of the grid, and what may be multiplied to look at them"""
Matrix = list[list[Fraction]]
Square = tuple[Fraction, list[tuple[Exponents, Fraction]]]


def gram_matrix(gram: np.ndarray, unit: Fraction, bits: int, products: Products, target: Terms) -> Matrix:
    """The nearest symmetric matrix in the affine space b'Qb = target, after rounding to unit * 2^-bits.

    gram is in units of `unit`. What a coefficient lacks is shared equally among the entries that give it.
    """
    size = len(gram)
    step = unit / 2**bits
    exact = [[Fraction(0)] * size for _ in range(size)]
    for monomial, pairs in products.items():
        values = [round(float(gram[i, j]) * 2**bits) * step for i, j in pairs]
        counts = [1 if i == j else 2 for i, j in pairs]
        lacking = target.get(monomial, Fraction(0)) - sum(v * c for v, c in zip(values, counts, strict=True))
        for (i, j), value in zip(pairs, values, strict=True):
            exact[i][j] = exact[j][i] = value + lacking / sum(counts)
    return exact


def ldl(matrix: Matrix) -> list[tuple[Fraction, list[Fraction]]] | None:
    """(d, column) of each nonzero pivot, so that the matrix is the sum of d * column column'; None if the
    matrix is not positive semidefinite. Elimination without fractions (Bareiss)."""
    size = len(matrix)
    common = math.lcm(*(x.denominator for row in matrix for x in row))
    work = [[int(x * common) for x in row] for row in matrix]
    found, before = [], 1
    for k in range(size):
        pivot = work[k][k]
        if pivot < 0 or (pivot == 0 and any(work[k][k:])):
            return None
        if pivot == 0:
            continue
        column = [Fraction(0)] * k + [Fraction(x, pivot) for x in work[k][k:]]
        found.append((Fraction(pivot, before * common), column))
        for i in range(k + 1, size):
            for j in range(i, size):
                work[i][j] = (pivot * work[i][j] - work[k][i] * work[k][j]) // before
        before = pivot
    return found


def squares(matrix: Matrix, basis: Sequence[Exponents]) -> list[Square] | None:
    """(weight, terms) so that b'Qb is the sum of weight * (terms)^2; None if Q is not positive semidefinite
    or its numbers are too long to be written down."""
    factors = ldl(matrix)
    if factors is None:
        return None
    made = [(d, [(b, c) for b, c in zip(basis, column, strict=True) if c]) for d, column in factors]
    numbers = [d for d, _ in made] + [c for _, terms in made for _, c in terms]
    return made if all(_short(number) for number in numbers) else None


def _short(number: Fraction) -> bool:
    return max(abs(number.numerator), number.denominator).bit_length() < 3.3 * MAX_DIGITS


def functional(
    p: Polynomial, products: Products, size: int, moments: Mapping[Exponents, float],
    inside: Mapping[Exponents, float], bits: int,
) -> dict[Exponents, Fraction] | None:  # fmt: skip
    """A rational L with a positive semidefinite moment matrix and L(p) < 0, or None.

    moments separates but lies on the boundary; inside has a positive definite moment matrix. Their mixture
    keeps half of the separation.
    """
    terms = {m: float(c) for m, c in p.terms}
    low, other = (sum(c * of[m] for m, c in terms.items()) for of in (moments, inside))
    if low >= 0:
        return None
    share = 0.5 if other <= 0 else 0.5 * low / (low - other)
    mixed = {m: (1 - share) * moments[m] + share * inside[m] for m in products}
    made = {m: Fraction(round(value * 2**bits), 2**bits) for m, value in mixed.items()}
    if sum(c * made[m] for m, c in p.terms) >= 0:
        return None
    matrix = [[Fraction(0)] * size for _ in range(size)]
    for monomial, pairs in products.items():
        for i, j in pairs:
            matrix[i][j] = matrix[j][i] = made[monomial]
    return None if ldl(matrix) is None else made


def negative_point(p: Polynomial) -> tuple[Fraction, ...] | None:
    """A point of the grid 0, 1, -1, 2, -2 where p is negative, if one of the first has it; of a constant ()."""
    grid = itertools.product((0, 1, -1, 2, -2), repeat=len(p.variables))
    powers = 1 + len(p.terms) * (1 + len(p.variables))
    for point in itertools.islice(grid, min(MOST_POINTS, 1 + MOST_POWERS // powers)):
        if p.at(point) < 0:
            return tuple(map(Fraction, point))
    return None
