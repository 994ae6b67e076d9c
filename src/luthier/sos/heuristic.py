"""Rules of thumb: guesses the monomials of the squares without training, and falls back on all that may occur.

Paper: arXiv 2510.13444 (greedy repair and growing bases); the rules are those of a fork of its code.

Two rules guess a basis: the monomials whose squares are monomials of p, and the even vertices of Newton's
polytope with greedy repair (`kit.rules`). The smaller guess is asked first, then the larger, then more and more
of the ranked candidates, at last all that iterated diagonal consistency leaves, found without a hull also where
there are 100 variables (`kit.lattice`). Every guess is a semidefinite program of its own and may fail; only the
last can prove that p is no sum of squares, so no verdict depends on a guess. At worst the programs take 1.72
times what the last alone takes, if cost grows with the third power of the basis (`kit.staged`).

Footguns. Nothing is gained where exact reduction alone leaves few monomials: `sos.certify` then is as fast.
Constraints are not looked at, and p is not multiplied by anything: nonnegative polynomials that are no sums of
squares are `not_sos`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from luthier.fields import Count, Positive, Range
from luthier.flows import Certificate, Ctx
from luthier.kit import lattice, proof, rules, staged
from luthier.kit.attempts import Settings
from luthier.shapes import Certify, Reduces


class Heuristic(Certify):
    """Weighted squares in fractions over few monomials, or a proof that there are none."""

    rules: Literal["both", "doubled", "corners"] = "both"
    """doubled: monomials whose squares occur in p; corners: even vertices of Newton's polytope, repaired"""
    rho: Annotated[float, Range(1.1, 4.0)] = 1.5
    """factor between the sizes of bases that are asked one after another"""
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

    def certify(self, problem: Any, ctx: Ctx) -> Certificate:
        asked, settled = proof.opened(problem)
        if settled:
            return settled
        p = asked.polynomial
        settings = Settings(self.bits, self.tolerance, self.largest, self.seconds, self.faces)
        complete = lattice.possible(p)
        if complete is None:  # then the corners, which need no candidates, are all there is
            return proof.over(p, rules.corners(p), settings, ctx, complete=False)
        openings = rules.guesses(p, complete, self.rules)
        return staged.staged(p, openings, lambda: rules.ranked(p, complete), complete, self.rho,
                             lambda basis, last: proof.over(p, basis, settings, ctx, complete=last))  # fmt: skip
