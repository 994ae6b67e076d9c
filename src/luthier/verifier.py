"""Checks a certificate in fractions, from its data alone. Standard library only; no other file of ours is used.

What is checked:

    exact     q (p - bound) = s + sum of s_k G_k + sum of c_j h_j, multiplied out, where p is the polynomial, q the
              sum of the squares in `multiplier` (1 if there are none), s those of `squares`, each s_k squares times a
              product G_k of the `nonneg`, c_j any polynomials times the `zero`; all weights are positive; q is not 0,
              and with nonneg or zero it holds a constant square, lest it vanish where they meet
    not_sos   either p is below the bound at the point, where the nonneg are not negative and the zero are 0;
              or, for p - bound without nonneg and zero, with a functional L:
              1. no polynomial whose square may occur holds a monomial outside `basis`
              2. L of squares of the basis is never negative (its moment matrix is positive semidefinite)
              3. L of the polynomial is negative; were it a sum of squares, 1 and 2 would forbid that

An exact certificate with a functional says both: p is not below the bound, and p - bound is no sum of squares.
Where q is positive the identity gives p >= bound; without constraints q, a polynomial that is not 0, is positive
on a dense set, and p is continuous.

Step 1 starts from the box that halves the polynomial's exponents and degrees, and strikes out a monomial
a while 2a is neither an exponent of the polynomial nor the sum of two others that are left.

This file needs nothing else: `python verifier.py certificate.json` says proven or refused, with exit code 0 or 1.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import product
from math import gcd, lcm, prod
from typing import Any

NUMBER = re.compile(r"-?[0-9]{1,4200}(/[0-9]{1,4200})?", re.ASCII)
MOST_VARIABLES, MOST_DEGREE, MOST_FACTORS, MOST_MONOMIALS, MOST_PRODUCTS = 300, 1000, 1000, 20_000, 20_000_000
"""beyond these a certificate is refused unread, so that a hostile one costs no more than an honest one"""
Monomial = int
"""x_1^e_1 x_2^e_2 ... as e_1 + 2^32 e_2 + ...: products are sums, and none is of a degree that could carry"""
Terms = dict[Monomial, Fraction]


class Refused(Exception):
    """Why a certificate proves nothing."""


def refusal(certificate: Mapping[str, Any]) -> str | None:
    """Why the certificate does not prove what it says; None if it does. Never raises on bad data."""
    try:
        _check(certificate)
    except Refused as why:
        return str(why)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as fault:
        return f"the certificate cannot be read ({type(fault).__name__}: {fault})"
    return None


def _check(certificate: Mapping[str, Any]) -> None:
    count = len(certificate["variables"])
    if count > MOST_VARIABLES:
        raise Refused(f"more than {MOST_VARIABLES} variables")
    bound = _number(certificate.get("bound", "0"))
    least = _sum(_terms(certificate["polynomial"], count), {0: -bound})
    nonneg = [_terms(g, count) for g in certificate.get("nonneg", ())]
    zeros = [_terms(h, count) for h in certificate.get("zero", ())]
    status = certificate["status"]
    if status == "exact":
        _identity(least, certificate, nonneg, zeros, count)
    elif status == "not_sos" and certificate["point"]:
        _point(least, [_number(x) for x in certificate["point"]], nonneg, zeros, count)
    elif status != "not_sos":
        raise Refused(f"a certificate that says {status!r} proves nothing")
    if (status == "not_sos" and not certificate["point"]) or certificate["functional"]:
        if nonneg or zeros:
            raise Refused("a functional proves nothing where there are constraints")
        _functional(least, certificate, count)


def _number(text: Any) -> Fraction:
    if not isinstance(text, str) or not NUMBER.fullmatch(text):
        raise Refused(f"{str(text)[:40]!r} is no fraction")
    above, _, below = text.partition("/")
    if below and not int(below):
        raise Refused("a fraction over zero")
    return Fraction(int(above), int(below or 1))


def _monomial(exponents: Any, count: int) -> Monomial:
    if len(exponents) != count or not {*map(type, exponents)} <= {int} or min(exponents, default=0) < 0:
        raise Refused(f"{str(exponents)[:40]} is no monomial in {count} variables")
    if sum(exponents) > MOST_DEGREE:
        raise Refused(f"a degree above {MOST_DEGREE}")
    return _code(exponents)


def _code(exponents: Sequence[int]) -> Monomial:
    return sum(e << 32 * place for place, e in enumerate(exponents) if e)


def _exponents(monomial: Monomial, count: int) -> tuple[int, ...]:
    return tuple(monomial >> 32 * place & 0xFFFFFFFF for place in range(count))


def _terms(pairs: Any, count: int) -> Terms:
    found: Terms = {}
    for exponents, number in pairs:
        monomial = _monomial(exponents, count)
        if monomial in found:
            raise Refused(f"the monomial {_exponents(monomial, count)} stands twice")
        found[monomial] = _number(number)
    return {m: c for m, c in found.items() if c}


def _identity(least: Terms, certificate: Mapping[str, Any], nonneg: list[Terms], zero: list[Terms], count: int) -> None:
    room = [MOST_PRODUCTS]
    multiplier = certificate.get("multiplier", ())
    total = _squares(certificate["squares"], count, room)
    for which, squares in certificate.get("weighted", ()):
        known = all(type(k) is int and 0 <= k < len(nonneg) for k in which)
        if not known or len(set(which)) < len(which) or len(which) > MOST_FACTORS:
            raise Refused(f"{str(which)[:40]} names no product of the constraints")
        part = _squares(squares, count, room)
        for k in which:
            part = _times(part, nonneg[k], room)
        total = _sum(total, part)
    cofactors = certificate.get("cofactors", ())
    if len(cofactors) not in (0, len(zero)):
        raise Refused(f"{len(cofactors)} cofactors for {len(zero)} equations")
    for cofactor, h in zip(cofactors, zero, strict=False):
        total = _sum(total, _times(_terms(cofactor, count), h, room))
    if multiplier:
        factor = _squares(multiplier, count, room)
        steady = any(set(_terms(pairs, count)) == {0} for _, pairs in multiplier)
        if not factor or ((nonneg or zero) and not steady):
            raise Refused("the multiplier may vanish")
        least = _times(factor, least, room)
    for monomial in total.keys() | least.keys():
        if total.get(monomial, 0) != least.get(monomial, 0):
            raise Refused(f"the squares do not add up to the polynomial at {_exponents(monomial, count)}")


def _sum(left: Terms, right: Terms) -> Terms:
    total = {**left, **{m: left[m] + c if m in left else c for m, c in right.items()}}
    return {m: c for m, c in total.items() if c}


def _times(left: Terms, right: Terms, room: list[int]) -> Terms:
    """The product. room: how many products of terms are still allowed."""
    (a, above), (b, below) = _whole(left, len(right), room), _whole(right, 0, room)
    found: dict[Monomial, int] = {}
    for (one, x), (other, y) in product(a, b):
        found[one + other] = found.get(one + other, 0) + x * y
    return {m: Fraction(c, above * below) for m, c in found.items() if c}


def _whole(terms: Terms, times: int, room: list[int]) -> tuple[list[tuple[Monomial, int]], int]:
    """Whole coefficients and what they are divided by. times: how often each will be multiplied."""
    room[0] -= len(terms) * times
    if room[0] < 0:
        raise Refused(f"more than {MOST_PRODUCTS} products of terms")
    common = lcm(*(c.denominator for c in terms.values()))
    return [(m, c.numerator * (common // c.denominator)) for m, c in terms.items()], common


def _squares(squares: Any, count: int, room: list[int]) -> Terms:
    """The weighted squares, added up, in whole numbers over one denominator for as long as it stays short: from the
    last one, as of an eliminated Gram matrix those have the fewest terms, and so have their sums."""
    total, run, below = Terms(), dict[Monomial, int](), 1
    for weight, pairs in squares[::-1]:
        scale = _number(weight)
        if scale <= 0:
            raise Refused("a square has a weight that is not positive")
        terms, common = _whole(_terms(pairs, count), len(pairs), room)
        scale /= common**2
        if below.bit_length() > 2 * scale.denominator.bit_length() or len(run) > 8 * len(terms) ** 2:
            run, below = _into(total, run, below), 1
        both = lcm(below, scale.denominator)
        fit, grown = scale.numerator * (both // scale.denominator), both // below
        run = {m: c * grown for m, c in run.items()} if grown > 1 else run
        for i, (one, x) in enumerate(terms):
            run[2 * one] = run.get(2 * one, 0) + fit * x * x
            twice = 2 * fit * x
            for other, y in terms[:i]:
                run[one + other] = run.get(one + other, 0) + twice * y
        shared = gcd(both, *run.values())
        run, below = {m: c // shared for m, c in run.items()} if shared > 1 else run, both // shared
    _into(total, run, below)
    return {m: c for m, c in total.items() if c}


def _into(total: Terms, run: dict[Monomial, int], below: int) -> dict[Monomial, int]:
    """Add what a run gave to the total; the next one is empty."""
    for m, c in run.items():
        total[m] = total[m] + Fraction(c, below) if m in total else Fraction(c, below)
    return {}


def _point(least: Terms, point: list[Fraction], nonneg: list[Terms], zeros: list[Terms], count: int) -> None:
    if len(point) != count:
        raise Refused(f"the point has {len(point)} coordinates, not {count}")
    if any(_at(g, point) < 0 for g in nonneg) or any(_at(h, point) for h in zeros):
        raise Refused("the constraints do not hold at the point")
    if _at(least, point) >= 0:
        raise Refused("the polynomial is not negative at the point")


def _at(terms: Terms, point: list[Fraction]) -> Fraction:
    return sum((c * prod(map(pow, point, _exponents(m, len(point)))) for m, c in terms.items()), Fraction(0))


def _functional(polynomial: Terms, certificate: Mapping[str, Any], count: int) -> None:
    basis = [_monomial(b, count) for b in certificate["basis"]]
    if not polynomial or len(set(basis)) < len(basis):
        raise Refused("the polynomial is zero, or the basis names a monomial twice")
    left_out = _possible([_exponents(m, count) for m in polynomial]) - set(basis)
    if left_out:
        raise Refused(f"the basis lacks {min(_exponents(m, count) for m in left_out)}, which a square might hold")
    values = _terms(certificate["functional"], count)
    matrix = [[values.get(a + b, Fraction(0)) for b in basis] for a in basis]
    if not _nonnegative(matrix):
        raise Refused("the functional is negative on a square")
    if sum(c * values.get(m, Fraction(0)) for m, c in polynomial.items()) >= 0:
        raise Refused("the functional is not negative on the polynomial")


def _possible(support: list[tuple[int, ...]]) -> set[Monomial]:
    """Every monomial that the argument of step 1 does not strike out.

    Exponents are so small beside 2^32 that sums and differences of three monomials show no carry.
    """
    bounds = [(min(column), max(column)) for column in zip(*support, strict=True)]
    degrees = [sum(m) for m in support]
    left: set[Monomial] = set()
    for seen, monomial in enumerate(_box([(-(-low // 2), high // 2) for low, high in bounds], max(degrees) // 2)):
        if seen > MOST_MONOMIALS:
            raise Refused(f"more than {MOST_MONOMIALS} monomials would have to be looked at")
        if 2 * sum(monomial) >= min(degrees):
            left.add(_code(monomial))
    known = set(map(_code, support))
    reason: dict[Monomial, Monomial] = {}
    while gone := [a for a in left if 2 * a not in known and not _stands(a, reason, left)]:
        left.difference_update(gone)
    return left


def _stands(a: Monomial, reason: dict[Monomial, Monomial], left: set[Monomial]) -> bool:
    """Whether the square of a is the product of two others that are left; those found last are tried first."""
    if reason.get(a) not in left or 2 * a - reason[a] not in left:
        reason[a] = next((b for b in left if b != a and 2 * a - b in left), -1)
    return reason[a] >= 0


def _box(bounds: list[tuple[int, int]], degree: int) -> Iterator[tuple[int, ...]]:
    """Every monomial between the bounds of at most this degree."""
    if any(low > high for low, high in bounds) or sum(low for low, _ in bounds) > degree:
        return
    if not bounds:
        yield ()
        return
    (low, high), rest = bounds[0], bounds[1:]
    for first in range(low, min(high, degree) + 1):
        for others in _box(rest, degree - first):
            yield (first, *others)


def _nonnegative(matrix: list[list[Fraction]]) -> bool:
    """Whether a symmetric matrix is positive semidefinite, by elimination."""
    common = lcm(*(x.denominator for row in matrix for x in row))
    rows = [[int(x * common) for x in row] for row in matrix]
    for k, row in enumerate(rows):
        if row[k] < 0 or (row[k] == 0 and any(row[k:])):
            return False
        for other in rows[k + 1 :] if row[k] else []:
            factor = other[k]
            other[k:] = [row[k] * x - factor * y for x, y in zip(other[k:], row[k:], strict=True)]
            shared = gcd(*other[k:]) or 1
            other[k:] = [x // shared for x in other[k:]]
    return True


def main(paths: list[str]) -> int:
    """Say of each file whether the certificate in it, in JSON, proves what it says; 0 if all do."""
    refused = 0
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            why = refusal(found)
        except (OSError, ValueError, RecursionError) as fault:
            found, why = {}, f"the file cannot be read ({type(fault).__name__})"
        refused += why is not None
        print(f"{path}: refused: {why}" if why else f"{path}: proven: {found['status']}")
    if not paths:
        print("usage: python -m luthier.verifier certificate.json ...")
    return 1 if refused or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
