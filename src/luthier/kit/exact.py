"""Exact answers from a solver's floats: rational Gram matrices, their squares, a separating functional, a point.

A float is rounded to a multiple of 2^-k and then moved, in fractions, onto the affine space it must lie
in; whether the result is positive semidefinite is decided in whole numbers. Nothing here trusts a float.
Paper: Peyrl and Parrilo, Theoretical Computer Science 409 (2008).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from luthier.errors import LuthierError
from luthier.kit.cones import Program
from luthier.kit.polynomial import Exponents, Terms

MAX_DIGITS = 4000
"""of a number in a certificate: Python reads no more than 4300 from text"""
MOST_UNKNOWNS = 600
"""of the exact linear system, where coefficients cannot be met one by one"""
FLOATS, CLEAR = 8, 1e-10
"""Size from which eigenvalues in floats are worth a look first; one this far below 0, of a matrix whose diagonal is 1,
is no error of rounding."""
Matrix = list[list[Fraction]]
Square = tuple[Fraction, list[tuple[Exponents, Fraction]]]


def counted(squares: Sequence[Square]) -> str:
    """1 square, 2 squares."""
    return f"{len(squares)} square{'s' * (len(squares) != 1)}"


@dataclass(frozen=True)
class Rounded:
    """Exact numbers that meet every coefficient: Q_k, and of each equation its cofactor's."""

    grams: list[Matrix]
    cofactors: list[list[Fraction]]


