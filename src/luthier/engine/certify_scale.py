"""Coefficients beyond the range of floats: the question for multiples of the polynomials, and its answer taken back."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import gcd, lcm, prod
from typing import Any

from luthier.flows import Certificate
from luthier.kit.polynomial import Polynomial
from luthier.kit.problem import Problem, problem

NARROW = 500
"""bits; twice as many are still a float"""


def answered(method: Any, given: Any, ctx: Any) -> Certificate:
    """The method's certificate of the problem, in any form it may be given."""
    try:
        return method.certify(given, ctx)
    except ArithmeticError:  # some step in floats; what is exact knows no range
        pass
    asked = problem(given)
    units = [unit(p) for p in (asked.polynomial, *asked.nonneg, *asked.zero)]
    first, *others = (divided(p, u) for p, u in zip((asked.polynomial, *asked.nonneg, *asked.zero), units, strict=True))
    count = len(asked.nonneg)
    try:
        made = method.certify(Problem(first, tuple(others[:count]), tuple(others[count:])), ctx)
    except ArithmeticError:
        return undecided(asked, "its coefficients are beyond the range of floats")
    back = taken_back(made, asked, units)
    why = back.refusal() if back.status in ("exact", "not_sos") else None
    return undecided(asked, f"the verifier refuses the proof: {why}") if why else back


def unit(p: Polynomial) -> Fraction:
    """What p is divided by: what its coefficients share, or that times a power of 2 where they still are too large."""
    numbers = [abs(c) for _, c in p.terms] or [Fraction(1)]
    shared = Fraction(gcd(*(c.numerator for c in numbers)), lcm(*(c.denominator for c in numbers)))
    bits = (max(numbers) / shared).numerator.bit_length()
    return shared if bits < NARROW else shared * 2**bits


def divided(p: Polynomial, u: Fraction) -> Polynomial:
    return Polynomial(p.variables, tuple((m, c / u) for m, c in p.terms))


def taken_back(made: Certificate, asked: Problem, units: list[Fraction]) -> Certificate:
    """The certificate of the problem itself, from that of its polynomials over their units."""
    own, nonneg, zero = units[0], units[1 : 1 + len(asked.nonneg)], units[1 + len(asked.nonneg) :]

    def times(terms: Any, factor: Fraction) -> Any:
        return tuple((m, str(Fraction(c) * factor)) for m, c in terms)

    def squares(several: Any, factor: Fraction) -> Any:
        return tuple((str(Fraction(w) * factor), terms) for w, terms in several)

    weighted = [(k, squares(s, own / prod((nonneg[i] for i in k), start=Fraction(1)))) for k, s in made.weighted]
    return replace(
        undecided(asked, f"for a multiple that floats can hold: {made.reason}"), status=made.status, basis=made.basis,
        functional=made.functional, point=made.point, multiplier=made.multiplier, minimisers=made.minimisers,
        bound=str(Fraction(made.bound) * own), squares=squares(made.squares, own), weighted=tuple(weighted),
        cofactors=tuple(times(c, own / u) for c, u in zip(made.cofactors, zero, strict=False)), tried=made.tried,
        numbers={name: number for name, number in made.numbers.items() if name != "bound"},
    )  # fmt: skip


def undecided(asked: Problem, reason: str) -> Certificate:
    """What is said of a problem on which the work was stopped from outside."""

    def plain(p: Polynomial) -> Any:
        return tuple((exponents, str(c)) for exponents, c in p.terms)

    return Certificate(
        status="unknown", reason=reason, variables=asked.variables, polynomial=plain(asked.polynomial),
        nonneg=tuple(map(plain, asked.nonneg)), zero=tuple(map(plain, asked.zero)), tried=(reason,),
    )  # fmt: skip
