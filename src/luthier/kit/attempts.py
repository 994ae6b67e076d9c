"""One program: squares and cofactors in fractions, or a functional against them, or what floats say.

Where no Gram matrix is positive definite, faces are taken until there is room: at once where minors are known
exactly (`kit.minors`), else one after another by what the solver found (`kit.faces`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from luthier.flows import Ctx
from luthier.kit import balance, exact, faces, minors, moments
from luthier.kit.cones import Program
from luthier.kit.orbits import folded
from luthier.kit.polynomial import Exponents, Terms

NEAR = 1e-6
"""A margin closer to 0, in units of p's largest coefficient, says nothing of its sign."""
GRIDS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 26, 32)
"""Coarse grids first: a proof with small numbers, and one that meets numbers which must be met exactly."""
CLOSE = 1e-12
"""The solver's tolerance where entries are to be met exactly."""
WORTH = 10
"""Blocks from this size on are looked at for symmetries."""
FACES = 8
"""taken one after another, at most"""
BOUNDARY = "its squares lie on a boundary that no small fractions describe, and may need irrational numbers"


@dataclass(frozen=True)
class Settings:
    """What the methods let a user choose; see their fields."""

    bits: int = 40
    tolerance: float = 1e-8
    largest: int = 100
    seconds: float | None = None
    faces: bool = True
    minors: bool = True
    """faces by known minors, where faces are taken at all"""
    chordal: bool = False
    symmetry: bool = True


@dataclass
class Attempt:
    """What came of one program. numeric: floats say yes.  tried: what was done, in order.

    squares: (the constraints they are multiplied by, (weight, terms) each); cofactors: (the equation, terms).
    """

    squares: list[tuple[tuple[int, ...], list[exact.Square]]] | None = None
    cofactors: list[tuple[int, Terms]] = field(default_factory=list)
    functional: dict[Exponents, Fraction] | None = None
    numeric: bool = False
    why: str = ""
    tried: list[str] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    moments: dict[Exponents, float] = field(default_factory=dict)


def smallest(target: Terms, program: Program, settings: Settings) -> Program | None:
    """The program over what minors that are known leave; None if it is the same, or if no faces are asked for."""
    return minors.face(program, target) if settings.faces and settings.minors else None


def attempt(target: Terms, program: Program, settings: Settings, ctx: Ctx, refute: bool) -> Attempt:
    """The target as a sum over the program's cones. refute: look for a functional that excludes it.

    The program, over monomials, reaches all of the target's.
    """
    return attempt_within(target, program, smallest(target, program, settings), settings, ctx, refute)


def attempt_within(
    target: Terms, program: Program, known: Program | None, settings: Settings, ctx: Ctx, refute: bool
) -> Attempt:
    """The same where it is known what `smallest` says of the program."""
    if known is None:
        return _in_units(target, program, settings, ctx, refute)
    made = _in_units(target, known, settings, ctx, refute=False)
    made.tried.insert(0, f"minors that are known leave {known.largest} of {program.largest} in the largest block")
    if made.squares is not None:
        made.numbers["faces"] = made.numbers.get("faces", 0.0) + 1
    if made.squares is not None or program.largest > settings.largest:
        return made
    whole = _in_units(target, program, settings, ctx, refute)
    whole.tried[:0] = made.tried
    return whole


def _in_units(target: Terms, program: Program, settings: Settings, ctx: Ctx, refute: bool) -> Attempt:
    """The search in units of each variable that bring the coefficients together, told in the given ones."""
    k = balance.units(target)
    if not any(k):
        return _search(target, program, settings, ctx, refute)
    made = _search(balance.scaled(target, k), balance.scaled_program(program, k), settings, ctx, refute)
    made.tried.append(f"(in units of 2^{list(k)})")
    made.moments = balance.floats_in_x(made.moments, k)
    if made.functional is not None:
        made.functional = balance.moments_in_x(made.functional, k)
    if made.squares is not None:
        made.squares = [(which, [(d, list(balance.scaled(dict(terms), k, -1).items())) for d, terms in several])
                        for which, several in made.squares]  # fmt: skip
        made.cofactors = [(j, balance.scaled(terms, k, -1)) for j, terms in made.cofactors]
    return made


