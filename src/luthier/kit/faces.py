"""Facial reduction from floats: squares that no decomposition can hold are left out, so that rounding has room.

Where p has no positive definite Gram matrix, the solver's functional L has L(p) = 0 and L(q^2) >= 0 for all q.
Every square in a decomposition of p then has L(q^2) = 0, so that the coefficients of q lie in the null space of
L's matrix: over a basis of that space the question is smaller, and may have room. The null space is read from
floats and written in small fractions; if they are wrong no proof comes of it, but never a wrong one.

N: polynomials of a basis.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from luthier.kit.cones import Cone, Program, plus
from luthier.kit.moments import Solved
from luthier.kit.polynomial import Exponents

ZERO = 1e-4
"""Eigenvalues of a moment matrix below this share of its largest count as zero."""
DENOMINATOR, NEAR = 10_000, 2e-4
"""Fractions of the null space, and how close a float must be to one."""


def reduced(program: Program, found: Solved) -> Program | None:
    """The program over the face that holds every decomposition; None if it is the same one or no fractions fit."""
    cones, changed = [], False
    for k, cone in enumerate(program.cones):
        rows = _null_space(found.matrix(program, k))
        if rows is None:
            return None
        changed = changed or len(rows) < len(cone.basis)
        if rows:
            cones.append(cone if len(rows) == len(cone.basis) else _over(cone, rows))
    return Program(tuple(cones), program.free) if changed and cones else None


def _null_space(matrix_NN: np.ndarray) -> list[list[Fraction]] | None:
    """Rows of small fractions that span the null space of a positive semidefinite matrix; None if none fit."""
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
                return None
            row[pivot] = -near
        found.append(row)
    return found


def _simplest(value: float) -> Fraction | None:
    """The fraction of the smallest power-of-ten denominator bound that is near enough."""
    for most in (1, 10, 100, 1000, DENOMINATOR):
        near = Fraction(value).limit_denominator(most)
        if abs(float(near) - value) < NEAR / most:
            return near
    return None


def _over(cone: Cone, rows: list[list[Fraction]]) -> Cone:
    basis = []
    for row in rows:
        made: dict[Exponents, Fraction] = {}
        for c, b in zip(row, cone.basis, strict=True):
            made = dict(plus(made, b, c)) if c else made
        basis.append(made)
    return replace(cone, basis=tuple(basis))
