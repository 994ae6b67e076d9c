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
    bound = _number(certificate.get("bound", "0"))
    zero = (0,) * count
    least = _sum(_terms(certificate["polynomial"], count), {zero: -bound})
    nonneg = [_terms(g, count) for g in certificate.get("nonneg", ())]
    zeros = [_terms(h, count) for h in certificate.get("zero", ())]
    status = certificate["status"]
    if status == "exact":
        _identity(least, certificate, nonneg, zeros, count)
    elif status == "not_sos" and certificate["point"]:
        _point(least, [_number(x) for x in certificate["point"]], nonneg, zeros)
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


def _identity(
    least: Terms, certificate: Mapping[str, Any], nonneg: list[Terms], zeros: list[Terms], count: int
) -> None:
    room = [MOST_PRODUCTS]
    multiplier = certificate.get("multiplier", ())
    total = _squares(certificate["squares"], count, room)
    for which, squares in certificate.get("weighted", ()):
        if len(set(which)) < len(which) or any(type(k) is not int or not 0 <= k < len(nonneg) for k in which):
            raise Refused(f"{str(which)[:40]} names no product of the constraints")
        product = _squares(squares, count, room)
        for k in which:
            product = _times(product, nonneg[k], room)
        total = _sum(total, product)
    cofactors = certificate.get("cofactors", ())
    if len(cofactors) not in (0, len(zeros)):
        raise Refused(f"{len(cofactors)} cofactors for {len(zeros)} equations")
    for cofactor, h in zip(cofactors, zeros, strict=False):
        total = _sum(total, _times(_terms(cofactor, count), h, room))
    if multiplier:
        factor = _squares(multiplier, count, room)
        steady = any(set(_terms(pairs, count)) == {(0,) * count} for _, pairs in multiplier)
        if not factor or ((nonneg or zeros) and not steady):
            raise Refused("the multiplier may vanish")
        least = _times(factor, least, room)
    for monomial in total.keys() | least.keys():
        if total.get(monomial, 0) != least.get(monomial, 0):
            raise Refused(f"the squares do not add up to the polynomial at {monomial}")


def _sum(left: Terms, right: Terms) -> Terms:
    total = {m: left.get(m, Fraction(0)) + right.get(m, Fraction(0)) for m in left.keys() | right.keys()}
    return {m: c for m, c in total.items() if c}


def _times(left: Terms, right: Terms, room: list[int]) -> Terms:
    """The product. room: how many products of terms are still allowed."""
    room[0] -= len(left) * len(right)
    if room[0] < 0:
        raise Refused(f"more than {MOST_PRODUCTS} products of terms")
    (a, above), (b, below) = _whole(left), _whole(right)
    found: dict[Monomial, int] = {}
    for one, x in a:
        for other, y in b:
            key = tuple(e + f for e, f in zip(one, other, strict=True))
            found[key] = found.get(key, 0) + x * y
    return {m: Fraction(c, above * below) for m, c in found.items() if c}


def _whole(terms: Terms) -> tuple[list[tuple[Monomial, int]], int]:
    """Whole coefficients and what they are divided by."""
    common = lcm(*(c.denominator for c in terms.values()))
    return [(m, int(c * common)) for m, c in terms.items()], common


def _squares(squares: Any, count: int, room: list[int]) -> Terms:
    """The weighted squares, added up."""
    total: Terms = {}
    for weight, pairs in squares:
        scale = _number(weight)
        if scale <= 0:
            raise Refused("a square has a weight that is not positive")
        terms = _terms(pairs, count)
        for monomial, c in _times(terms, terms, room).items():
            total[monomial] = total.get(monomial, Fraction(0)) + scale * c
    return {m: c for m, c in total.items() if c}


def _point(least: Terms, point: list[Fraction], nonneg: list[Terms], zeros: list[Terms]) -> None:
    if any(_at(g, point) < 0 for g in nonneg) or any(_at(h, point) for h in zeros):
        raise Refused("the constraints do not hold at the point")
    if _at(least, point) >= 0:
        raise Refused("the polynomial is not negative at the point")


def _at(terms: Terms, point: list[Fraction]) -> Fraction:
    value = Fraction(0)
    for monomial, coefficient in terms.items():
        if len(point) != len(monomial):
            raise Refused(f"the point has {len(point)} coordinates, not {len(monomial)}")
        for x, exponent in zip(point, monomial, strict=True):
            coefficient *= x**exponent
        value += coefficient
    return value


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
        said = f"refused: {why}" if why else f"proven: {found['status']}"
        print(f"{path}: {said}")
    if not paths:
        print("usage: python -m luthier.verifier certificate.json ...")
    return 1 if refused or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
