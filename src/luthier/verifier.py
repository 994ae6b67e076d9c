"""Checks a certificate in fractions, from its data alone. Standard library only; no other file of ours is used.

What is checked:

    exact     every weight is positive, and the weighted squares, multiplied out, are the polynomial
    not_sos   either the polynomial is negative at the point; or, with a functional L:
              1. no polynomial whose square may occur holds a monomial outside `basis`
              2. L of squares of the basis is never negative (its moment matrix is positive semidefinite)
              3. L of the polynomial is negative; were it a sum of squares, 1 and 2 would forbid that

Step 1 starts from the box that halves the polynomial's exponents and degrees, and strikes out a monomial
a while 2a is neither an exponent of the polynomial nor the sum of two others that are left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import gcd, lcm
from typing import Any

NUMBER = re.compile(r"-?[0-9]{1,4200}(/[0-9]{1,4200})?", re.ASCII)
MOST_VARIABLES, MOST_DEGREE, MOST_MONOMIALS, MOST_PRODUCTS = 300, 1000, 20_000, 20_000_000
"""beyond these a certificate is refused unread, so that a hostile one costs no more than an honest one"""
Monomial = tuple[int, ...]
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
    polynomial = _terms(certificate["polynomial"], count)
    status = certificate["status"]
    if status == "exact":
        _squares(polynomial, certificate["squares"], count)
    elif status == "not_sos" and certificate["point"]:
        _point(polynomial, [_number(x) for x in certificate["point"]], count)
    elif status == "not_sos":
        _functional(polynomial, certificate, count)
    else:
        raise Refused(f"a certificate that says {status!r} proves nothing")


def _number(text: Any) -> Fraction:
    if not isinstance(text, str) or not NUMBER.fullmatch(text):
        raise Refused(f"{str(text)[:40]!r} is no fraction")
    above, _, below = text.partition("/")
    if below and not int(below):
        raise Refused("a fraction over zero")
    return Fraction(int(above), int(below or 1))


def _monomial(exponents: Any, count: int) -> Monomial:
    if len(exponents) != count or any(type(e) is not int or e < 0 for e in exponents):
        raise Refused(f"{str(exponents)[:40]} is no monomial in {count} variables")
    if sum(exponents) > MOST_DEGREE:
        raise Refused(f"a degree above {MOST_DEGREE}")
    return tuple(exponents)


def _terms(pairs: Any, count: int) -> Terms:
    found: Terms = {}
    for exponents, number in pairs:
        monomial = _monomial(exponents, count)
        if monomial in found:
            raise Refused(f"the monomial {monomial} stands twice")
        found[monomial] = _number(number)
    return {m: c for m, c in found.items() if c}


def _squares(polynomial: Terms, squares: Any, count: int) -> None:
    total: Terms = {}
    if sum(len(pairs) ** 2 for _, pairs in squares) > MOST_PRODUCTS:
        raise Refused(f"more than {MOST_PRODUCTS} products of terms")
    for weight, pairs in squares:
        scale = _number(weight)
        if scale <= 0:
            raise Refused("a square has a weight that is not positive")
        terms = _terms(pairs, count)
        common = lcm(*(c.denominator for c in terms.values()))
        whole = [(m, int(c * common)) for m, c in terms.items()]
        product: dict[Monomial, int] = {}
        for left, x in whole:
            for right, y in whole:
                key = tuple(a + b for a, b in zip(left, right, strict=True))
                product[key] = product.get(key, 0) + x * y
        for key, value in product.items():
            total[key] = total.get(key, Fraction(0)) + scale * Fraction(value, common * common)
    for monomial in total.keys() | polynomial.keys():
        if total.get(monomial, 0) != polynomial.get(monomial, 0):
            raise Refused(f"the squares do not add up to the polynomial at {monomial}")


def _point(polynomial: Terms, point: list[Fraction], count: int) -> None:
    if len(point) != count:
        raise Refused(f"the point has {len(point)} coordinates, not {count}")
    value = Fraction(0)
    for monomial, coefficient in polynomial.items():
        for x, exponent in zip(point, monomial, strict=True):
            coefficient *= x**exponent
        value += coefficient
    if value >= 0:
        raise Refused("the polynomial is not negative at the point")


def _functional(polynomial: Terms, certificate: Mapping[str, Any], count: int) -> None:
    basis = [_monomial(b, count) for b in certificate["basis"]]
    if not polynomial or len(set(basis)) < len(basis):
        raise Refused("the polynomial is zero, or the basis names a monomial twice")
    left_out = _possible(polynomial) - set(basis)
    if left_out:
        raise Refused(f"the basis lacks {min(left_out)}, which a square might hold")
    values = _terms(certificate["functional"], count)
    matrix = [[values.get(tuple(x + y for x, y in zip(a, b, strict=True)), Fraction(0)) for b in basis] for a in basis]
    if not _nonnegative(matrix):
        raise Refused("the functional is negative on a square")
    if sum(c * values.get(m, Fraction(0)) for m, c in polynomial.items()) >= 0:
        raise Refused("the functional is not negative on the polynomial")


def _possible(polynomial: Terms) -> set[Monomial]:
    """Every monomial that the argument of step 1 does not strike out.

    Monomials are written as numbers, with a radix so large that sums and differences of three show no carry.
    """
    bounds = [(min(column), max(column)) for column in zip(*polynomial, strict=True)]
    degrees = [sum(m) for m in polynomial]
    radix = 8 * max(degrees) + 1

    def code(monomial: Monomial) -> int:
        return sum(e * radix**place for place, e in enumerate(monomial))

    left: dict[int, Monomial] = {}
    for seen, monomial in enumerate(_box([(-(-low // 2), high // 2) for low, high in bounds], max(degrees) // 2)):
        if seen > MOST_MONOMIALS:
            raise Refused(f"more than {MOST_MONOMIALS} monomials would have to be looked at")
        if 2 * sum(monomial) >= min(degrees):
            left[code(monomial)] = monomial
    known = {code(m) for m in polynomial}
    reason: dict[int, int] = {}
    gone = list(left)
    while gone:
        gone = [a for a in left if 2 * a not in known and not _stands(a, reason, left)]
        for a in gone:
            del left[a]
    return set(left.values())


def _stands(a: int, reason: dict[int, int], left: Mapping[int, Monomial]) -> bool:
    """Whether the square of a is the product of two others that are left; those found last are tried first."""
    if a in reason and reason[a] in left and 2 * a - reason[a] in left:
        return True
    found = next((b for b in left if 2 * a - b in left and b != a), None)
    if found is not None:
        reason[a] = found
    return found is not None


def _box(bounds: list[tuple[int, int]], degree: int) -> Iterator[Monomial]:
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
