"""Certify: proves that a polynomial is a sum of squares, or that it is none, in exact fractions.

Paper: none (Parrilo 2000; rounding by Peyrl and Parrilo, Theoretical Computer Science 409, 2008).

p is a sum of squares if and only if p = b'Qb for a positive semidefinite Q over the monomials b that a
square may hold. Which those are is narrowed exactly first (`kit.gram`); then Clarabel finds the Q of the
largest margin, the distance of its least eigenvalue from 0; Q is rounded and moved onto p's coefficients
in fractions; an exact factorisation gives the squares. Where there is no Q, the dual gives a functional
that proves it, or a point where p is negative is found. Every verdict with a proof is checked by
`luthier.verifier`, which shares no code with this, before it is given.

Statuses: `exact` and `not_sos` are proven; `numeric` is a sum of squares as far as floats can tell;
`unknown` says what was tried. A polynomial without a positive definite Q over the basis (margin 0) often
stays `numeric`: the larger the basis, the more often. Reducing it is thus not for speed alone.

Footguns. Not being a sum of squares does not mean being negative somewhere: Motzkin's polynomial is
nonnegative. Numbers are read as the decimals they are written as: 0.333 is not 1/3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Annotated, Any, Literal

import numpy as np

from luthier.fields import Count, Positive, Range
from luthier.flows import Certificate, Ctx
from luthier.kit import exact, gram, moments
from luthier.kit.polynomial import Exponents, Polynomial, polynomial, written
from luthier.shapes import Certify, Reduces

NEAR = 1e-6
"""A margin closer to 0, in units of p's largest coefficient, says nothing of its sign."""
GRIDS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 26, 32)
"""Coarse grids first: a proof with small numbers, and one that meets numbers which must be met exactly."""
Numbers = dict[str, float]


class SumOfSquares(Certify):
    """Weighted squares in fractions that add up to the problem, or a proof that there are none."""

    basis: Literal["consistent", "newton", "full"] = "consistent"
    """monomials of the squares: what diagonal consistency leaves, half the Newton polytope, all of half the degree"""
    bits: Annotated[int, Range(0, 200)] = 40
    """Gram entries are rounded to multiples of 2^-bits of the largest coefficient; coarser grids are tried first"""
    tolerance: Annotated[float, Range(1e-14, 1e-2)] = 1e-8
    """of the solver; a proof does not depend on it"""
    largest: Count = 100
    """most monomials the solver is given: its memory grows with their fourth power"""
    seconds: Positive | None = None
    """time the solver may take; null means no limit"""

    reduces_to = Reduces({}, "completing the square", given={"degree": 2})

    def certify(self, problem: Any, ctx: Ctx) -> Certificate:
        p = polynomial(problem)
        if not p.terms:
            return _given(p, "exact", "the zero polynomial is the sum of no squares", numbers={})
        basis = self._basis(p)
        if basis is None:
            return _undecided(p, f"more than {gram.MOST} monomials to choose a basis from", {})
        numbers: Numbers = {"all": gram.everything(p), "basis": len(basis)}
        if len(basis) > self.largest:
            return _undecided(p, f"a basis of {len(basis)} monomials, largest={self.largest} are allowed", numbers)
        products = gram.products(basis)
        numbers["products"] = len(products)
        alone = next((m for m in p.support if m not in products), None)
        if alone is not None:
            why = f"{written(p.variables, [(alone, 1)])} is no product of two monomials that its squares may hold"
            return _refuted(p, why, basis, {alone: -dict(p.terms)[alone]}, numbers)
        return self._solved(p, basis, products, numbers, ctx)

    def _basis(self, p: Polynomial) -> list[Exponents] | None:
        if self.basis == "full":
            return gram.full(p)
        candidates = gram.box(p)
        narrow = {"newton": gram.newton, "consistent": gram.consistent}[self.basis]
        return None if candidates is None else narrow(p, candidates)

    def _solved(
        self, p: Polynomial, basis: list[Exponents], products: gram.Products, numbers: Numbers, ctx: Ctx
    ) -> Certificate:
        """The verdict by the semidefinite program: a rounded Gram matrix, or a functional that excludes one."""
        unit = _unit(p)
        target = {m: float(c / unit) for m, c in p.terms}
        found = moments.separate(products, len(basis), target, self.tolerance, self.seconds)
        tried = [f"Clarabel: {found.status} in {found.iterations} iterations, margin {found.margin:.2g}"]
        if not np.isfinite(found.gram).all():
            return _undecided(p, "the solver gave no numbers", numbers, tried)
        numbers = numbers | {"margin": float(f"{found.margin:.3g}"), "residual": float(f"{found.residual:.3g}")}
        side = int(found.margin / NEAR)
        if side >= 0:
            for bits in ctx.progress(sorted({min(b, self.bits) for b in (*GRIDS, self.bits)}), what="rounding"):
                matrix = exact.gram_matrix(found.gram, unit, bits, products, dict(p.terms))
                squares = exact.squares(matrix, basis)
                if squares is not None:
                    why = f"a sum of {len(squares)} squares over {len(basis)} of {numbers['all']} monomials"
                    return _given(p, "exact", why, squares, basis, numbers=numbers | {"bits": bits}, tried=tried)
            tried.append(f"rounding to multiples of 1 to 2^-{self.bits}: never positive semidefinite")
        if side <= 0:
            inside = moments.central(products, len(basis), self.tolerance)
            made = exact.functional(p, products, len(basis), found.moments, inside, self.bits)
            if made is not None:
                why = "a functional that is negative on no square is negative on it"
                return _refuted(p, why, basis, made, numbers, tried)
            tried.append("a functional that separates it from the squares: none in fractions")
        if side >= 0 and found.residual < NEAR:
            why = f"a sum of squares to {found.residual:.1g}, margin {found.margin:.2g}; no proof in fractions"
            return _given(p, "numeric", why, basis=basis, numbers=numbers, tried=tried)
        return _undecided(p, "neither squares nor a proof against them", numbers, tried)


