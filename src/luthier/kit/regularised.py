"""Multiples of |x|^4 plus a quadratic q: which they are, and the matrix whose least eigenvalue decides.

s|x|^4 + q(x) = s(|x|^2 - t)^2 + (2st|x|^2 - st^2 + q(x)) for every t. The bracket is a quadratic, whose matrix over
x1 ... xn and 1 has a least eigenvalue that is concave in t.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np

from luthier.kit.exact import Matrix
from luthier.kit.polynomial import Exponents, Polynomial


def regularised(p: Polynomial) -> Fraction | None:
    """The s > 0 of p = s|x|^4 + a quadratic."""
    top = {exponents: c for exponents, c in p.terms if sum(exponents) > 2}
    s = next(iter(top.values()), Fraction(0))
    squares = [tuple(2 * int(i == j) for j in range(len(p.variables))) for i in range(len(p.variables))]
    if p.degree != 4 or s <= 0:
        return None
    made: dict[Exponents, Fraction] = {}
    for a, b in itertools.product(squares, repeat=2):
        key = tuple(map(int.__add__, a, b))
        made[key] = made.get(key, Fraction(0)) + s
    return s if made == top else None


def quadratic(terms: dict[Exponents, Fraction], count: int) -> Matrix:
    """The matrix of a quadratic over x1 ... xn and 1."""
    matrix = [[Fraction(0)] * (count + 1) for _ in range(count + 1)]
    for exponents, c in terms.items():
        places = [i for i, e in enumerate(exponents) for _ in range(e)]
        i, j = (places + [count, count])[:2]
        matrix[i][j] += c / 2
        matrix[j][i] += c / 2
    return matrix


def shifted(matrix: Matrix, s: Fraction, t: Fraction) -> Matrix:
    """Of 2st|x|^2 - st^2 + the quadratic."""
    last = len(matrix) - 1
    return [
        [x + ((2 * s * t if i < last else -s * t * t) if i == j else 0) for j, x in enumerate(row)]
        for i, row in enumerate(matrix)
    ]


def level(matrix: Matrix, s: float) -> Fraction:
    """The t that gives the shifted matrix its largest least eigenvalue, as a short fraction."""
    plain = np.array(matrix, dtype=float)
    shift = np.eye(len(plain))

    def least(t: float) -> float:
        shift[np.diag_indices(len(plain))] = [2 * s * t] * (len(plain) - 1) + [-s * t * t]
        return float(np.linalg.eigvalsh(plain + shift)[0])

    if not s:  # below the range of floats
        return Fraction(0)
    low, high = 0.0, 1.0 + 2 * float(np.abs(plain).sum()) / s
    for _ in range(80):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (a, high) if least(a) < least(b) else (low, b)
    return Fraction((low + high) / 2).limit_denominator(10**6)
