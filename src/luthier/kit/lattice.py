"""Every monomial that the squares of p may hold, where the box around them is too large to be gone through.

If p is a sum of squares, all their monomials lie in the convex hull of E = {a : 2a is an exponent of p}: a
vertex a of the hull of what the squares hold gives x^2a a coefficient that nothing cancels. So do those that
iterated diagonal consistency leaves (`kit.gram`), by the same argument; it may thus start from E's hull.

The lattice points of the hull are found one coordinate after the other. A prefix is dropped when a functional
with whole-numbered weights is larger on it than on E, exactly: what solvers and random draws propose is never
trusted, and no point is lost. Points outside the hull may be kept; consistency takes them away.
"""

from __future__ import annotations

import numpy as np

from luthier.kit import gram
from luthier.kit.polynomial import Exponents, Polynomial, graded

MOST = 400_000
"""prefixes that are kept at a time, and more monomials than consistency is asked to look at"""
DIRECTIONS, LARGEST, LAST = 96, 4, 4000
"""random functionals of each step, their largest weight, and how many finer ones the whole points must pass"""
FEW, PROGRAMS = 128, 6000
"""a step that leaves more prefixes than this asks linear programs, so many in all"""
WIDE = 8
"""in more variables than this"""
STRICT = 12_000
"""candidates that consistency is given at most"""


def halves(p: Polynomial) -> np.ndarray:
    """E as rows: half of p's even exponents."""
    support = np.array(p.support, dtype=np.int64).reshape(len(p.support), -1)
    return support[(support % 2 == 0).all(axis=1)] // 2


def possible(p: Polynomial) -> list[Exponents] | None:
    """What iterated diagonal consistency leaves of all monomials; None where they are too many to look at."""
    points = halves(p)
    if not len(points):
        return []
    found = hull(points)
    if found is None or len(found) > STRICT:
        return None
    return gram.consistent(p, graded(map(tuple, found.tolist())))


def basis(p: Polynomial, how: str) -> list[Exponents] | None:
    """The monomials of the squares; None where they are too many to look at.

    how: full, newton (half the polytope), or consistent, what iterated diagonal consistency leaves.
    """
    if how == "full":
        return gram.full(p)
    candidates = gram.box(p)
    if candidates is None:
        return possible(p) if how == "consistent" else None
    return gram.consistent(p, candidates) if how == "consistent" else gram.newton(p, candidates)


def hull(points: np.ndarray) -> np.ndarray | None:
    """Lattice points, all those of the points' convex hull among them; None if they are too many."""
    order = _order(points)
    rows = points[:, order]
    rng = np.random.default_rng(0)
    prefixes, planes, room = np.zeros((1, 0), dtype=np.int64), np.zeros((0, 0), dtype=np.int64), [PROGRAMS]
    for width in range(1, points.shape[1] + 1):
        values = np.arange(rows[:, width - 1].min(), rows[:, width - 1].max() + 1)
        if len(prefixes) * len(values) > 20 * MOST:
            return None
        prefixes = np.hstack([np.repeat(prefixes, len(values), axis=0), np.tile(values, len(prefixes))[:, None]])
        planes = np.hstack([planes, np.zeros((len(planes), 1), dtype=np.int64)])
        drawn = rng.integers(-LARGEST, LARGEST + 1, (DIRECTIONS, width))
        prefixes = _below(prefixes, rows, np.vstack([planes, _simple(width), drawn]))
        if points.shape[1] > WIDE and len(prefixes) > FEW:
            prefixes, planes = _programs(prefixes, rows[:, :width], planes, room)
        if len(prefixes) > MOST:
            return None
    fine = np.rint(rng.standard_normal((LAST, points.shape[1])) * 1000).astype(np.int64)
    return _below(prefixes, rows, fine)[:, np.argsort(order)]


def _order(points: np.ndarray) -> list[int]:
    """Variables, those of one monomial side by side: a prefix then soon tells which monomials it can be of."""
    seen: dict[int, None] = {}
    for row in points[np.argsort(-(points > 0).sum(axis=1), kind="stable")]:
        seen |= dict.fromkeys(np.flatnonzero(row).tolist())
    return [*seen, *(i for i in range(points.shape[1]) if i not in seen)]


def _simple(width: int) -> np.ndarray:
    """The degree and the last coordinate with each before it, both ways: what a sparse hull is bounded by."""
    ones, pairs = np.ones((1, width), dtype=np.int64), np.eye(width, dtype=np.int64)
    pairs[:, -1] = 1
    least = np.vstack([ones, pairs])
    return np.vstack([least, -least])


def _below(prefixes: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The prefixes on which no functional exceeds its largest value on the rows."""
    floats, start = weights.T.astype(np.float64), 0  # whole numbers far below 2^53: exact, and BLAS knows floats alone
    tops = (rows[:, : prefixes.shape[1]].astype(np.float64) @ floats).max(axis=0)
    while start < len(weights):
        some = slice(start, 2 * start + 16)  # a few first, which drop most
        prefixes = prefixes[(prefixes.astype(np.float64) @ floats[:, some] <= tops[some]).all(axis=1)]
        start = some.stop
    return prefixes


def _programs(
    prefixes: np.ndarray, rows: np.ndarray, planes: np.ndarray, room: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Ask a linear program for a separating functional, prefix by prefix, and drop all that it separates."""
    known = set(map(tuple, rows.tolist()))
    left, kept = prefixes, []
    while len(left) and room[0] > 0:
        first, left = left[0], left[1:]
        kept.append(first)
        if tuple(first.tolist()) in known:
            continue
        room[0] -= 1
        plane = separating(first, rows)
        if plane is not None:
            kept.pop()
            planes = np.vstack([planes, plane])
            left = _below(left, rows, plane[None])
    return np.vstack([*(k[None] for k in kept), left]), planes


def separating(point: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
    """Whole-numbered weights under which the point exceeds every row, exactly; None if none was found."""
    from scipy.optimize import linprog

    width = rows.shape[1]
    cost = np.append(-point.astype(float), 1.0)
    found = linprog(cost, A_ub=np.hstack([rows, -np.ones((len(rows), 1))]), b_ub=np.zeros(len(rows)),
                    bounds=[(-1, 1)] * width + [(None, None)], method="highs")  # fmt: skip
    if found.x is None:
        return None
    plane = np.rint(found.x[:-1] * 2**16).astype(np.int64)
    return plane if plane @ point > (rows @ plane).max() else None
