"""From a question to a certificate: is this polynomial a sum over these cones? Attempts are in `kit.attempts`.

given      the record, after the verifier, which shares no code with this, has read it
over       an attempt and its record, for a polynomial and the monomials its squares may hold
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from luthier.flows import Certificate, Ctx
from luthier.kit import exact, gram, moments
from luthier.kit.attempts import Attempt, Settings, attempt_within, smallest
from luthier.kit.cones import Program, cone, split, unreached
from luthier.kit.descent import below_zero
from luthier.kit.polynomial import Exponents, Polynomial, Terms, written
from luthier.kit.problem import Problem
from luthier.kit.problem import problem as read

Plain = tuple[tuple[Exponents, str], ...]


def over(p: Polynomial, basis: Sequence[Exponents], settings: Settings, ctx: Ctx, complete: bool) -> Certificate:
    """Whether p is a sum of squares over these monomials.

    complete: the basis holds all that a square may have (`kit.gram.consistent`), so that a functional against
    squares over it proves `not_sos`; else that is `unknown`.
    """
    asked, target = Problem(p), dict(p.terms)
    numbers: dict[str, float] = {"all": gram.everything(p), "basis": len(basis)}
    alone = unreached(basis, p.support)
    if alone is not None:
        return lonely(asked, alone, basis, numbers, complete)
    program = split(Program((cone(basis),)), p.support, settings.chordal)
    numbers |= {"blocks": len(program.cones), "block": program.largest}
    known = smallest(target, program, settings)
    if min(program.largest, known.largest if known else program.largest) > settings.largest:
        return undecided(asked, too_large(known or program, settings), numbers)
    numbers["products"] = len(program.monomials)
    if any(m not in program.monomials for m in p.support):
        return undecided(asked, "a monomial is no product within a chordal block", numbers)
    found = attempt_within(target, program, known, settings, ctx, refute=complete and not settings.chordal)
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
