"""Random polynomials of known kinds: what is proven is true, and what must be found is found.

    inside      z'(GG' + I)z over all monomials of half the degree, whole numbers: strictly feasible, must be proven
    wide        the same with z scaled by powers of 10, so that coefficients reach from 1 to 1e12
    planted     z'GG'z of the published samplers, any rank: a sum of squares, which may lie on the boundary
    below       a planted one less its value at a point, and 1: negative there
    negative    an `inside` one less 1 more than its value at a random point of halves
    random      random terms and signs: nothing is known beforehand

Mistakes, of which there must be none: a proof that `verify` refuses after JSON, or that is about another polynomial; a
sum of squares called `not_sos`; a polynomial with a known negative value called `exact`; an `inside` one without proof.
"""

from __future__ import annotations

import collections
from fractions import Fraction
from typing import Any

import numpy as np

from luthier.certificate import Certificate
from luthier.kit import gram
from luthier.kit.context import Context
from luthier.kit.planted import STRUCTURES, Planting, generator, plant
from luthier.kit.polynomial import Exponents, Polynomial, polynomial
from luthier.sos.certify import SumOfSquares

KINDS = ("inside", "wide", "planted", "below", "negative", "random")
SHAPES = ((1, 2), (1, 4), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (4, 2))
"""variables and half the degree"""
SUMS, BELOW = ("inside", "wide", "planted"), ("below", "negative")


def drawn(number: int) -> tuple[str, Polynomial, list[Fraction]]:
    """(kind, polynomial, a point where it is negative if the kind says so), of this number alone."""
    rng = generator(number)
    kind = KINDS[number % len(KINDS)]
    n, half = SHAPES[int(rng.integers(len(SHAPES)))]
    point = [Fraction(int(x), 2) for x in rng.integers(-4, 5, n)]
    if kind in ("planted", "below"):
        what = Planting(
            n=n, half=half, size=int(rng.integers(2, 9)), matrix=STRUCTURES[int(rng.integers(4))],
            coercive=bool(rng.integers(2)), digits=int(rng.integers(1, 4)),
        )  # fmt: skip
        made = plant(what, rng)
        terms = dict(zip(map(tuple, made.terms.tolist()), made.coefficients.tolist(), strict=True))
    elif kind == "random":
        every = list(gram.up_to(n, 2 * half))
        chosen = rng.choice(len(every), size=min(len(every), int(rng.integers(1, 9))), replace=False)
        terms = {every[i]: Fraction(int(rng.integers(-9, 10)), int(rng.integers(1, 4))) for i in chosen}
    else:
        terms = inside(n, half, 6 if kind == "wide" else 0, rng)
    if kind in BELOW:
        value = sum((c * power(point, e) for e, c in terms.items()), Fraction(0))
        terms = {**terms, (0,) * n: terms.get((0,) * n, 0) - value - 1}
    return kind, polynomial({e: Fraction(c) for e, c in terms.items()}), point


def inside(n: int, half: int, places: int, rng: np.random.Generator) -> dict[Exponents, Any]:
    """z'D(GG' + I)Dz for all monomials z of at most this degree, G of whole numbers, D of powers of 10."""
    basis = list(gram.up_to(n, half))
    factor = rng.integers(-5, 6, (len(basis), len(basis))).astype(object)
    scale = [10 ** int(k) for k in rng.integers(0, places + 1, len(basis))]
    matrix = factor @ factor.T + np.eye(len(basis), dtype=int)
    terms: dict[Exponents, Any] = {}
    for i, a in enumerate(basis):
        for j, b in enumerate(basis):
            key = tuple(map(int.__add__, a, b))
            terms[key] = terms.get(key, 0) + int(matrix[i, j]) * scale[i] * scale[j]
    return terms


def power(point: list[Fraction], exponents: Exponents) -> Fraction:
    value = Fraction(1)
    for x, e in zip(point, exponents, strict=True):
        value *= x**e
    return value


def mistake(kind: str, p: Polynomial, made: Certificate) -> str:
    """What is wrong with the certificate of a polynomial of this kind; empty if nothing is."""
    again = Certificate.from_json(made.to_json())
    if made.status in ("exact", "not_sos") and again.refusal():
        return f"refused: {again.refusal()}"
    if {e: Fraction(c) for e, c in again.polynomial} != dict(p.terms):
        return "it is about another polynomial"
    if kind in SUMS and made.status == "not_sos":
        return "a sum of squares is called none"
    if kind in BELOW and made.status == "exact":
        return "a polynomial that is negative somewhere is called nonnegative"
    return "strictly feasible, but not proven" if kind == "inside" and made.status != "exact" else ""


def many(count: int, first: int = 0) -> dict[str, Any]:
    """The verdicts by kind, and every mistake."""
    said: dict[str, collections.Counter] = {kind: collections.Counter() for kind in KINDS}
    wrong = []
    for number in range(first, first + count):
        kind, p, _ = drawn(number)
        made = SumOfSquares().certify(p, Context())  # type: ignore[arg-type]
        said[kind][made.status] += 1
        if fault := mistake(kind, p, made):
            wrong.append(f"{number}: {kind}: {fault}: {p}")
    table = {kind: dict(sorted(counts.items())) for kind, counts in said.items()}
    told = "; ".join(f"{kind} {', '.join(f'{n} {v}' for v, n in counts.items())}" for kind, counts in table.items())
    return {"said": f"{count} random polynomials, {len(wrong)} mistakes: {told}.", "verdicts": table, "mistakes": wrong}
