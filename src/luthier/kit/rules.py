"""Rules of thumb that guess which monomials a sum of squares needs, without a hull and without training.

    doubled     {a : 2a is an exponent of p} among the candidates
    corners     the vertices of Newton's polytope that are even, halved, and then greedy repair
    repaired    greedy repair of any basis: while an exponent of p is no sum of two of its monomials, add the
                monomial that makes most of them one

Paper: greedy repair is that of arXiv 2510.13444; the two rules stand in a public fork of its code
(khoruzhii/Heuristic-Sum-of-Squares). None of them proves anything: p may be a sum of squares and have none
over the basis that a rule gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from luthier.kit import lattice
from luthier.kit.gram import keys
from luthier.kit.polynomial import Exponents, Polynomial, graded

ROUNDS = 1000
"""monomials that repair adds at most"""


def doubled(p: Polynomial, candidates: Iterable[Exponents]) -> list[Exponents]:
    """The candidates whose squares are monomials of p."""
    support = set(p.support)
    return [a for a in candidates if tuple(2 * e for e in a) in support]


def corners(p: Polynomial, candidates: Sequence[Exponents] | None = None) -> list[Exponents]:
    """Half of the even vertices of Newton's polytope, repaired."""
    support = np.array(p.support, dtype=np.int64).reshape(len(p.support), -1)
    even = (support % 2 == 0).all(axis=1)
    inner = _midpoints(support)
    asked = np.flatnonzero(even & ~inner)
    halved = [tuple(row) for row in (support[asked[_vertices(support, asked)]] // 2).tolist()]
    within = halved if candidates is None else [a for a in halved if a in set(candidates)]
    return repaired(p, within, candidates)


def guesses(p: Polynomial, candidates: Sequence[Exponents], which: str = "both") -> list[list[Exponents]]:
    """The rules' bases, repaired. which: doubled, corners or both."""
    made = []
    if which != "corners":
        made.append(repaired(p, doubled(p, candidates), candidates))
    if which != "doubled":
        made.append(corners(p, candidates))
    return made


def _midpoints(support: np.ndarray) -> np.ndarray:
    """Which exponents lie halfway between two others, and so are no vertices: quicker than a linear program."""
    codes = keys([tuple(row) for row in support.tolist()])
    known = np.sort(codes)
    flags = np.zeros(len(codes), dtype=bool)
    for i in range(len(codes)):
        others = 2 * codes[i : i + 1] - np.delete(codes, i)
        place = np.minimum(np.searchsorted(known, others), len(known) - 1)
        flags[i] = bool((known[place] == others).any())
    return flags


def _vertices(support: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Which of the asked rows lie outside the hull of all other rows, as far as floats can tell."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((support.shape[1], 64 * support.shape[1]))
    sure = set(np.unique((support @ drawn).argmax(axis=0)).tolist())  # a generic functional is largest at a vertex
    return np.array(
        [i in sure or lattice.separating(support[i], np.delete(support, i, axis=0)) is not None for i in asked],
        dtype=bool,
    )


def repaired(
    p: Polynomial, basis: Sequence[Exponents], within: Sequence[Exponents] | None = None,
    scores: Mapping[Exponents, float] | None = None,
) -> list[Exponents]:  # fmt: skip
    """The basis and what repair adds, in the order in which a polynomial is written.

    within: what may be added; None: every monomial. It stops where nothing helps, so that the result covers
    p's exponents only if that can be. scores: decide between monomials that help equally; then order does.
    """
    chosen = list(dict.fromkeys(basis))
    if not chosen and p.terms:
        chosen = _opening(p, within)
    for _ in range(ROUNDS):
        missing = uncovered(p, chosen) if chosen else []
        best = _most_helpful(missing, chosen, within, scores or {}) if missing else None
        if best is None:
            break
        chosen.append(best)
    return graded(chosen)


def uncovered(p: Polynomial, basis: Sequence[Exponents]) -> list[Exponents]:
    """The exponents of p that are no sum of two of the basis."""
    if not basis:
        return list(p.support)
    codes = keys(basis)
    sums = np.unique((codes[:, None] + codes[None]).reshape(-1))
    here = np.isin(keys(p.support), sums)
    return [m for m, covered in zip(p.support, here, strict=True) if not covered]


def _opening(p: Polynomial, within: Sequence[Exponents] | None) -> list[Exponents]:
    """Half of the first even exponent, since repair divides by what it has."""
    found = doubled(p, within) if within is not None else [tuple(r) for r in lattice.halves(p).tolist()]
    return graded(found)[:1]


def _most_helpful(
    missing: Sequence[Exponents], chosen: Sequence[Exponents], within: Sequence[Exponents] | None,
    scores: Mapping[Exponents, float],
) -> Exponents | None:  # fmt: skip
    """The monomial whose products with the chosen ones, or with itself, give most of the missing."""
    left = np.array(missing)[:, None] - np.array(chosen)[None]
    flat = left.reshape(-1, left.shape[-1])
    found, counts = np.unique(flat[(flat >= 0).all(axis=1)], axis=0, return_counts=True)
    helps = {tuple(row): int(n) for row, n in zip(found.tolist(), counts.tolist(), strict=True)}
    for m in missing:
        if all(e % 2 == 0 for e in m):
            half = tuple(e // 2 for e in m)
            helps[half] = helps.get(half, 0) + 1
    allowed = helps.keys() - set(chosen)
    if within is not None:
        allowed &= set(within)
    return min(graded(allowed), key=lambda a: (-helps[a], -scores.get(a, 0.0)), default=None)


def ranked(p: Polynomial, candidates: Sequence[Exponents]) -> list[Exponents]:
    """The candidates, likeliest first: by whether the square is a monomial of p, then by how many of the sums with
    other candidates are, each shared among the pairs that have it."""
    if not candidates:
        return []
    codes = keys(candidates)
    sums, place, counts = np.unique(codes[:, None] + codes[None], return_inverse=True, return_counts=True)
    share = (np.isin(sums, keys(p.support)) / counts)[place.reshape(len(codes), -1)].sum(axis=1)
    first = set(doubled(p, candidates))
    value = {a: (a not in first, -float(s)) for a, s in zip(candidates, share, strict=True)}
    return sorted(graded(candidates), key=value.__getitem__)
