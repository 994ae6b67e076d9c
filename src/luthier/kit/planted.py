"""Polynomials made backwards: a monomial basis z and a positive semidefinite Q first, then p = z'Qz.

Paper: arXiv 2510.13444 (Neural Sum-of-Squares). The samplers and their numbers are those of the published
configurations: bases `sparse_uniform` and `clique`, matrices `dense`, `sparse`, `lowrank` and `block`.

Where this departs from what is published: there Q is a float and p's coefficients are rounded to 5 digits, so
that p is near its squares, but need not be a sum of squares itself. Here the factor G of Q = GG' is rounded to
`digits` decimals and everything after that is done in whole numbers: p is the planted sum of squares, exactly.

Coercive polynomials (1 and every x_i^half in the basis) are ours: Newton's polytope and diagonal consistency
remove nothing from them, so that finding the basis takes more than exact reduction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from luthier.errors import unknown
from luthier.kit.polynomial import Exponents, Polynomial, canonical

Structure = Literal["dense", "sparse", "lowrank", "block"]
STRUCTURES: tuple[Structure, ...] = ("dense", "sparse", "lowrank", "block")


@dataclass(frozen=True, kw_only=True)
class Planting:
    """What is drawn. half: the largest degree of a basis monomial, half of p's; size: how many, about."""

    n: int
    half: int
    size: int
    basis: Literal["sparse_uniform", "clique"] = "sparse_uniform"
    matrix: Structure = "dense"
    coercive: bool = False
    """1 and every x_i^half are in the basis, before anything is drawn"""
    least: int = 1
    """smallest degree of what sparse_uniform draws; at 0 the constant is put in with probability `constant`"""
    constant: float = 0.5
    scale: float = 0.5
    """deviation of the entries of G (dense, sparse, block)"""
    density: tuple[float, float] = (0.05, 0.1)
    """of G (sparse), drawn uniformly between the two"""
    rank: tuple[int, int] = (1, 5)
    """of Q (lowrank), both included; eigenvalues are uniform between 0 and 1"""
    block: int = 10
    """largest block (block)"""
    cliques: tuple[int, int] = (5, 8)
    """how many (clique)"""
    clique_size: tuple[int, int] = (1, 3)
    """variables of one"""
    clique_degree: int = 8
    """largest degree inside one; `half` limits it, too"""
    per_clique: int = 5
    """monomials drawn from one"""
    digits: int = 3
    """decimals of G"""


@dataclass(frozen=True)
class Planted:
    """p = z'GG'z / 10^(2 digits). basis: z as rows; factor: G in whole numbers; terms: p's exponents as rows,
    with their whole-numbered coefficients."""

    basis: np.ndarray
    factor: np.ndarray
    terms: np.ndarray
    coefficients: np.ndarray
    digits: int

    @property
    def polynomial(self) -> Polynomial:
        """Exact. A variable that occurs in no term is left out, so `hidden` may have fewer columns."""
        unit = 10 ** (2 * self.digits)
        named = [f"x{i + 1}" for i in range(self.terms.shape[1])]
        rows = zip(self.terms.tolist(), self.coefficients.tolist(), strict=True)
        return canonical(named, {tuple(e): Fraction(c, unit) for e, c in rows})

    @property
    def hidden(self) -> list[Exponents]:
        """The planted basis over the variables of `polynomial`."""
        used = self.terms.any(axis=0)
        return [tuple(row) for row in self.basis[:, used].tolist()]


def generator(*key: int) -> np.random.Generator:
    """The stream of random numbers of a key."""
    return np.random.default_rng(key)


def plant(what: Planting, rng: np.random.Generator) -> Planted:
    """One polynomial. Monomials whose row of G is zero are no part of its basis."""
    forced = _pure(what) if what.coercive else []
    drawn = _cliques(what, rng) if what.basis == "clique" else _uniform(what, rng, forced)
    basis = np.array([*dict.fromkeys([*forced, *drawn])], dtype=np.int64).reshape(-1, what.n)
    factor = np.rint(_factor(what, len(basis), rng) * 10**what.digits).astype(np.int64)
    for i in range(len(forced)):
        if not factor[i].any():  # else the polynomial would not be coercive
            factor[i, i % factor.shape[1]] = round(what.scale * 10**what.digits)
    alive = factor.any(axis=1)
    if not alive.any():
        alive[0], factor[0, 0] = True, 10**what.digits
    basis, factor = basis[alive], factor[alive]
    terms, coefficients = multiplied(basis, factor @ factor.T)
    return Planted(basis, factor, terms, coefficients, what.digits)


