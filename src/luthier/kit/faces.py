"""Facial reduction: squares that no decomposition can hold are left out, so that rounding has room.

    vanishing    where p is 0 of order 2k along a line through a rational point, at infinity, too, every square is 0
                 of order k along it: exact
    reduced      where p has no positive definite Gram matrix, the solver's functional L has L(p) = 0 and L(q^2) >= 0
                 for all q. Every square in a decomposition of p then has L(q^2) = 0, so that the coefficients of q
                 lie in the null space of L's matrix. It is read from floats and written in small fractions; if they
                 are wrong no proof comes of it, but never a wrong one.

Over a basis of what is left the question is smaller, and may have room. What is known before any solver is asked
stands in `kit.minors`.

N: polynomials of a basis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from luthier.kit import exact
from luthier.kit.cones import Cone, Program, plus
from luthier.kit.descent import Point, descents
from luthier.kit.moments import Solved
from luthier.kit.polynomial import Exponents, Polynomial, Terms
from luthier.kit.problem import Problem

ZERO = 1e-4
"""Eigenvalues of a moment matrix below this share of its largest count as zero."""
ORDER, LINES = 4, 6
"""Orders of vanishing that are looked at; random lines through a point, beside those along the axes."""
FINE, LARGE = 1e5, 1000
"""How much being orthogonal counts beside being short; numbers of a vector."""
NEAR = 2e-4
"""How close a float must be to a fraction, times its largest denominator."""


def zeros(p: Polynomial, moments: Mapping[Exponents, float]) -> list[Point]:
    """Rational points where p is 0, of small numerators and denominators, that descents lead to.

    In projective coordinates (1, x), or (0, x) where p's leading form is 0.
    """
    top = p.degree
    lead = Polynomial(p.variables, tuple((m, c) for m, c in p.terms if sum(m) == top))
    found = dict.fromkeys((Fraction(0), *x) for x in _zeros(lead, {}, True))
    if len(lead.terms) < len(p.terms):
        found |= dict.fromkeys((Fraction(1), *x) for x in _zeros(p, moments, False))
    return list(found)


def _zeros(p: Polynomial, moments: Mapping[Exponents, float], form: bool) -> list[Point]:
    """form: only a point's direction counts."""
    found: dict[Point, None] = {}
    for floats in descents(Problem(p), moments):
        largest = float(np.abs(floats).max(initial=0.0))
        point = floats / largest if form and largest > 0 else floats
        for most in (1, 2, 12, 1000):
            near = tuple(Fraction(float(x)).limit_denominator(most) for x in point)
            if p.at(near) == 0 and (any(near) or not form):
                found[near] = None
                break
    return list(found)


