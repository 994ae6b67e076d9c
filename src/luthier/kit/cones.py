"""Sums of squares as cones: squares over a basis, times a weight; and how a problem falls into small ones.

    p = sum over cones k of  g_k * b_k' Q_k b_k   +   sum over equations j of  c_j * h_j

Q_k is positive semidefinite, g_k a product of constraints (1 for the plain squares), c_j any polynomial
over given monomials. A basis holds polynomials, which are monomials until a face was taken (`kit.faces`).

Blocks. Two monomials a, b of one basis belong together if a + b + an exponent of g is in the support, which
grows by what the blocks then give, until nothing changes. Nothing is lost (Wang, Magron, Lasserre, SIAM
J. Optim. 31, 2021): a functional that separates p from the sums over the blocks separates it from all, with
0 for every other moment. Sign symmetries are found on the way. Chordal blocks are smaller, and may lose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from luthier.kit.gram import keys
from luthier.kit.polynomial import Exponents, Terms

ONE = Fraction(1)


@dataclass(frozen=True)
class Cone:
    """Squares over `basis`, times `weight`. which: the constraints whose product the weight is."""

    basis: tuple[Terms, ...]
    weight: Terms
    which: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether every product of the basis, times the weight, is a monomial with the coefficient 1."""
        return all(_single(t) for t in (self.weight, *self.basis)) and not any(next(iter(self.weight)))

    @property
    def monomials(self) -> list[Exponents]:
        """Of a basis of monomials."""
        return [next(iter(b)) for b in self.basis]

    @cached_property
    def entries(self) -> list[tuple[int, int, Terms]]:
        """(i, j, weight * b_i * b_j) for all i <= j, by columns."""
        if self.plain:
            every = self.monomials
            return [(i, j, {_add(every[i], every[j]): ONE}) for j in range(len(every)) for i in range(j + 1)]
        heavy = [times(self.weight, b) for b in self.basis]
        return [(i, j, times(self.basis[i], heavy[j])) for j in range(len(heavy)) for i in range(j + 1)]


@dataclass(frozen=True)
class Free:
    """An equation's polynomial and the monomials its cofactor may hold. which: the equation."""

    factor: Terms
    monomials: tuple[Exponents, ...]
    which: int = 0

    @cached_property
    def entries(self) -> list[Terms]:
        return [times(self.factor, {m: ONE}) for m in self.monomials]


@dataclass(frozen=True)
class Program:
    """All cones and equations of one question."""

    cones: tuple[Cone, ...]
    free: tuple[Free, ...] = ()

    @cached_property
    def monomials(self) -> dict[Exponents, int]:
        """Every monomial that can be reached, numbered."""
        found: dict[Exponents, int] = {}
        each = [terms for cone in self.cones for _, _, terms in cone.entries]
        for terms in [*each, *(terms for free in self.free for terms in free.entries)]:
            for m in terms:
                found.setdefault(m, len(found))
        return found

    @property
    def largest(self) -> int:
        """Polynomials in the largest basis."""
        return max((len(cone.basis) for cone in self.cones), default=0)


def cone(monomials: Sequence[Exponents], weight: Terms | None = None, which: tuple[int, ...] = ()) -> Cone:
    """The cone over monomials."""
    one = {(0,) * (len(monomials[0]) if monomials else 0): ONE}
    return Cone(tuple({m: ONE} for m in monomials), weight or one, which)