def _unit(p: Polynomial) -> Fraction:
    """About the largest coefficient: a power of 2, over the common denominator so that grids meet it."""
    common = lcm(*(c.denominator for _, c in p.terms))
    largest = max(abs(c) * common for _, c in p.terms)
    return Fraction(1 << (int(largest) - 1).bit_length(), common)


def _refuted(
    p: Polynomial, why: str, basis: list[Exponents], functional: Mapping[Exponents, Fraction], numbers: Numbers,
    tried: Sequence[str] = (),
) -> Certificate:  # fmt: skip
    """Not a sum of squares: by a point, which says more, or by the functional."""
    terms = [(m, c) for m, c in functional.items() if c]
    return _negative(p, numbers, tried) or _given(
        p, "not_sos", why, basis=basis, functional=terms, numbers=numbers, tried=tried
    )


def _undecided(p: Polynomial, why: str, numbers: Numbers, tried: Sequence[str] = ()) -> Certificate:
    return _negative(p, numbers, tried) or _given(p, "unknown", why, numbers=numbers, tried=tried)


def _negative(p: Polynomial, numbers: Numbers, tried: Sequence[str]) -> Certificate | None:
    point = exact.negative_point(p)
    if not point:
        return None
    where = ", ".join(f"{v} = {x}" for v, x in zip(p.variables, point, strict=True))
    return _given(p, "not_sos", f"it is negative at {where}", point=point, numbers=numbers, tried=tried)


def _given(
    p: Polynomial, status: str, reason: str, squares: Sequence[exact.Square] = (), basis: Sequence[Exponents] = (), *,
    functional: Sequence[tuple[Exponents, Fraction]] = (), point: Sequence[Fraction] = (), numbers: Numbers,
    tried: Sequence[str] = (),
) -> Certificate:  # fmt: skip
    """The certificate as data, after the verifier has read it."""
    made = Certificate(
        status=status, reason=reason, variables=p.variables, polynomial=_plain(p.terms), basis=tuple(basis),
        squares=tuple((str(weight), _plain(terms)) for weight, terms in squares), functional=_plain(functional),
        point=tuple(map(str, point)), tried=tuple(tried), numbers=numbers,
    )  # fmt: skip
    refusal = made.refusal() if status in ("exact", "not_sos") else None
    return made if refusal is None else dataclasses.replace(
        made, status="unknown", reason=f"the verifier refuses the proof: {refusal}"
    )  # fmt: skip


def _plain(terms: Sequence[tuple[Exponents, Fraction]]) -> tuple[tuple[Exponents, str], ...]:
    return tuple((exponents, str(c)) for exponents, c in terms)
