"""Points where a polynomial takes the lower bound that its moments give.

Where the moment matrix is flat (its rank is that of its part one degree lower), the moments are those of as many
points as the rank, and linear algebra finds them all (Henrion and Lasserre, Positive Polynomials in Control,
2005). Else descents find some. Only points whose value is the bound, to `NEAR` of p's size, are given.

N: monomials of at most a degree, r: rank, n: variables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from luthier.kit.descent import Floats, descents
from luthier.kit.gram import up_to
from luthier.kit.polynomial import Exponents
from luthier.kit.problem import Problem

RANK, NEAR, APART = 1e-4, 1e-5, 1e-3
"""Singular values below this share count as zero; what counts as the bound; as another point."""
MOST = 50


def minimisers(
    asked: Problem, moments: Mapping[Exponents, float], degree: int, bound: float
) -> tuple[list[np.ndarray], bool]:
    """Points where p is about the bound and the constraints hold, and whether these are all, as the moments tell.

    moments: of a functional with L(1) = 1, of monomials up to `degree`.
    """
    value, scale = Floats(asked.polynomial), _size(asked)
    flat = _atoms(len(asked.variables), moments, degree // 2)
    found: list[np.ndarray] = []
    for point in flat if flat else descents(asked, moments):
        kept = value.at(point)[0] - bound < NEAR * scale
        near = all(Floats(g).at(point)[0] > -NEAR * 10 for g in asked.nonneg) and all(
            abs(Floats(h).at(point)[0]) < NEAR * 10 for h in asked.zero
        )
        if kept and near and all(np.abs(point - other).max(initial=0.0) > APART for other in found):
            found.append(point)
    return sorted(found, key=lambda x: tuple(-x))[:MOST], bool(flat) and len(found) == len(flat)


def _size(asked: Problem) -> float:
    return max((abs(float(c)) for _, c in asked.polynomial.terms), default=1.0)


def _atoms(count: int, moments: Mapping[Exponents, float], half: int) -> list[np.ndarray]:
    """The points of the measure, if the moment matrix of all monomials is flat; else none."""
    if half < 1 or math.comb(count + half, half) > 400:
        return []
    basis = sorted(up_to(count, half), key=lambda m: (sum(m), tuple(-e for e in m)))
    products = {tuple(map(int.__add__, a, b)) for a in basis for b in basis}
    if sum(m in moments for m in products) < len(products) and not _symmetric(moments, products):
        return []
    matrix_NN = np.array([[moments.get(tuple(map(int.__add__, a, b)), 0.0) for b in basis] for a in basis])
    lower = sum(1 for m in basis if sum(m) < half)
    values, vectors_NN = np.linalg.eigh(matrix_NN)
    rank = int((values > RANK * values.max()).sum())
    inner = np.linalg.eigvalsh(matrix_NN[:lower, :lower])
    if rank != int((inner > RANK * values.max()).sum()) or rank > MOST:
        return []
    span_Nr = vectors_NN[:, len(basis) - rank :] * np.sqrt(values[len(basis) - rank :])
    rows = _independent(span_Nr[:lower])
    if len(rows) < rank:
        return []
    echelon_Nr = span_Nr @ np.linalg.inv(span_Nr[rows])
    place = {m: i for i, m in enumerate(basis)}
    steps = [[place[tuple(e + (i == v) for i, e in enumerate(basis[r]))] for r in rows] for v in range(count)]
    times_nrr = np.array([echelon_Nr[step] for step in steps])
    return _common(times_nrr)


def _symmetric(moments: Mapping[Exponents, float], products: set[Exponents]) -> bool:
    """Whether those that are missing are odd in some variable in which all others are even: they are then 0."""
    missing = [m for m in products if m not in moments]
    known = [m for m in products if m in moments]
    parities = np.array([[e % 2 for e in m] for m in known], dtype=np.int64)
    return all(_outside(parities, [e % 2 for e in m]) for m in missing)


def _outside(parities: np.ndarray, parity: list[int]) -> bool:
    """Whether the parity is no sum, modulo 2, of the others."""
    rows = {int("".join(map(str, row)), 2) for row in parities.tolist()}
    pivots: list[int] = []
    for row in rows:
        for pivot in pivots:
            row = min(row, row ^ pivot)
        if row:
            pivots.append(row)
    left = int("".join(map(str, parity)), 2)
    for pivot in sorted(pivots, reverse=True):
        left = min(left, left ^ pivot)
    return left != 0


def _independent(rows_Nr: np.ndarray) -> list[int]:
    """The first rows that are independent, lowest degrees first."""
    chosen: list[int] = []
    left = rows_Nr.copy()
    limit = 1e-3 * np.abs(left).max(initial=0.0)
    for i in range(len(left)):
        length = float(np.linalg.norm(left[i]))
        if length > limit:
            chosen.append(i)
            way = left[i] / length
            left = left - np.outer(left @ way, way)
        if len(chosen) == left.shape[1]:
            break
    return chosen


def _common(times_nrr: np.ndarray) -> list[np.ndarray]:
    """The points whose coordinates are common eigenvalues of the multiplications."""
    from scipy.linalg import schur

    weights = np.random.default_rng(0).random(len(times_nrr))
    mixed = np.tensordot(weights / weights.sum(), times_nrr, axes=1)
    factors: Any = schur(mixed, output="real")
    triangle, ways = factors
    if np.abs(np.diag(triangle, -1)).max(initial=0.0) > 1e-6 * max(1.0, np.abs(triangle).max(initial=0.0)):
        return []  # a complex pair: no real points
    return [np.array([ways[:, j] @ one @ ways[:, j] for one in times_nrr]) for j in range(ways.shape[1])]
