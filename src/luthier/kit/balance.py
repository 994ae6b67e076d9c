"""Variables in units that bring coefficients of very different sizes together: x_i = 2^k_i z_i, exactly.

Solvers count in floats, relative to the largest coefficient; with 1 and 1e12 in one polynomial the small ones drown.
A change of units by powers of 2 loses nothing, and what is found in z is rewritten in x.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from luthier.kit.cones import Program
from luthier.kit.polynomial import Exponents, Terms

WORTH = 6.0
"""Units are changed if the coefficients' exponents of 2 then span at least so many fewer."""
SPREAD, LEAST = 4, 33
"""A monomial's own unit is a power of 2 down to 2^-33; where none is 2^-4 or less there is nothing to gain."""
Units = Sequence[int]


def units(terms: Terms) -> Units:
    """k_i by least squares over the exponents of 2 of all coefficients; zeros where it is not worth it."""
    width = len(next(iter(terms)))
    sizes = np.array([_bits(c) for c in terms.values()])
    powers = np.array(list(terms), dtype=float).reshape(len(terms), width)
    rows = np.hstack([powers, -np.ones((len(terms), 1))])
    found = np.linalg.lstsq(rows, -sizes, rcond=None)[0][:width]
    k = np.clip(np.rint(found), -200, 200)
    return [int(v) for v in k] if np.ptp(sizes) - np.ptp(sizes + powers @ k) >= WORTH else [0] * width


def unit_of(terms: Terms) -> Fraction:
    """About the largest coefficient: a power of 2, over the common denominator so that grids meet it."""
    common = math.lcm(*(c.denominator for c in terms.values()))
    largest = max(abs(c) * common for c in terms.values())
    return Fraction(1 << (int(largest) - 1).bit_length(), common)


def _bits(c: Fraction) -> float:
    return math.log2(abs(c.numerator)) - math.log2(c.denominator)


def scaled(terms: Terms, k: Units, sign: int = 1) -> Terms:
    """The coefficients in z; with sign -1, those in x of what was found in z."""
    return {m: c * _power(k, m, sign) for m, c in terms.items()}


def by_squares(program: Program, grams: Sequence[np.ndarray]) -> Program | None:
    """Every basis in units of 2^k in which the squares that a solver found weigh alike; None if they nearly do.

    Where p = z'DQDz with numbers far apart in D alone, no units of the variables bring these together, and the least
    eigenvalue of the whole says nothing of the room for rounding.
    """
    cones, changed = [], False
    for cone, gram in zip(program.cones, grams, strict=True):
        size = np.sqrt(np.clip(np.diag(gram), 0.0, None))
        size = np.maximum(size, 2.0**-LEAST * size.max(initial=0.0))
        k = np.rint(np.log2(size / size.max())) if size.max(initial=0.0) > 0 else np.zeros(len(size))
        changed = changed or bool((k <= -SPREAD).any())
        cones.append(replace(cone, basis=tuple({m: c * Fraction(2) ** int(n) for m, c in b.items()}
                                               for b, n in zip(cone.basis, k, strict=True))))  # fmt: skip
    return Program(tuple(cones), program.free) if changed else None


def scaled_program(program: Program, k: Units) -> Program:
    """The same cones and equations in z; their monomials stay, and of polynomials the largest coefficient is 1."""
    cones = tuple(replace(c, weight=scaled(c.weight, k) if any(map(any, c.weight)) else c.weight,
                          basis=tuple(b if len(b) == 1 else _normal(scaled(b, k)) for b in c.basis))
                  for c in program.cones)  # fmt: skip
    return Program(cones, tuple(replace(f, factor=scaled(f.factor, k)) for f in program.free))


def _normal(terms: Terms) -> Terms:
    largest = max(abs(c) for c in terms.values())
    return {m: c / largest for m, c in terms.items()}


def moments_in_x(moments: Mapping[Exponents, Fraction], k: Units) -> dict[Exponents, Fraction]:
    """Moments of x from those of z."""
    return {m: value * _power(k, m, 1) for m, value in moments.items()}


def floats_in_x(moments: Mapping[Exponents, float], k: Units) -> dict[Exponents, float]:
    """The same in floats; what these cannot hold is the largest one of its sign."""
    most = sys.float_info.max
    with np.errstate(over="ignore"):
        return {m: float(np.clip(np.ldexp(value, sum(a * b for a, b in zip(k, m, strict=True))), -most, most))
                for m, value in moments.items()}  # fmt: skip


def _power(k: Units, m: Exponents, sign: int) -> Fraction:
    return Fraction(2) ** (sign * sum(a * b for a, b in zip(k, m, strict=True)))
