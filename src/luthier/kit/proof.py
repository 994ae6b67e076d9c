"""From a question to a certificate: is this polynomial a sum over these cones? In floats first, then in fractions.

    attempt    one program: squares and cofactors in fractions, or a functional against them, or what floats say
    given      the record, after the verifier, which shares no code with this, has read it
    over       both, for a polynomial and the monomials its squares may hold

Where a polynomial has no positive definite Gram matrix, faces are taken one after another (`kit.faces`) until
there is one, or until nothing changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from luthier.flows import Certificate, Ctx
from luthier.kit import balance, exact, faces, gram, moments
from luthier.kit.cones import Program, cone, reaches, split
from luthier.kit.descent import below_zero
from luthier.kit.orbits import folded
from luthier.kit.polynomial import Exponents, Polynomial, Terms, written
from luthier.kit.problem import Problem
from luthier.kit.problem import problem as read

NEAR = 1e-6
"""A margin closer to 0, in units of p's largest coefficient, says nothing of its sign."""
GRIDS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 26, 32)
"""Coarse grids first: a proof with small numbers, and one that meets numbers which must be met exactly."""
WORTH = 10
"""Blocks from this size on are looked at for symmetries."""
FACES = 8
"""taken one after another, at most"""
BOUNDARY = "its squares lie on a boundary that no small fractions describe, and may need irrational numbers"
Numbers = dict[str, float]
Plain = tuple[tuple[Exponents, str], ...]


@dataclass(frozen=True)
class Settings:
    """What the methods let a user choose; see their fields."""

    bits: int = 40
    tolerance: float = 1e-8
    largest: int = 100
    seconds: float | None = None
    faces: bool = True
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


def attempt(target: Terms, program: Program, settings: Settings, ctx: Ctx, refute: bool) -> Attempt:
    """The target as a sum over the program's cones. refute: look for a functional that excludes it.

    The program, over monomials, reaches all of the target's.
    """
    k = balance.units(target)
    if not any(k):
        return _attempt(target, program, settings, ctx, refute)
    made = _attempt(balance.scaled(target, k), balance.scaled_program(program, k), settings, ctx, refute)
    made.tried.append(f"(in units of 2^{list(k)})")
    made.moments = {m: value * 2.0 ** sum(map(int.__mul__, k, m)) for m, value in made.moments.items()}
    if made.functional is not None:
        made.functional = balance.moments_in_x(made.functional, k)
    if made.squares is not None:
        made.squares = [(which, [(d, list(balance.scaled(dict(terms), k, -1).items())) for d, terms in several])
                        for which, several in made.squares]  # fmt: skip
        made.cofactors = [(j, balance.scaled(terms, k, -1)) for j, terms in made.cofactors]
    return made


def _attempt(target: Terms, program: Program, settings: Settings, ctx: Ctx, refute: bool) -> Attempt:
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
    if made.numeric:
        _rescaled(made, program, target, start, settings, ctx)
    return made


def _rescaled(made: Attempt, program: Program, target: Terms, found: moments.Solved, how: Settings, ctx: Ctx) -> None:
    """Note the squares that are found with every monomial in units of what its squares weigh, if these differ."""
    again, unit = balance.by_squares(program, found.grams), balance.unit_of(target)
    if again is not None:
        solved = moments.solve(again, {m: float(c / unit) for m, c in target.items()}, how.tolerance, how.seconds)
        made.tried.append(f"Clarabel, other units for each monomial: {solved.status}, margin {solved.optimum:.2g}")
        if solved.finite and solved.optimum > -NEAR:
            rounded(made, again, target, solved, unit, how, ctx)


def rounded(
    made: Attempt, program: Program, target: Terms, found: moments.Solved, unit: Fraction, settings: Settings, ctx: Ctx
) -> bool:
    """Whether the floats round to squares; they are then noted."""
    rounding = exact.Rounding(program, target)
    grids = sorted({min(b, settings.bits) for b in (*GRIDS, settings.bits)})
    if rounding.rest:
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
    made.tried.append(f"rounding to multiples of 1 to 2^-{settings.bits}: never positive semidefinite")
    return False


def over(p: Polynomial, basis: Sequence[Exponents], settings: Settings, ctx: Ctx, complete: bool) -> Certificate:
    """Whether p is a sum of squares over these monomials.

    complete: the basis holds all that a square may have (`kit.gram.consistent`), so that a functional against
    squares over it proves `not_sos`; else that is `unknown`.
    """
    asked, target = Problem(p), dict(p.terms)
    numbers: dict[str, float] = {"all": gram.everything(p), "basis": len(basis)}
    alone = next((m for m in p.support if not reaches(basis, m)), None)
    if alone is not None:
        return lonely(asked, alone, basis, numbers, complete)
    program = split(Program((cone(basis),)), p.support, settings.chordal)
    numbers |= {"blocks": len(program.cones), "block": program.largest}
    if program.largest > settings.largest:
        return undecided(asked, too_large(program, settings), numbers)
    numbers["products"] = len(program.monomials)
    if any(m not in program.monomials for m in p.support):
        return undecided(asked, "a monomial is no product within a chordal block", numbers)
    found = attempt(target, program, settings, ctx, refute=complete and not settings.chordal)
    numbers |= found.numbers
    if found.squares is not None:
        return summed(asked, found, basis, numbers)
    if found.functional is not None:
        why = "a functional that is negative on no square is negative on it"
        return refuted(asked, why, basis, found.functional, numbers, found.tried)
    if found.numeric:
        margin, residual = numbers["margin"], numbers["residual"]
        why = f"a sum of squares to {residual:.1g}, margin {margin:.2g}; no proof in fractions{found.why}"
        made = negative(asked, numbers, found.tried, found.moments)  # by less than floats see
        return made or given(asked, "numeric", why, basis=basis, numbers=numbers, tried=found.tried)
    return undecided(asked, "neither squares nor a proof against them", numbers, found.tried, found.moments)