def times(left: Terms, right: Terms) -> Terms:
    """The product of two polynomials."""
    above, below = (math.lcm(*(c.denominator for c in terms.values())) for terms in (left, right))
    whole = [(b, y.numerator * (below // y.denominator)) for b, y in right.items()]
    found: dict[Exponents, int] = {}
    for a, c in left.items():
        x = c.numerator * (above // c.denominator)
        for b, y in whole:
            key = _add(a, b)
            found[key] = found.get(key, 0) + x * y
    return {m: Fraction(c, above * below) for m, c in found.items() if c}


def plus(left: Terms, right: Terms, factor: Fraction = ONE) -> Terms:
    """left + factor * right."""
    found = dict(left)
    for m, c in right.items():
        found[m] = found.get(m, Fraction(0)) + factor * c
    return {m: c for m, c in found.items() if c}


def unreached(basis: Sequence[Exponents], monomials: Sequence[Exponents]) -> Exponents | None:
    """The first of the monomials that is no product of two of the basis."""
    if len(basis) ** 2 < 20 * len(monomials):  # all products cost less than looking for one of each
        products = {_add(a, b) for i, a in enumerate(basis) for b in basis[: i + 1]}
        return next((m for m in monomials if m not in products), None)
    there = set(basis)
    return next((m for m in monomials if all(tuple(map(int.__sub__, m, b)) not in there for b in basis)), None)


def split(program: Program, support: Iterable[Exponents], chordal: bool = False) -> Program:
    """The same program, over monomials, in blocks. support: of the polynomial.

    Monomials are compared by 64-bit keys that add up like exponents: two with one key could only join too much.
    """
    support = list(support)
    bases = [keys(c.monomials) for c in program.cones]
    weights = [keys(list(c.weight)) for c in program.cones]
    factors = [(keys(f.monomials), keys(list(f.factor))) for f in program.free]
    doubles = (2 * b for b, c in zip(bases, program.cones, strict=True) if c.plain)
    seen = np.unique(np.concatenate([keys(support), *doubles,
                                     *(w for w, c in zip(weights, program.cones, strict=True) if not c.plain),
                                     *(h for _, h in factors)]))  # fmt: skip
    while True:
        blocks = [_blocks(b, w, seen, chordal) for b, w in zip(bases, weights, strict=True)]
        kept: list[np.ndarray] = [np.asarray(np.isin(m[:, None] + h, seen).any(axis=1)) for m, h in factors]
        grown = [(b[group][:, None, None] + b[group][None, :, None] + w).ravel()
                 for b, w, several in zip(bases, weights, blocks, strict=True) for group in several]  # fmt: skip
        grown += [(m[k][:, None] + h).ravel() for (m, h), k in zip(factors, kept, strict=True)]
        wider = np.unique(np.concatenate([seen, *grown]))
        if len(wider) == len(seen):
            break
        seen = wider
    cones = (replace(c, basis=tuple(c.basis[i] for i in group))
             for c, several in zip(program.cones, blocks, strict=True) for group in several)  # fmt: skip
    free = (replace(f, monomials=tuple(m for m, k in zip(f.monomials, some.tolist(), strict=True) if k))
            for f, some in zip(program.free, kept, strict=True))  # fmt: skip
    return Program(tuple(cones), tuple(f for f in free if f.monomials))


def _blocks(basis_N: np.ndarray, weight: np.ndarray, seen: np.ndarray, chordal: bool) -> list[list[int]]:
    """The groups of monomials whose products, times the weight, meet what is seen."""
    near = np.zeros((len(basis_N),) * 2, dtype=bool)
    for i in range(len(basis_N)):
        near[i] = np.isin((basis_N[i] + basis_N)[:, None] + weight, seen).any(axis=1)
    np.fill_diagonal(near, False)
    if chordal:
        return _cliques([set(np.flatnonzero(row).tolist()) for row in near])
    found, left = [], np.ones(len(near), dtype=bool)
    while left.any():
        group = np.zeros(len(near), dtype=bool)
        edge = np.arange(len(near)) == np.flatnonzero(left)[0]
        while edge.any():
            group |= edge
            edge = near[edge].any(axis=0) & ~group
        left &= ~group
        found.append(np.flatnonzero(group).tolist())
    return found


def _cliques(near: list[set[int]]) -> list[list[int]]:
    """The maximal cliques of a chordal graph that holds this one: vertices of least degree go first."""
    graph = [set(n) for n in near]
    left, found = set(range(len(near))), []
    while left:
        i = min(left, key=lambda v: (len(graph[v]), v))
        clique = {i} | graph[i]
        if not any(clique <= other for other in found):
            found.append(clique)
        for j in graph[i]:
            graph[j] |= graph[i] - {j}
            graph[j].discard(i)
        left.discard(i)
    return [sorted(clique) for clique in found]


def _single(terms: Mapping[Exponents, Fraction]) -> bool:
    return len(terms) == 1 and next(iter(terms.values())) == 1


def _add(left: Exponents, right: Exponents) -> Exponents:
    return tuple(map(int.__add__, left, right))