class Rounding:
    """Moves floats onto the affine space of a program and a target, in fractions.

    A coefficient that products of one term give is met by sharing what it lacks among these (the nearest point). The
    others, of weighted cones, of faces and equations, need a linear system, whose unknowns are picked once by their
    floats. target: the exact polynomial; its monomials are all reached.
    """

    def __init__(self, program: Program, target: Terms):
        self.program = program
        self.columns: list[tuple[tuple[int, int, int], Terms, int]] = []
        """(place, its polynomial, how often an entry occurs): place is (cone, i, j), or (-1 - equation, n, n)"""
        for k, cone in enumerate(program.cones):
            self.columns += [((k, i, j), terms, 1 if i == j else 2) for i, j, terms in cone.entries]
        for k, free in enumerate(program.free):
            self.columns += [((-1 - k, n, n), terms, 1) for n, terms in enumerate(free.entries)]
        self.alone: dict[Exponents, list[int]] = {}
        for at, ((k, _, _), terms, _) in enumerate(self.columns):
            if k >= 0 and len(terms) == 1:
                self.alone.setdefault(next(iter(terms)), []).append(at)
        self.rest = [m for m in program.monomials if m not in self.alone]
        mixed = {m for (k, _, _), terms, _ in self.columns if k < 0 or len(terms) > 1 for m in terms}
        self.given: dict[int, Fraction] = {}
        """(column, value) where no other column gives its monomial, whatever is rounded"""
        for m in [m for m, several in self.alone.items() if len(several) == 1 and m not in mixed]:
            (at,) = self.alone.pop(m)
            often, c = self.columns[at][2], self.columns[at][1][m]
            self.given[at] = target.get(m, Fraction(0)) / (often if c == 1 else often * c)
        self.open = [(at, column) for at, column in enumerate(self.columns) if at not in self.given]
        self.wanted = {m: target.get(m, Fraction(0)) for _, (_, terms, _) in self.open for m in terms}
        self.below = math.lcm(*(c.denominator for _, (_, terms, _) in self.open for c in terms.values()))
        self.whole = [(at, [(m, often * c.numerator * (self.below // c.denominator)) for m, c in terms.items()])
                      for at, (_, terms, often) in self.open]  # fmt: skip
        self.picked: tuple[list[int], list[Exponents], Any] | None = None

    def at(
        self, grams: Sequence[np.ndarray], cofactors: Sequence[np.ndarray], unit: Fraction, bits: int
    ) -> Rounded | None:
        """The floats, in units of `unit`, rounded to unit * 2^-bits and moved; None where no system can be solved."""
        step = unit / 2**bits
        values = [self.given.get(at, Fraction(0)) for at in range(len(self.columns))]
        for at, ((k, i, j), _, _) in self.open:
            number = grams[k][i, j] if k >= 0 else cofactors[-1 - k][i]
            values[at] = round(float(number) * 2**bits) * step
        lacking = self._solve(values) if self.rest else self._lacking(values)
        if lacking is None:
            return None
        for m, several in self.alone.items():
            if lacking[m]:
                share = lacking[m] / sum(self.columns[at][2] * self.columns[at][1][m] ** 2 for at in several)
                for at in several:
                    c = self.columns[at][1][m]
                    values[at] += share if c == 1 else share * c
        return self._shaped(values)

    def _lacking(self, values: Sequence[Fraction]) -> dict[Exponents, Fraction]:
        """What every coefficient lacks."""
        below = math.lcm(*(values[at].denominator for at, _ in self.open))
        sums = dict.fromkeys(self.wanted, 0)
        for at, terms in self.whole:
            value = values[at].numerator * (below // values[at].denominator)
            for m, c in terms if value else ():
                sums[m] += value * c
        return {m: wanted - Fraction(sums[m], below * self.below) for m, wanted in self.wanted.items()}

    def _solve(self, values: list[Fraction]) -> dict[Exponents, Fraction] | None:
        """Meet the coefficients that no plain product gives alone. Returns what the others lack then."""
        lacking = self._lacking(values)
        if not any(lacking[m] for m in self.rest):
            return lacking
        if self.picked is None:
            self.picked = self._pick()
        columns, monomials, system = self.picked
        moved = None if system is None else solved(system, [lacking[m] for m in monomials])
        if moved is None:
            return None
        for at, value in zip(columns, moved, strict=True):
            values[at] += value
        lacking = self._lacking(values)
        return None if any(lacking[m] for m in self.rest) else lacking

    def _pick(self) -> tuple[list[int], list[Exponents], Any]:
        """Columns that are independent as floats, as many monomials, and their system, which is None if too large."""
        from scipy.linalg import qr

        number = {m: r for r, m in enumerate(self.rest)}
        touching = [at for at, (_, terms, _) in enumerate(self.columns) if any(m in number for m in terms)]
        dense = np.zeros((len(self.rest), len(touching)))
        for n, at in enumerate(touching):
            for m, c in self.columns[at][1].items():
                if m in number:
                    dense[number[m], n] = float(c) * self.columns[at][2]
        factors: Any = qr(dense, mode="r", pivoting=True)
        triangle, order = factors
        sizes = np.abs(np.diag(triangle))
        rank = int((sizes > 1e-9 * max(1.0, sizes.max(initial=0.0))).sum())
        chosen = order[:rank]
        factors = qr(dense[:, chosen].T, mode="r", pivoting=True)
        columns, monomials = [touching[n] for n in chosen], [self.rest[r] for r in factors[1][:rank].tolist()]
        if len(columns) > MOST_UNKNOWNS:
            return columns, monomials, None
        places = [self.columns[at] for at in columns]
        return (
            columns,
            monomials,
            rational([[often * terms.get(m, 0) for _, terms, often in places] for m in monomials]),
        )

    def _shaped(self, values: Sequence[Fraction]) -> Rounded:
        grams = [[[Fraction(0)] * len(c.basis) for _ in c.basis] for c in self.program.cones]
        cofactors = [[Fraction(0)] * len(f.monomials) for f in self.program.free]
        for value, ((k, i, j), _, _) in zip(values, self.columns, strict=True):
            if k >= 0:
                grams[k][i][j] = grams[k][j][i] = value
            else:
                cofactors[-1 - k][i] = value
        return Rounded(grams, cofactors)


def solved(matrix: Any, right: Sequence[Fraction]) -> list[Fraction] | None:
    """x so that matrix x = right, for a square matrix made by `rational`; None if it is singular."""
    try:
        found = matrix.solve(rational([[x] for x in right]))
    except ZeroDivisionError:
        return None
    return [Fraction(int(x.p), int(x.q)) for x in found.entries()]


def reduced(rows: Sequence[Sequence[Fraction]]) -> tuple[Matrix, list[int]]:
    """The rows of the reduced echelon form that are not 0, and the column where each has its leading 1."""
    made, rank = rational(rows).rref()
    found = [[Fraction(int(x.p), int(x.q)) for x in row] for row in made.tolist()[:rank]]
    return found, [next(i for i, x in enumerate(row) if x) for row in found]


def rational(rows: Sequence[Sequence[Fraction | int]]) -> Any:
    """FLINT's matrix of these rows."""
    flint = _flint()
    return flint.fmpq_mat([[flint.fmpq(x.numerator, x.denominator) for x in row] for row in rows])


def short_vectors(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """A basis of short vectors of the lattice that the rows span (Lenstra, Lenstra, Lovasz)."""
    return [[int(x) for x in row] for row in _flint().fmpz_mat([list(row) for row in rows]).lll().tolist()]


def _flint() -> Any:
    try:
        import flint
    except ImportError:
        raise LuthierError("exact linear systems need FLINT", do="pip install 'luthier[sos]'") from None
    return flint


def ldl(matrix: Matrix) -> list[tuple[Fraction, list[Fraction]]] | None:
    """(d, column) of each nonzero pivot, so that the matrix is the sum of d * column column'; None if the
    matrix is not positive semidefinite. Elimination without fractions (Bareiss)."""
    size = len(matrix)
    common = math.lcm(*(x.denominator for row in matrix for x in row))
    work = [[x.numerator * (common // x.denominator) for x in row] for row in matrix]
    if size >= FLOATS and _negative(work, common):
        return None
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


def _negative(work: list[list[int]], common: int) -> bool:
    """Whether floats leave no doubt that the matrix work / common is not positive semidefinite, which saves
    elimination."""
    try:
        numbers = np.array([[x / common for x in row] for row in work])
    except OverflowError:
        return False
    diagonal = numbers.diagonal()
    if (diagonal < 0).any():
        return True
    units = np.where(diagonal > 0, np.sqrt(diagonal), 1.0)
    return bool(np.linalg.eigvalsh(numbers / np.outer(units, units))[0] < -CLEAR)


def squares(matrix: Matrix, basis: Sequence[Terms]) -> list[Square] | None:
    """(weight, terms) so that b'Qb is the sum of weight * (terms)^2; None if Q is not positive semidefinite
    or its numbers are too long to be written down."""
    factors = ldl(matrix)
    if factors is None:
        return None
    made = [(d, _combined(basis, column)) for d, column in factors]
    numbers = [d for d, _ in made] + [c for _, terms in made for _, c in terms]
    return made if all(_short(number) for number in numbers) else None


def _combined(basis: Sequence[Terms], column: Sequence[Fraction]) -> list[tuple[Exponents, Fraction]]:
    """The sum of c_i b_i."""
    found: dict[Exponents, Fraction] = {}
    for b, c in zip(basis, column, strict=True):
        for m, x in b.items() if c else ():
            found[m] = found.get(m, Fraction(0)) + c * x
    return [(m, c) for m, c in found.items() if c]


def _short(number: Fraction) -> bool:
    return max(abs(number.numerator), number.denominator).bit_length() < 3.3 * MAX_DIGITS


def functional(
    p: Terms, program: Program, moments: Mapping[Exponents, float], inside: Mapping[Exponents, float], bits: int
) -> dict[Exponents, Fraction] | None:
    """A rational L with positive semidefinite matrices M_k(L) and L(p) < 0, or None. For programs without equations.

    moments separates but lies on the boundary; inside has positive definite matrices. Their mixture keeps
    half of the separation.
    """
    low, other = (sum(float(c) * of[m] for m, c in p.items()) for of in (moments, inside))
    if low >= 0:
        return None
    share = 0.5 if other <= 0 else 0.5 * low / (low - other)
    mixed = {m: (1 - share) * moments[m] + share * inside[m] for m in program.monomials}
    made = {m: Fraction(round(value * 2**bits), 2**bits) for m, value in mixed.items()}
    if sum(c * made[m] for m, c in p.items()) >= 0:
        return None
    for cone in program.cones:
        matrix = [[Fraction(0)] * len(cone.basis) for _ in cone.basis]
        for i, j, terms in cone.entries:
            matrix[i][j] = matrix[j][i] = sum((c * made[m] for m, c in terms.items()), Fraction(0))
        if ldl(matrix) is None:
            return None
    return made