def multiplied(basis: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exponents and coefficients of z'Qz, those that vanish left out."""
    width = basis.shape[1]
    pairs = (basis[:, None] + basis[None]).reshape(-1, width)
    terms, place = np.unique(pairs, axis=0, return_inverse=True)
    sums = np.zeros(len(terms), dtype=np.int64)
    np.add.at(sums, place.reshape(-1), matrix.reshape(-1))
    return terms[sums != 0], sums[sums != 0]


def _pure(what: Planting) -> list[Exponents]:
    return [(0,) * what.n, *(tuple(what.half * (i == j) for j in range(what.n)) for i in range(what.n))]


def _uniform(what: Planting, rng: np.random.Generator, forced: list[Exponents]) -> list[Exponents]:
    """Degrees in proportion to how many monomials have them, exponents by throwing balls into bins. The size is
    uniform within 2 sqrt(size) of the size; it counts the forced ones, and never exceeds what there is."""
    spread = 2 * math.sqrt(what.size)
    target = int(rng.integers(max(1, int(what.size - spread)), int(what.size + spread) + 1))
    found: dict[Exponents, None] = dict.fromkeys(forced)
    if what.least == 0 and rng.random() < what.constant:
        found[(0,) * what.n] = None
    degrees = np.arange(max(1, what.least), what.half + 1)
    weights = np.array([math.comb(what.n + d - 1, int(d)) for d in degrees], dtype=float)
    most = int(weights.sum()) + ((0,) * what.n in found)
    while len(found) < min(target, most):
        degree = int(rng.choice(degrees, p=weights / weights.sum()))
        found[tuple(rng.multinomial(degree, [1 / what.n] * what.n).tolist())] = None
    return list(found)


def _cliques(what: Planting, rng: np.random.Generator) -> list[Exponents]:
    """Monomials over a few variables each; the constant with probability 0.8."""
    found: dict[Exponents, None] = {}
    degree = min(what.half, what.clique_degree)
    for _ in range(int(rng.integers(what.cliques[0], what.cliques[1] + 1))):
        width = min(what.n, int(rng.integers(what.clique_size[0], what.clique_size[1] + 1)))
        places = rng.choice(what.n, size=width, replace=False)
        inside = [a for a in np.ndindex(*[degree + 1] * width) if 0 < sum(a) <= degree]
        for i in rng.choice(len(inside), size=min(what.per_clique, len(inside)), replace=False):
            wide = np.zeros(what.n, dtype=np.int64)
            wide[places] = inside[i]
            found[tuple(wide.tolist())] = None
    if rng.random() < 0.8:
        found[(0,) * what.n] = None
    return list(found)


def _factor(what: Planting, size: int, rng: np.random.Generator) -> np.ndarray:
    """G, so that Q = GG' has the structure."""
    if what.matrix == "lowrank":
        low, high = (min(r, size) for r in what.rank)
        rank = int(rng.integers(low, high + 1))
        columns, _ = np.linalg.qr(rng.standard_normal((size, rank)))
        return columns * np.sqrt(rng.uniform(0, 1, rank))
    factor = rng.standard_normal((size, size)) * what.scale
    if what.matrix == "sparse":
        return factor * (rng.random((size, size)) <= rng.uniform(*what.density))
    if what.matrix == "block":
        mask, start = np.zeros((size, size)), 0
        while start < size:
            wide = int(rng.integers(1, min(what.block, size - start) + 1))
            mask[start : start + wide, start : start + wide] = 1
            start += wide
        return factor * mask
    return factor


def published() -> list[Planting]:
    """The published grid, one data set each; n=6 with 40 monomials up to degree 20 stands in the results alone."""
    degrees = [(8, half, size) for half in range(2, 11) for size in (10, 20, 30)]
    shapes = [*((n, 6, 30) for n in range(4, 21, 2)), *degrees, (6, 10, 60), (6, 20, 40)]
    grid = [Planting(n=n, half=h, size=m, matrix=s) for n, h, m in dict.fromkeys(shapes) for s in STRUCTURES]
    return [*grid, Planting(n=100, half=5, size=20, matrix="block")]


def task(name: str) -> Planting:
    """A setting of the published grid by its name, as n8-d6-m20-sparse; ending in -clique with the other sampler.

    d is p's degree, m the size of the basis.  Raises LuthierError for a name that is none.
    """
    plain, clique = name.removesuffix("-clique"), name.endswith("-clique")
    named = {f"n{w.n}-d{2 * w.half}-m{w.size}-{w.matrix}": w for w in published()}
    if plain not in named:
        raise unknown("setting of the published grid", name, named)
    return replace(named[plain], basis="clique") if clique else named[plain]