def _search(target: Terms, program: Program, settings: Settings, ctx: Ctx, refute: bool) -> Attempt:
    """By the solver, over one face after another."""
    made = Attempt()
    unit = balance.unit_of(target)
    floats = {m: float(c / unit) for m, c in target.items()}
    first, now = program, program
    for face in range(FACES + 1):
        fold = folded(now, target) if settings.symmetry and now.largest >= WORTH else None
        found = moments.solve(now, floats, settings.tolerance, settings.seconds, fold=fold)
        where = f", face {face} of {now.largest} polynomials" if face else ""
        made.tried.append(
            f"Clarabel: {found.status} in {found.iterations} iterations, margin {found.optimum:.2g}{where}"
        )
        if not found.finite:
            made.tried.append("the solver gave no numbers")
            return made
        side = int(found.optimum / NEAR)
        if face == 0:
            made.numbers |= {"margin": float(f"{found.optimum:.3g}"), "residual": float(f"{found.residual:.3g}")}
            made.moments, start = found.moments, found
            if fold is not None:
                made.numbers |= {"orbits": fold.orbits, "part": max(len(part.bases_mNd) for part in fold.parts)}
            made.numeric = side >= 0 and found.residual < NEAR
            if side == 0 and settings.faces:
                made.why = f": {BOUNDARY}"
        if side >= 0 and rounded(made, now, target, found, unit, settings, ctx):
            made.numbers["faces"] = float(face)
            return made
        if face == 0 and side <= 0 and refute and not program.free:
            inside = moments.central(first, settings.tolerance)
            made.functional = exact.functional(target, first, found.moments, inside, settings.bits)
            if made.functional is not None:
                return made
            made.tried.append("a functional that separates it from the squares: none in fractions")
        smaller = faces.smaller(target, now, found) if side == 0 and settings.faces else None
        if smaller is None or any(m not in smaller.monomials for m in target):
            break
        now = smaller
    if made.numeric and not (side == 0 and settings.faces and _whole(made, program, target, settings, ctx)):
        _rescaled(made, program, target, start, settings, ctx)
    return made


def _whole(made: Attempt, program: Program, target: Terms, how: Settings, ctx: Ctx) -> bool:
    """Whether entries are multiples of what the coefficients are multiples of, as where decimals were squared.

    Where few Gram matrices are left, these are often the only one, and floats need to be near it.
    """
    unit = balance.unit_of(target)
    found = moments.solve(program, {m: float(c / unit) for m, c in target.items()}, CLOSE, how.seconds)
    made.tried.append(f"Clarabel, to {CLOSE:g}: {found.status}, margin {found.optimum:.2g}")
    common = int(unit * math.lcm(*(c.denominator for c in target.values()))).bit_length() - 1  # a power of 2
    return found.finite and rounded(made, program, target, found, unit, how, ctx, (common, common + 1))


def _rescaled(made: Attempt, program: Program, target: Terms, found: moments.Solved, how: Settings, ctx: Ctx) -> None:
    """Note the squares that are found with every monomial in units of what its squares weigh, if these differ."""
    again, unit = balance.by_squares(program, found.grams), balance.unit_of(target)
    if again is not None:
        solved = moments.solve(again, {m: float(c / unit) for m, c in target.items()}, CLOSE, how.seconds)
        made.tried.append(f"Clarabel, other units for each monomial: {solved.status}, margin {solved.optimum:.2g}")
        if solved.finite and solved.optimum > -NEAR:
            rounded(made, again, target, solved, unit, how, ctx)


def rounded(
    made: Attempt, program: Program, target: Terms, found: moments.Solved, unit: Fraction, settings: Settings, ctx: Ctx,
    only: Sequence[int] = (),
) -> bool:  # fmt: skip
    """Whether the floats round to squares, to multiples of unit / 2^bits; they are then noted. only: these bits."""
    rounding = exact.Rounding(program, target)
    grids = list(only) or sorted({min(b, settings.bits) for b in (*GRIDS, settings.bits)})
    if rounding.rest and not only:
        grids = grids[len(grids) // 2 :: 2]  # each needs a linear system
    for bits in ctx.progress(grids, what="rounding"):
        numbers = rounding.at(found.grams, found.cofactors, unit, bits)
        if numbers is None:
            made.tried.append("the coefficients' linear system has no solution in fractions, or too many unknowns")
            return False
        squares = [exact.squares(q, c.basis) for q, c in zip(numbers.grams, program.cones, strict=True)]
        if all(s is not None for s in squares):
            made.squares = [(c.which, s or []) for c, s in zip(program.cones, squares, strict=True)]
            made.cofactors = [(f.which, {m: c for m, c in zip(f.monomials, values, strict=True) if c})
                              for f, values in zip(program.free, numbers.cofactors, strict=True)]  # fmt: skip
            made.numbers["bits"] = bits
            return True
    what = "what the coefficients are multiples of" if only else f"1 to 2^-{settings.bits}"
    made.tried.append(f"rounding to multiples of {what}: never positive semidefinite")
    return False
