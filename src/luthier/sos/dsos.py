"""DSOS and SDSOS: sums of squares of at most two monomials each, by linear and second-order cone programs.

Paper: arXiv 1706.02586.

A polynomial is DSOS if it has a diagonally dominant Gram matrix Q, SDSOS if DQD is one for a positive diagonal
D; then Q is positive semidefinite, and the polynomial a sum of squares (`kit.diagonal`). Such a Q is found at a
small part of a semidefinite program's cost, if there is one: `dsos` < `sdsos` < all sums of squares. What is
found is rounded and factored in fractions, and is a certificate like any other; the rounded matrix need only be
positive semidefinite.

Footguns. `unknown` is no verdict: most sums of squares of longer polynomials are neither. `dsos` depends on
the scale of the variables, `sdsos` does not. `not_sos` is said only where it is proven: by a point, by a
monomial that no squares give, or by the program's functional, if it happens to be nonnegative on every square
and not only on those of two monomials. Where that fails no point is looked for, as it would cost more than all
the rest. Constraints are not looked at.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from luthier.fields import Count, Positive, Range
from luthier.flows import Certificate, Ctx
from luthier.kit import diagonal, exact, gram, lattice, pairs, proof
from luthier.kit.attempts import NEAR, Settings
from luthier.kit.cones import Program, cone, split
from luthier.kit.polynomial import Exponents
from luthier.kit.problem import Problem
from luthier.shapes import Certify, Reduces


class Diagonal(Certify):
    """Weighted squares in fractions that add up to the problem, where a diagonally dominant Gram matrix gives them."""

    cone: Literal["sdsos", "dsos"] = "sdsos"
    """scaled diagonally dominant Gram matrices, or diagonally dominant ones alone"""
    basis: Literal["consistent", "newton", "full"] = "consistent"
    """monomials of the squares: what diagonal consistency leaves, half the Newton polytope, all of half the degree"""
    bits: Annotated[int, Range(0, 200)] = 40
    """Gram entries are rounded to multiples of 2^-bits of the largest coefficient; coarser grids are tried first"""
    tolerance: Annotated[float, Range(1e-14, 1e-2)] = 1e-8
    """of the solver; a proof does not depend on it"""
    largest: Count = 300
    """most monomials the solver is given"""
    seconds: Positive | None = None
    """time the solver may take; null means no limit"""

    reduces_to = Reduces({}, "completing the square", given={"degree": 2})

    def certify(self, problem: Any, ctx: Ctx) -> Certificate:
        asked, settled = proof.opened(problem)
        if settled:
            return settled
        p = asked.polynomial
        basis = lattice.basis(p, self.basis)
        if basis is None:
            return proof.undecided(asked, "too many monomials to choose a basis from", {})
        numbers: dict[str, float] = {"all": gram.everything(p), "basis": len(basis)}
        if len(basis) > self.largest:
            why = f"a basis of {len(basis)} monomials, largest={self.largest} are allowed"
            return proof.undecided(asked, why, numbers)
        program = Program((cone(basis),)) if basis else Program(())
        alone = next((m for m in p.support if m not in program.monomials), None)
        if alone is not None:
            return proof.lonely(asked, alone, basis, numbers, complete=True)
        return self._solved(asked, basis, split(program, p.support), numbers, ctx)

    def _solved(
        self, asked: Problem, basis: list[Exponents], program: Program, numbers: dict[str, float], ctx: Ctx
    ) -> Certificate:
        """The verdict by the program over the blocks of the basis."""
        target = dict(asked.polynomial.terms)
        settings = Settings(bits=self.bits, tolerance=self.tolerance, seconds=self.seconds)
        made, found = pairs.solved(target, program, self.cone, settings, ctx)
        if not found.finite:
            return proof.undecided(asked, "the solver gave no numbers", numbers, made.tried)
        numbers = numbers | {
            "blocks": len(program.cones), "block": program.largest, "products": len(program.monomials),
            "margin": float(f"{found.optimum:.3g}"), "residual": float(f"{found.residual:.3g}"),
        }  # fmt: skip
        if made.squares is not None:
            return proof.summed(asked, made, basis, numbers | made.numbers)
        if found.optimum <= -NEAR:
            functional = exact.functional(target, program, found.moments, diagonal.spread(program), self.bits)
            if functional is not None:
                why = "a functional that is negative on no square is negative on it"
                return proof.refuted(asked, why, basis, functional, numbers, made.tried)
            made.tried.append("the program's functional: negative on a square of more than two monomials")
        why = f"no proof by {self.cone}, which many sums of squares are not"
        # no search for a point: this is cheap
        return proof.given(asked, "unknown", why, numbers=numbers, tried=made.tried)
