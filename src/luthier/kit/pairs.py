"""Squares of at most two monomials each: asked for alone, or as a cheap first try before a large semidefinite program.

Paper: arXiv 1706.02586; the programs are `kit.diagonal`'s. Over a block of 35, 56 and 84 monomials one takes about
a tenth, a thirtieth and a sixtieth of the semidefinite program's time (`benchmarks/sos.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.flows import Certificate, Ctx
from luthier.kit import attempts, balance, diagonal, gram, moments, proof
from luthier.kit.cones import Program, cone, split
from luthier.kit.polynomial import Exponents, Polynomial, Terms
from luthier.kit.problem import Problem

LEAST, MOST = 30, 300
"""Monomials of the largest block: below, a semidefinite program is quick; above, this one is not."""


def solved(
    target: Terms, program: Program, kind: diagonal.Kind, settings: attempts.Settings, ctx: Ctx
) -> tuple[attempts.Attempt, moments.Solved]:
    """The target as a sum over the program's cones, and what the solver found. kind: dsos or sdsos."""
    unit = balance.unit_of(target)
    floats = {m: float(c / unit) for m, c in target.items()}
    found = diagonal.solve(program, floats, kind, settings.tolerance, settings.seconds)
    made = attempts.Attempt(tried=[
        f"Clarabel, {kind}: {found.status} in {found.iterations} iterations, margin {found.optimum:.2g}"
    ])  # fmt: skip
    if found.finite and found.optimum > -attempts.NEAR:
        attempts.rounded(made, program, target, found, unit, settings, ctx)
    return made, found


def first(
    p: Polynomial, basis: Sequence[Exponents], kind: diagonal.Kind, settings: attempts.Settings, ctx: Ctx
) -> tuple[Certificate | None, tuple[str, ...]]:
    """A proof over these monomials, if a block is large and squares of two give one; and what was tried."""
    if len(basis) < LEAST:
        return None, ()
    program = split(Program((cone(basis),)), p.support)
    if not LEAST <= program.largest <= MOST or any(m not in program.monomials for m in p.support):
        return None, ()
    made, _ = solved(dict(p.terms), program, kind, settings, ctx)
    if made.squares is None:
        return None, tuple(made.tried)
    numbers = {"all": gram.everything(p), "basis": len(basis), "blocks": len(program.cones), "block": program.largest}
    return proof.summed(Problem(p), made, basis, numbers | made.numbers), ()
