"""Certify: proves that a polynomial is a sum of squares, or nonnegative, or that it is not, in exact fractions.

Paper: none (Parrilo 2000; Lasserre 2001; rounding by Peyrl and Parrilo, Theoretical Computer Science 409, 2008).

p is a sum of squares if and only if p = b'Qb for a positive semidefinite Q over the monomials b that a
square may hold. Which those are is narrowed exactly first (`kit.gram`), and they fall into blocks, sign
symmetries among them (`kit.cones`). Over a large block squares of two monomials are tried first, as `sos.dsos`
does, at a small part of the cost (`kit.pairs`); then Clarabel finds the Q of the largest margin, the distance of its
least eigenvalue from 0; Q is rounded and moved onto p's coefficients in fractions; an exact factorisation
gives the squares. A Q on the boundary has no room for that. Where part of every Q is known and singular the face that
holds it is found in fractions, before the solver is asked (`kit.minors`); else the question is asked again over the
face that the solver's answer shows (`kit.faces`), then over fewer monomials, guessed by rule (`kit.rules`), and if
that does not help, squares that the text shows are taken as they are.
Where there is no Q, the dual gives a functional that proves it, or a point where p is negative is found; a
nonnegative p without squares may have some after multiplication. Every verdict with a proof is checked by
`luthier.verifier`, which shares no code with this, before it is given.

Statuses: `exact` and `not_sos` are proven; `numeric` is true as far as floats can tell; `unknown` says what
was tried. With constraints p >= 0 is claimed where these hold, by Putinar's form (`kit.putinar`); with
ask=bound the largest t with p >= t is looked for, and the exact bound lies at it or just below.

Footguns. Not being a sum of squares does not mean being negative somewhere: Motzkin's polynomial is
nonnegative, and `exact` with a multiplier. Numbers are read as the decimals they are written as: 0.333 is
not 1/3. Squares with irrational numbers only (Scheiderer) stay `numeric`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from luthier.errors import LuthierError
from luthier.fields import Count, Positive, Range
from luthier.flows import Certificate, Ctx
from luthier.kit import bounds, gram, lattice, pairs, proof, putinar, rules
from luthier.kit.attempts import NEAR, Settings
from luthier.kit.criteria import visible
from luthier.kit.polynomial import Exponents, Polynomial
from luthier.kit.problem import problem as read
from luthier.shapes import Certify, Reduces


class SumOfSquares(Certify):
    """Weighted squares in fractions that add up to the problem, or a proof that there are none."""

    ask: Literal["nonnegative", "bound"] = "nonnegative"
    """whether p >= 0, or the largest t so that p >= t"""
    basis: Literal["consistent", "newton", "full"] = "consistent"
    """monomials of the squares: what diagonal consistency leaves, half the Newton polytope, all of half the degree"""
    first: Literal["sdsos", "dsos", "none"] = "sdsos"
    """before the program over a block of 30 monomials or more, one for squares of two monomials (see sos.dsos)"""
    rules: bool = True
    """where all monomials that may occur leave no room for rounding, fewer are asked, guessed as sos.heuristic does"""
    multipliers: Annotated[int, Range(0, 6)] = 2
    """largest r of (1 + |x|^2)^r, or |x|^2r for a form, that p is multiplied by if it is no sum of squares itself"""
    degree: Annotated[int, Range(2, 64)] | None = None
    """even degree of Putinar's form; null starts at the least that fits and goes up by `steps`"""
    steps: Annotated[int, Range(0, 10)] = 2
    """how often the degree is raised by 2, where there are constraints"""
    products: bool = False
    """products of two constraints have squares, too"""
    chordal: bool = False
    """smaller blocks, over which a sum of squares may be lost; nothing is then proven not to be one"""
    symmetry: bool = True
    """where variables may be exchanged, the solver is given one block of each kind"""
    faces: bool = True
    """where there is no room for rounding, ask over the face that holds all squares"""
    bits: Annotated[int, Range(0, 200)] = 40
    """Gram entries are rounded to multiples of 2^-bits of the largest coefficient; coarser grids are tried first"""
    tolerance: Annotated[float, Range(1e-14, 1e-2)] = 1e-8
    """of the solver; a proof does not depend on it"""
    largest: Count = 100
    """most monomials of one block: the solver's memory grows with their fourth power"""
    seconds: Positive | None = None
    """time the solver may take for each program; null means no limit"""

    reduces_to = Reduces({}, "completing the square", given={"degree": 2})

    def check(self) -> None:
        if self.degree is not None and self.degree % 2:
            raise LuthierError(f"the degree {self.degree} is odd", where=self.id, do="give an even one")

    def certify(self, problem: Any, ctx: Ctx) -> Certificate:
        asked = read(problem)
        reach = self.degree, 0 if self.degree else self.steps, self.products
        if self.ask == "bound" and (asked.constrained or not asked.polynomial.is_form):  # of a form it is 0 or none
            return bounds.lowest(asked, self._settings(), ctx, *reach, self.multipliers)
        if asked.constrained:
            return putinar.nonnegative(asked, self._settings(), ctx, *reach)
        p = asked.polynomial
        if not p.terms:
            return proof.nothing(asked)
        basis = lattice.basis(p, self.basis)
        if basis is None:
            made = proof.undecided(asked, f"more than {gram.MOST} monomials to choose a basis from", {})
        else:
            made = self._over(p, basis, ctx)
        unproven = made.status in ("numeric", "unknown")
        if unproven and self.rules and made.numbers.get("margin", 0.0) > -NEAR:  # else fewer have none, either
            made = self._guessed(p, basis, made, ctx)
            unproven = made.status in ("numeric", "unknown")
        seen = visible(problem, p) if unproven and isinstance(problem, str) else None
        if seen:
            return proof.given(asked, "exact", f"the {len(seen)} squares as they are written", squares=seen,
                               basis=basis or (), numbers=made.numbers, tried=made.tried)  # fmt: skip
        if made.status == "not_sos" and made.functional and p.variables:
            return putinar.multiplied(asked, made, self._settings(), ctx, self.multipliers)
        return made

    def _over(self, p: Polynomial, basis: list[Exponents], ctx: Ctx) -> Certificate:
        """The verdict over all monomials that squares may hold: by squares of two if that is cheaper, or by any."""
        early, tried = None, ()
        if self.first != "none":
            early, tried = pairs.first(p, basis, self.first, self._settings(), ctx)
        made = early or proof.over(p, basis, self._settings(), ctx, complete=True)
        return dataclasses.replace(made, tried=(*tried, *made.tried))

    def _guessed(self, p: Polynomial, basis: list[Exponents] | None, made: Certificate, ctx: Ctx) -> Certificate:
        """A proof over fewer monomials, guessed by rules of thumb, or a point that was found on the way; else what was
        said before."""
        openings = [rules.corners(p)] if basis is None else rules.guesses(p, basis)
        tried: list[str] = []
        for guess in sorted({tuple(sorted(b)): b for b in openings}.values(), key=len):
            if not guess or (basis and len(guess) >= len(basis)) or rules.uncovered(p, guess):
                continue
            found = proof.over(p, guess, self._settings(), ctx, complete=False)
            if found.status in ("exact", "not_sos"):
                return dataclasses.replace(found, tried=(*made.tried, *tried, *found.tried))
            tried += [f"over {len(guess)} monomials: {line}" for line in (found.reason, *found.tried)]
        return dataclasses.replace(made, tried=(*made.tried, *tried))

    def _settings(self) -> Settings:
        return Settings(
            bits=self.bits, tolerance=self.tolerance, largest=self.largest, seconds=self.seconds, faces=self.faces,
            chordal=self.chordal, symmetry=self.symmetry,
        )  # fmt: skip
