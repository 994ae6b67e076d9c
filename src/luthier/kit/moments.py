"""The semidefinite program behind sums of squares, given to Clarabel directly, in its moment form.

    minimise L(p)   over functionals L on the monomials that a program's cones and equations reach
    so that  M_k(L), the matrix of L(g_k b_i b_j), is positive semidefinite for every cone k,
             L(m h_j) = 0 for every equation j and monomial m,
             and either the traces of all M_k add up to 1, or L(q) = 1 for a given q

The dual is the Gram side. With the traces its optimum is the largest t so that p is a sum over the cones with
every Q_k - tI positive semidefinite: above 0 p has positive definite Gram matrices, below 0 it has none, and L
separates it from all sums. Both sides have interior points whatever p is, so there is always an optimum
(without equations). With L(q) = 1 it is the largest t so that p - tq is such a sum: of q = 1 a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.errors import LuthierError
from luthier.kit.cones import Program
from luthier.kit.orbits import Folded
from luthier.kit.polynomial import Exponents

ROOT = np.sqrt(2.0)
REFINED = 1e-10
"""Tolerances below this need linear systems that are refined."""
ENDED = ("Solved", "AlmostSolved", "MaxTime")
"""what the solver says where another try gives nothing else"""


@dataclass(frozen=True)
class Solved:
    """What the solver says. optimum: t; grams: Q_k; cofactors: of each equation, one number a monomial; moments: L.

    residual: the largest difference between a coefficient of the sum and of p.  status, iterations: the
    solver's own words.
    """

    optimum: float
    residual: float
    grams: tuple[np.ndarray, ...]
    cofactors: tuple[np.ndarray, ...]
    moments: dict[Exponents, float]
    status: str
    iterations: int

    @property
    def finite(self) -> bool:
        return all(np.isfinite(part).all() for part in (*self.grams, *self.cofactors))

    def matrix(self, program: Program, k: int) -> np.ndarray:
        """M_k(L)."""
        found = np.zeros((len(program.cones[k].basis),) * 2)
        for i, j, terms in program.cones[k].entries:
            found[i, j] = found[j, i] = sum(float(c) * self.moments[m] for m, c in terms.items())
        return found


def solve(
    program: Program, target: Mapping[Exponents, float], tolerance: float, seconds: float | None,
    of: Mapping[Exponents, float] | None = None, fold: Folded | None = None,
) -> Solved:  # fmt: skip
    """Solve for the polynomial `target`, all of whose monomials the program reaches, as q's are, if `of` gives q.

    fold: symmetries of the program, the target and q.
    """
    _, sparse = solver()
    cost = np.array([target.get(m, 0.0) for m in program.monomials])
    matrices = [_svec(program, k) for k in range(len(program.cones))]
    normal = _traces(program) if of is None else np.array([[of.get(m, 0.0) for m in program.monomials]])
    sizes, seen, join = [len(c.basis) for c in program.cones], matrices, sparse.identity(len(cost), format="csc")
    if fold is not None:
        join = sparse.csc_matrix((np.ones(len(cost)), (np.arange(len(cost)), fold.orbit)))
        sizes = [len(part.bases_mNd) for part in fold.parts]
        seen = [_of_part(part.first_Nm) @ matrices[part.cone] for part in fold.parts]
    elif not program.free:
        join = _even(sparse.vstack(matrices, format="csc"))
    equations = _equations(program) if program.free else None
    refined = of is not None or equations is not None or tolerance < REFINED  # else both sides have interior points
    found = _solve(
        sizes, [m @ join for m in seen], normal @ join, equations, join.T @ cost, tolerance, seconds, refined
    )
    parts = np.split(np.array(found.z), np.cumsum([size * (size + 1) // 2 for size in sizes]))
    moments = join @ np.array(found.x)
    optimum = float(cost @ moments)
    grams = tuple(_matrix(z, size) for z, size in zip(parts[:-1], sizes, strict=True))
    if fold is not None:
        grams = fold.grams(program, grams)
    if of is None:
        grams = tuple(gram + optimum * np.eye(len(gram)) for gram in grams)
    cofactors, at = [], 1
    for free in program.free:
        cofactors.append(-parts[-1][at : at + len(free.monomials)])
        at += len(free.monomials)
    sums = sum((m.T @ _vector(q) for m, q in zip(matrices, grams, strict=True)), np.zeros(len(cost)))
    if program.free:
        sums = sums + _equations(program).T @ np.concatenate(cofactors)
    if of is not None:
        sums = sums + optimum * normal[0]
    return Solved(
        optimum=optimum, residual=float(np.abs(sums - cost).max(initial=0.0)), grams=grams, cofactors=tuple(cofactors),
        moments=dict(zip(program.monomials, moments, strict=True)), status=str(found.status),
        iterations=int(found.iterations),
    )  # fmt: skip


def _even(whole: Any) -> Any:
    """The diagonal matrix of powers of 2 after which the columns' largest numbers are near 1; the solver's own scaling
    reaches 10^4."""
    _, sparse = solver()
    largest = np.maximum(abs(whole).max(axis=0).toarray().ravel(), 1e-300)
    return sparse.diags(np.exp2(-np.rint(np.log2(largest))), format="csc")


def central(program: Program, tolerance: float) -> dict[Exponents, float]:
    """The functional of trace 1 whose matrices have the largest least eigenvalue."""
    _, sparse = solver()
    matrices = []
    for k, cone in enumerate(program.cones):
        size = len(cone.basis)
        unit = np.zeros((size * (size + 1) // 2, 1))
        unit[[j * (j + 3) // 2 for j in range(size)]] = -1.0
        matrices.append(sparse.hstack([_svec(program, k), sparse.csc_matrix(unit)], format="csc"))
    normal = np.hstack([_traces(program), np.zeros((1, 1))])
    cost = np.append(np.zeros(len(program.monomials)), -1.0)
    sizes = [len(cone.basis) for cone in program.cones]
    found = _solve(sizes, matrices, normal, None, cost, tolerance, None, False)
    return dict(zip(program.monomials, found.x[:-1], strict=True))


def cost(sizes: Sequence[int]) -> tuple[float, int]:
    """About how many operations and bytes bases of these sizes take: the block of a cone is dense."""
    entries = [size * (size + 1) // 2 for size in sizes]
    return 20.0 * sum(e**3 for e in entries), 50 * sum(e**2 for e in entries)


def _solve(
    sizes: Sequence[int], matrices: Sequence[Any], normal: np.ndarray, equations: Any, cost: np.ndarray,
    tolerance: float, seconds: float | None, refined: bool,
) -> Any:  # fmt: skip
    """The solver's answer; its multipliers are those of the cones, in turn, then of `normal`, then of the equations.

    refined: how linear systems are solved at first; if that does not end well, they are refined.
    """
    clarabel, sparse = solver()
    rows = [*(-m for m in matrices), sparse.csc_matrix(normal), *([] if equations is None else [equations])]
    whole = sparse.vstack(rows, format="csc")
    equalities = whole.shape[0] - sum(m.shape[0] for m in matrices)
    cones = [*map(clarabel.PSDTriangleConeT, sizes), clarabel.ZeroConeT(equalities)]
    right = np.zeros(whole.shape[0])
    right[-equalities] = 1.0
    zero = sparse.csc_matrix((len(cost), len(cost)))

    for how in (refined, True):
        found = clarabel.DefaultSolver(zero, cost, whole, right, cones, settings(tolerance, seconds, how)).solve()
        if how or str(found.status) in ENDED:
            break
        seconds = seconds and max(1e-3, seconds - found.solve_time)
    return found


def solver() -> tuple[Any, Any]:
    """Clarabel and scipy.sparse."""
    try:
        import clarabel
        from scipy import sparse
    except ImportError:
        raise LuthierError("certificates need the solver Clarabel", do="pip install 'luthier[sos]'") from None
    return clarabel, sparse


def settings(tolerance: float, seconds: float | None, refined: bool = True) -> Any:
    """Clarabel's: silent, one thread, cones as they are given. refined: every linear system is solved again for what
    its solution left, until that is about 1e-13; half of the time goes there."""
    made = solver()[0].DefaultSettings()
    made.verbose, made.max_threads, made.chordal_decomposition_enable = False, 1, False
    made.iterative_refinement_enable = refined
    for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
        setattr(made, name, tolerance)
    if seconds is not None:
        made.time_limit = seconds
    return made


def _svec(program: Program, k: int) -> Any:
    """The sparse matrix of L -> svec(M_k(L)): the upper triangle by columns, off-diagonal entries times sqrt 2."""
    _, sparse = solver()
    rows, columns, values = [], [], []
    number = program.monomials
    entries = program.cones[k].entries
    for row, (i, j, terms) in enumerate(entries):
        for m, c in terms.items():
            rows.append(row)
            columns.append(number[m])
            values.append(float(c) if i == j else float(c) * ROOT)
    return sparse.csc_matrix((values, (rows, columns)), shape=(len(entries), len(number)))


def _equations(program: Program) -> Any:
    """The sparse matrix of L -> L(m h) for every equation and monomial."""
    _, sparse = solver()
    each = [terms for free in program.free for terms in free.entries]
    where = [(row, program.monomials[m], float(c)) for row, terms in enumerate(each) for m, c in terms.items()]
    rows, columns, values = zip(*where, strict=True)
    return sparse.csc_matrix((values, (rows, columns)), shape=(len(each), len(program.monomials)))


def _traces(program: Program) -> np.ndarray:
    """The row of L -> the sum of all traces."""
    row = np.zeros((1, len(program.monomials)))
    for cone in program.cones:
        for i, j, terms in cone.entries:
            for m, c in terms.items() if i == j else ():
                row[0, program.monomials[m]] += float(c)
    return row


def _of_part(first_Nm: np.ndarray) -> Any:
    """The matrix of svec(M) -> svec(u'Mu)."""
    _, sparse = solver()
    size, copies = first_Nm.shape
    i, j = np.tril_indices(size)[::-1]
    off = np.where(i == j, 0.5, 1 / ROOT)
    rows = [
        (first_Nm[i, a] * first_Nm[j, b] + first_Nm[j, a] * first_Nm[i, b]) * off * (1.0 if a == b else ROOT)
        for b in range(copies) for a in range(b + 1)
    ]  # fmt: skip
    return sparse.csc_matrix(np.array(rows))


def _vector(matrix: np.ndarray) -> np.ndarray:
    """svec of a symmetric matrix."""
    rows, columns = np.tril_indices(len(matrix))
    return matrix[rows, columns] * np.where(rows == columns, 1.0, ROOT)


def _matrix(svec: np.ndarray, size: int) -> np.ndarray:
    full = np.zeros((size, size))
    full[np.tril_indices(size)] = svec  # the upper triangle by columns is the lower one by rows
    full = full + full.T
    off = full / ROOT
    np.fill_diagonal(off, full.diagonal() / 2)
    return off
