"""The semidefinite program behind sums of squares, given to Clarabel directly, in its moment form.

    minimise L(p)   over functionals L on the products of the basis
    so that  M(L), the matrix of L(b_i b_j), is positive semidefinite and has trace 1

The dual is the Gram side: the optimum is the largest t so that p = b'Qb with Q - tI positive
semidefinite, and Q is read from the cone's multipliers. Both sides have interior points whatever p is, so
there is always an optimum: above 0 p has a positive definite Gram matrix, below 0 it has none, and L
separates it from all sums of squares of this basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.errors import LuthierError
from luthier.kit.gram import Products
from luthier.kit.polynomial import Exponents


@dataclass(frozen=True)
class Solved:
    """What the solver says. margin: the optimum; gram: Q; moments: L of each product.

    residual: the largest difference between a coefficient of b'Qb and of p.  status, iterations: the
    solver's own words.
    """

    margin: float
    residual: float
    gram: np.ndarray
    moments: dict[Exponents, float]
    status: str
    iterations: int


def separate(
    products: Products, size: int, target: dict[Exponents, float], tolerance: float, seconds: float | None
) -> Solved:
    """Solve for the polynomial `target`, all of whose monomials must be products."""
    cost = np.array([target.get(m, 0.0) for m in products])
    found, gram = _solve(products, size, cost, False, tolerance, seconds)
    margin = float(cost @ found.x)
    gram = gram + margin * np.eye(size)
    sums = [sum(gram[i, j] + gram[j, i] * (i != j) for i, j in pairs) for pairs in products.values()]
    return Solved(
        margin=margin, residual=float(np.abs(np.array(sums) - cost).max()), gram=gram,
        moments=dict(zip(products, found.x, strict=True)), status=str(found.status), iterations=int(found.iterations),
    )  # fmt: skip


def cost(size: int) -> tuple[float, int]:
    """About how many operations and bytes a basis of this size takes: the cone's block is dense."""
    entries = size * (size + 1) // 2
    return 20.0 * entries**3, 50 * entries**2


def central(products: Products, size: int, tolerance: float) -> dict[Exponents, float]:
    """The functional of trace 1 whose moment matrix has the largest least eigenvalue."""
    cost = np.append(np.zeros(len(products)), -1.0)
    found, _ = _solve(products, size, cost, True, tolerance, None)
    return dict(zip(products, found.x[:-1], strict=True))


def _solve(
    products: Products, size: int, cost: np.ndarray, slack: bool, tolerance: float, seconds: float | None
) -> tuple[Any, np.ndarray]:
    """The solver's answer and the cone's multiplier as a matrix. slack: with a last unknown t, M - tI is
    in the cone instead of M."""
    clarabel, sparse = _solver()
    rows, columns, values, trace = _entries(products, size, slack)
    matrix = sparse.csc_matrix((values, (rows, columns)), shape=(size * (size + 1) // 2, len(cost)))
    whole = sparse.vstack([matrix, sparse.csc_matrix(trace)], format="csc")
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads, settings.chordal_decomposition_enable = False, 1, False
    for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
        setattr(settings, name, tolerance)
    if seconds is not None:
        settings.time_limit = seconds
    cones = [clarabel.PSDTriangleConeT(size), clarabel.ZeroConeT(1)]
    right = np.append(np.zeros(whole.shape[0] - 1), 1.0)
    zero = sparse.csc_matrix((len(cost), len(cost)))
    found = clarabel.DefaultSolver(zero, cost, whole, right, cones, settings).solve()
    return found, _matrix(np.array(found.z[:-1]), size)


def _solver() -> tuple[Any, Any]:
    try:
        import clarabel
        from scipy import sparse
    except ImportError:
        raise LuthierError("certificates need the solver Clarabel", do="pip install 'luthier[sos]'") from None
    return clarabel, sparse


def _entries(
    products: Products, size: int, slack: bool
) -> tuple[Sequence[int], Sequence[int], Sequence[float], np.ndarray]:
    """The sparse matrix of y -> -svec(M(y)), and the row of the trace. svec: the upper triangle by columns,
    off-diagonal entries times the square root of 2."""
    rows, columns, values = [], [], []
    trace = np.zeros((1, len(products) + slack))
    for column, pairs in enumerate(products.values()):
        for i, j in pairs:
            rows.append(j * (j + 1) // 2 + i)
            columns.append(column)
            values.append(-1.0 if i == j else -np.sqrt(2.0))
            trace[0, column] += i == j
    if slack:
        rows += [j * (j + 3) // 2 for j in range(size)]
        columns += [len(products)] * size
        values += [1.0] * size
    return rows, columns, values, trace


def _matrix(svec: np.ndarray, size: int) -> np.ndarray:
    full = np.zeros((size, size))
    full[np.tril_indices(size)] = svec  # the upper triangle by columns is the lower one by rows
    full = full + full.T
    off = full / np.sqrt(2.0)
    np.fill_diagonal(off, full.diagonal() / 2)
    return off