def vanishing(p: Polynomial, program: Program, points: Sequence[Point]) -> Program | None:
    """The program over squares that vanish with p at the points; None if these are all.

    points: in projective coordinates.  The program's cones are plain: p is the sum of their squares.
    """
    half = max(sum(m) for c in program.cones for b in c.basis for m in b)
    rng = np.random.default_rng(0)
    conditions: list[list[list[Fraction]]] = [[] for _ in program.cones]
    for point in points:
        common = math.lcm(*(x.denominator for x in point))
        whole = [int(x * common) for x in point]
        lines = np.vstack([np.eye(len(point), dtype=int), rng.integers(-3, 4, (LINES, len(point)))]).tolist()
        for line in lines:
            order = next(
                (n for n, c in enumerate(Line(whole, line, 2 * half, 2 * ORDER).of(dict(p.terms))) if c), 2 * ORDER
            )
            if order < 2:
                continue
            way = Line(whole, line, half, order // 2)
            for rows, cone in zip(conditions, program.cones, strict=True):
                rows += map(list, zip(*(way.of(b) for b in cone.basis), strict=True))
    cones, changed = [], False
    for cone, rows in zip(program.cones, conditions, strict=True):
        left = kernel(rows, len(cone.basis))
        changed = changed or len(left) < len(cone.basis)
        if left:
            cones.append(cone if len(left) == len(cone.basis) else over(cone, left))
    return Program(tuple(cones), program.free) if changed and cones else None


class Line:
    """Polynomials, made forms of one degree, along point + t * line: their first coefficients in t."""

    def __init__(self, point: Sequence[int], line: Sequence[int], degree: int, order: int):
        self.degree, self.order = degree, order
        self.powers = [
            [[math.comb(e, n) * x ** (e - n) * h**n if n <= e else 0 for n in range(order)] for e in range(degree + 1)]
            for x, h in zip(point, line, strict=True)
        ]
        self.known: dict[Exponents, list[int]] = {}

    def of(self, terms: Terms) -> list[Fraction]:
        total = [Fraction(0)] * self.order
        for m, c in terms.items():
            for n, x in enumerate(self._monomial(m)):
                if x:
                    total[n] += c * x
        return total

    def _monomial(self, m: Exponents) -> list[int]:
        if m not in self.known:
            series = [1] + [0] * (self.order - 1)
            for powers, e in zip(self.powers, (self.degree - sum(m), *m), strict=True):
                if e:
                    power = powers[e]
                    series = [sum(series[i] * power[n - i] for i in range(n + 1)) for n in range(self.order)]
            self.known[m] = series
        return self.known[m]


def kernel(rows: Sequence[Sequence[Fraction]], width: int, even: bool = False) -> list[list[Fraction]]:
    """A basis of the vectors that every row maps to 0. even: whose entries are near each other in size, for solvers."""
    if not rows:
        return [[Fraction(int(i == j)) for j in range(width)] for i in range(width)]
    order = list(range(width))
    if even:
        from scipy.linalg import qr

        factors: Any = qr(np.array([[float(x) for x in row] for row in rows]), mode="r", pivoting=True)
        order = factors[1].tolist()
    reduced, pivots = exact.reduced([[row[i] for i in order] for row in rows])
    found = []
    for free in (i for i in range(width) if i not in pivots):
        vector = [Fraction(0)] * width
        vector[order[free]] = Fraction(1)
        for pivot, row in zip(pivots, reduced, strict=True):
            vector[order[pivot]] = -row[free]
        first = next(x for x in vector if x)
        found.append([-x for x in vector] if first < 0 else vector)
    return found


def smaller(target: Terms, program: Program, found: Solved) -> Program | None:
    """A face: by p's rational zeros, which is exact, or else by the null space of floats."""
    width = len(next(iter(target)))
    p = Polynomial(tuple(f"x{i}" for i in range(width)), tuple(target.items()))
    if program.free or any(c.which for c in program.cones):
        return reduced(program, found)
    return vanishing(p, program, zeros(p, found.moments)) or reduced(program, found)


def reduced(program: Program, found: Solved) -> Program | None:
    """The program over what fractions describe of the face that holds every decomposition; None if it is the same."""
    cones, changed = [], False
    for k, cone in enumerate(program.cones):
        rows = _null_space(found.matrix(program, k))
        changed = changed or len(rows) < len(cone.basis)
        if rows:
            cones.append(cone if len(rows) == len(cone.basis) else over(cone, rows))
    return Program(tuple(cones), program.free) if changed and cones else None


def _null_space(matrix_NN: np.ndarray) -> list[list[Fraction]]:
    """Rows of small fractions in the null space of a positive semidefinite matrix: all of it, or what there are."""
    size = len(matrix_NN)
    values, vectors_NN = np.linalg.eigh(matrix_NN)
    rank = int((values > ZERO * max(values.max(initial=0.0), 1e-12)).sum()) if values.max(initial=0.0) > 1e-7 else 0
    if rank == 0:
        return [[Fraction(int(i == j)) for j in range(size)] for i in range(size)]
    if rank == size:
        return []
    from scipy.linalg import qr, solve

    span = vectors_NN[:, size - rank :].T
    factors: Any = qr(span, mode="r", pivoting=True)
    pivots, others = factors[1][:rank], factors[1][rank:]
    rest = solve(span[:, pivots], span[:, others])  # of the row-reduced form, behind the unit matrix
    found = []
    for n, other in enumerate(others.tolist()):
        row = [Fraction(0)] * size
        row[other] = Fraction(1)
        for pivot, value in zip(pivots.tolist(), rest[:, n].tolist(), strict=True):
            near = _simplest(value)
            if near is None:
                return _whole_vectors(span)
            row[pivot] = -near
        found.append(row)
    return found


def _whole_vectors(span_rN: np.ndarray) -> list[list[Fraction]]:
    """Independent vectors of small whole numbers that are nearly orthogonal to the rows.

    Where a zero of p is irrational, so is the null space; but rational squares vanish at its conjugates, too, and
    make up what rational part it has.
    """
    size = span_rN.shape[1]
    lattice = [
        [int(i == j) for j in range(size)] + [round(FINE * x) for x in span_rN[:, i].tolist()] for i in range(size)
    ]
    short = [row[:size] for row in exact.short_vectors(lattice)]
    near = [
        row for row in short if np.abs(span_rN @ np.array(row, dtype=float)).max() < NEAR and max(map(abs, row)) < LARGE
    ]
    return [[Fraction(x) for x in row] for row in near]


def _simplest(value: float) -> Fraction | None:
    """The fraction of the smallest power-of-ten denominator bound that is near enough."""
    for most in (1, 10, 100, 1000):
        near = Fraction(value).limit_denominator(most)
        if abs(float(near) - value) < NEAR / most:
            return near
    return None


def over(cone: Cone, rows: list[list[Fraction]]) -> Cone:
    """The cone over combinations of its basis."""
    basis = []
    for row in rows:
        made: dict[Exponents, Fraction] = {}
        for c, b in zip(row, cone.basis, strict=True):
            made = dict(plus(made, b, c)) if c else made
        basis.append(made)
    return replace(cone, basis=tuple(basis))
