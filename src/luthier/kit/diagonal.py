"""Sums of squares of at most two monomials each: a linear or a second-order cone program instead of a semidefinite one.

    dsos    every Q_k is diagonally dominant: a sum of w (b_i)^2 and w (b_i +- b_j)^2 with w >= 0
    sdsos   every Q_k is scaled diagonally dominant: a sum of w (u b_i + v b_j)^2 for any u, v

Solved in the moment form, as `kit.moments` does for all positive semidefinite Q_k:

    minimise L(p)   so that   the traces of all M_k(L) add up to 1, and for every pair i, j of every cone
    dsos     M_ii + M_jj +- 2 M_ij >= 0
    sdsos    the matrix of M_ii, M_ij, M_jj is positive semidefinite

Its optimum is the largest t so that p is a sum with every Q_k - tI in the smaller set. Below 0 there is no such
sum, and L separates p from those of two monomials each, though perhaps not from all sums of squares.
Paper: Ahmadi and Majumdar, arXiv 1706.02586, section 3.  Both programs go to Clarabel: its solutions lie inside
the optimal face, where a simplex method ends in a corner, and it was the faster one (84 monomials: 0.06 s, HiGHS
0.12 s).
"""

from __future__ import annotations

from math import comb, prod
from typing import Any, Literal

import numpy as np

from luthier.kit.cones import Cone, Program
from luthier.kit.moments import Solved, settings, solver
from luthier.kit.polynomial import Exponents

Kind = Literal["dsos", "sdsos"]


def solve(
    program: Program, target: dict[Exponents, float], kind: Kind, tolerance: float, seconds: float | None
) -> Solved:
    """Solve for the polynomial `target`, all of whose monomials the program's cones reach."""
    clarabel, sparse = solver()
    cost = np.array([target.get(m, 0.0) for m in program.monomials])
    entries = [_entries(program, cone) for cone in program.cones]
    trace = sum(e[_places(c)[0]].sum(axis=0) for e, c in zip(entries, program.cones, strict=True))
    rows = [_pairs(e, c, kind) for e, c in zip(entries, program.cones, strict=True)]
    whole = sparse.vstack([*(-r for r in rows), sparse.csr_matrix(trace)], format="csc")
    cones = [made for c in program.cones for made in _kinds(clarabel, len(c.basis), kind)] + [clarabel.ZeroConeT(1)]
    right = np.append(np.zeros(whole.shape[0] - 1), 1.0)
    found = clarabel.DefaultSolver(
        sparse.csc_matrix((len(cost), len(cost))), cost, whole, right, cones, settings(tolerance, seconds)
    ).solve()
    optimum = float(cost @ found.x)
    parts = np.split(np.array(found.z), np.cumsum([r.shape[0] for r in rows]))
    grams = tuple(_gram(z, len(c.basis), kind) + optimum * np.eye(len(c.basis))
                  for z, c in zip(parts[:-1], program.cones, strict=True))  # fmt: skip
    sums = sum((_sums(e, q) for e, q in zip(entries, grams, strict=True)), np.zeros(len(cost)))
    return Solved(
        optimum=optimum, residual=float(np.abs(sums - cost).max(initial=0.0)), grams=grams, cofactors=(),
        moments=dict(zip(program.monomials, found.x, strict=True)), status=str(found.status),
        iterations=int(found.iterations),
    )  # fmt: skip


def spread(program: Program) -> dict[Exponents, float]:
    """A functional of trace 1 that is positive on every square: means over independent numbers cos(u), u uniform."""
    raw = {m: prod(0.0 if e % 2 else comb(e, e // 2) / 2**e for e in m) for m in program.monomials}
    trace = sum(float(c) * raw[m] for cone in program.cones for i, j, terms in cone.entries if i == j
                for m, c in terms.items())  # fmt: skip
    return {m: value / trace for m, value in raw.items()}


def _entries(program: Program, cone: Cone) -> Any:
    """The sparse matrix of L -> the upper triangle of M(L), by columns."""
    _, sparse = solver()
    number = program.monomials
    where = [(row, number[m], float(c)) for row, (_, _, terms) in enumerate(cone.entries) for m, c in terms.items()]
    rows, columns, values = zip(*where, strict=True)
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(cone.entries), len(number)))


def _places(cone: Cone) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where the triangle by columns holds the diagonal and the rest; i and j of the rest, i < j."""
    j, i = np.tril_indices(len(cone.basis))
    return np.flatnonzero(i == j), np.flatnonzero(i < j), i[i < j], j[i < j]


def _pairs(entries: Any, cone: Cone, kind: Kind) -> Any:
    """What has to lie in the cones of `_kinds`: of each pair two or three rows, then the diagonal."""
    _, sparse = solver()
    diagonal, rest, i, j = _places(cone)
    one, other, twice = entries[diagonal[i]], entries[diagonal[j]], 2 * entries[rest]
    rows = [one + other + twice, one + other - twice] if kind == "dsos" else [one + other, one - other, twice]
    if not len(i):
        return entries[diagonal]
    turn = np.arange(len(rows) * len(i)).reshape(len(rows), len(i)).T.ravel()
    return sparse.vstack([sparse.vstack(rows, format="csr")[turn], entries[diagonal]], format="csr")


def _kinds(clarabel: Any, size: int, kind: Kind) -> list[Any]:
    pairs = size * (size - 1) // 2
    if kind == "dsos":
        return [clarabel.NonnegativeConeT(2 * pairs + size)]
    return [clarabel.SecondOrderConeT(3)] * pairs + [clarabel.NonnegativeConeT(size)]


def _gram(z: np.ndarray, size: int, kind: Kind) -> np.ndarray:
    """Q from the multipliers of the rows of `_pairs`."""
    j, i = np.tril_indices(size)
    i, j = i[i < j], j[i < j]
    width = 2 if kind == "dsos" else 3
    each, made = z[: width * len(i)].reshape(len(i), width), np.diag(z[width * len(i) :])
    first, second = each[:, 0], each[:, 1]
    upper = first - second if kind == "dsos" else each[:, 2]
    on_i, on_j = (first + second, first + second) if kind == "dsos" else (first + second, first - second)
    np.add.at(made, (i, i), on_i)
    np.add.at(made, (j, j), on_j)
    made[i, j] = made[j, i] = upper
    return made


def _sums(entries: Any, gram: np.ndarray) -> np.ndarray:
    """The coefficients of b'Qb."""
    j, i = np.tril_indices(len(gram))
    return entries.T @ (gram[i, j] * np.where(i == j, 1.0, 2.0))