def opened(problem: Any) -> tuple[Problem, Certificate | None]:
    """The problem, for a method that does not look at constraints, and its certificate if there is nothing to do."""
    asked = read(problem)
    if asked.constrained:
        tried = ("nothing: constraints are not looked at",)
        return asked, given(asked, "unknown", "there are constraints", numbers={}, tried=tried)
    return asked, None if asked.polynomial.terms else nothing(asked)


def nothing(asked: Problem) -> Certificate:
    """The certificate of the zero polynomial."""
    return given(asked, "exact", "the zero polynomial is the sum of no squares", numbers={})


def summed(asked: Problem, found: Attempt, basis: Sequence[Exponents], numbers: Mapping[str, float]) -> Certificate:
    """The exact certificate of an attempt that gave squares over monomials."""
    squares = [s for _, several in found.squares or () for s in several]
    why = f"a sum of {exact.counted(squares)} over {len(basis)} of {numbers['all']} monomials"
    return given(asked, "exact", why, squares=squares, basis=basis, numbers=numbers, tried=found.tried)


def lonely(
    asked: Problem, alone: Exponents, basis: Sequence[Exponents], numbers: Mapping[str, float], complete: bool
) -> Certificate:
    """The verdict where a monomial of p is no product of two of the basis."""
    why = f"{written(asked.variables, [(alone, 1)])} is no product of two monomials that its squares may hold"
    if not complete:
        return undecided(asked, why, numbers)
    return refuted(asked, why, basis, {alone: -dict(asked.polynomial.terms)[alone]}, numbers)


def too_large(program: Program, settings: Settings) -> str:
    """What a user reads where the solver would need too much memory."""
    _, memory = moments.cost([len(c.basis) for c in program.cones])
    size = f"a block of {program.largest} monomials (about {memory / 2**30:.1f} GiB)"
    return f"{size}, largest={settings.largest} are allowed"


def refuted(
    asked: Problem, why: str, basis: Sequence[Exponents], functional: Mapping[Exponents, Fraction],
    numbers: Mapping[str, float], tried: Sequence[str] = (),
) -> Certificate:  # fmt: skip
    """Not a sum of squares: by a point, which says more, or by the functional."""
    terms = [(m, c) for m, c in functional.items() if c]
    made = negative(asked, numbers, tried, {m: float(c) for m, c in terms})
    return made or given(asked, "not_sos", why, basis=basis, functional=terms, numbers=numbers, tried=tried)


def undecided(
    asked: Problem,
    why: str,
    numbers: Mapping[str, float],
    tried: Sequence[str] = (),
    moments: Mapping[Exponents, float] = {},
) -> Certificate:
    """Unknown, unless a point says more."""
    return negative(asked, numbers, tried, moments) or given(asked, "unknown", why, numbers=numbers, tried=tried)


def negative(
    asked: Problem, numbers: Mapping[str, float], tried: Sequence[str] = (), moments: Mapping[Exponents, float] = {},
    bound: Fraction = Fraction(0),
) -> Certificate | None:  # fmt: skip
    """The verdict by a point where p is below the bound, if one is found."""
    point = below_zero(asked, moments, bound)
    if not point:  # of a constant the functional says it
        return None
    where = ", ".join(f"{v} = {x}" for v, x in zip(asked.variables, point, strict=True))
    why = f"it is {f'below {bound}' if bound else 'negative'} at {where}"
    return given(asked, "not_sos", why, point=point, numbers=numbers, tried=tried, bound=bound)


def given(
    asked: Problem, status: str, reason: str, *, numbers: Mapping[str, float], squares: Sequence[exact.Square] = (),
    basis: Sequence[Exponents] = (), functional: Iterable[tuple[Exponents, Fraction]] = (),
    point: Sequence[Fraction] = (), tried: Sequence[str] = (), bound: Fraction = Fraction(0),
    multiplier: Sequence[exact.Square] = (), weighted: Sequence[tuple[tuple[int, ...], Sequence[exact.Square]]] = (),
    cofactors: Sequence[Terms] = (), minimisers: Sequence[Sequence[str]] = (),
) -> Certificate:  # fmt: skip
    """The certificate as data, after the verifier has read it."""
    made = Certificate(
        status=status, reason=reason, variables=asked.variables, polynomial=plain(asked.polynomial.terms),
        basis=tuple(basis), squares=_squares(squares), functional=plain(functional), point=tuple(map(str, point)),
        bound=str(bound), nonneg=tuple(plain(g.terms) for g in asked.nonneg),
        zero=tuple(plain(h.terms) for h in asked.zero), multiplier=_squares(multiplier),
        weighted=tuple((tuple(which), _squares(several)) for which, several in weighted),
        cofactors=tuple(plain(c.items()) for c in cofactors), minimisers=tuple(map(tuple, minimisers)),
        tried=tuple(tried), numbers=numbers,
    )  # fmt: skip
    refusal = made.refusal() if status in ("exact", "not_sos") else None
    return made if refusal is None else dataclasses.replace(
        made, status="unknown", reason=f"the verifier refuses the proof: {refusal}"
    )  # fmt: skip


def _squares(squares: Iterable[exact.Square]) -> tuple[tuple[str, Plain], ...]:
    return tuple((str(weight), plain(terms)) for weight, terms in squares)


def plain(terms: Iterable[tuple[Exponents, Any]]) -> Plain:
    return tuple((exponents, str(c)) for exponents, c in terms)
