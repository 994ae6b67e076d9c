"""The classes of SoS-1K (arXiv 2502.20545, Table 3) drawn anew: exact decimals, and a proof where there is one.

    1            a dense polynomial of odd degree                             no proof yet
    2a   2.1a    squares of polynomials added up; expanded, or as written     the squares
    2b   2.1b    the same less a constant that is too large                   a point where it is negative
    3.1a 3.1b    quadratics; the latter less a constant                       squares; a point
    3.2a 3.2b    quartics in two variables, likewise                          squares; a point
    4a   4b      s|x|^4 plus a quadratic; the latter without a constant       squares; a point
    5.1a ... 5.4a  b'Qb over all monomials b, Q = GG' full, sparse (a tenth), of rank 3, ill-conditioned (1 to 1e12)
    5.1b ... 5.4b  an indefinite Q: any; all or one of the eigenvalues lowered   nothing: another Q may be semidefinite

The published b-classes of 5 are called no sums of squares since Q is indefinite, which does not follow. The published
a-classes are rounded to two digits, which can leave the cone; here every coefficient is what it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import comb

import torch

from luthier.flows import Certificate
from luthier.kit.gram import full
from luthier.kit.polynomial import Exponents, Polynomial, polynomial

CHARS = 4000
"""of a polynomial's text, at most: the paper's border between short and long"""
SIZES = {
    "1": 200, "2a": 120, "2b": 63, "2.1a": 120, "2.1b": 63, "3.1a": 100, "3.1b": 100, "3.2a": 100, "3.2b": 100,
    "4a": 100, "4b": 100, "5.1a": 96, "5.1b": 96, "5.2a": 72, "5.2b": 72, "5.3a": 60, "5.3b": 40, "5.4a": 35,
    "5.4b": 70,
}  # fmt: skip
"""How many of each class there are, in the order of the table."""
TRIES = 12
Terms = dict[Exponents, Fraction]
Matrix = list[list[Fraction]]


@dataclass(frozen=True)
class Drawn:
    """A polynomial, as a reader gets it, and what its construction proves: squares, a point, or nothing."""

    text: str
    polynomial: Polynomial
    squares: tuple[tuple[Fraction, Terms], ...] = ()
    point: tuple[Fraction, ...] = ()

    def proof(self) -> Certificate | None:
        """The certificate that the construction gives; whether it holds is for the verifier to say."""
        if not self.squares and not self.point:
            return None
        squares = tuple((str(w), tuple((m, str(c)) for m, c in terms.items())) for w, terms in self.squares)
        terms = tuple((m, str(c)) for m, c in self.polynomial.terms)
        status = "exact" if squares else "not_sos"
        return Certificate(
            status, "by construction", self.polynomial.variables, terms, squares, point=tuple(map(str, self.point))
        )


def draw(kind: str, chars: int, rng: torch.Generator) -> Drawn:
    """A polynomial of the class with at most `chars` characters; where none was drawn, the shortest one."""
    made = []
    for _ in range(TRIES):
        one = _draw(kind, chars, rng)
        if one is not None:
            made.append(one)
            if len(one.text) <= chars:
                return one
    return min(made, key=lambda one: len(one.text))


def _draw(kind: str, chars: int, rng: torch.Generator) -> Drawn | None:
    if kind == "1":
        n, d = _size(rng, chars, (2, 5), (1, 3, 5, 7))
        return _given(n, {m: _tenths(rng, 10) for m in _monomials(n, d)}, d)
    family, side = kind[:-1], kind[-1]
    if family in ("2", "2.1"):
        n, d = _size(rng, chars, (2, 8), (4, 6, 8, 10), _few)
        squares = [(Fraction(1), _line(rng, n, d // 2, chars)) for _ in range(_whole(rng, 2, 3))]
    elif family == "3.1":
        n, _ = _size(rng, chars, (2, 11), (2,))
        squares = [(Fraction(1), _dense(rng, n, 1)) for _ in range(n)] + [(abs(_tenths(rng, 90)), {(0,) * n: ONE})]
    elif family == "3.2":
        n, squares = 2, [(Fraction(1), _dense(rng, 2, 2)) for _ in range(3)]
    elif family == "4":
        return _regularised(side, *_size(rng, chars, (3, 9), (4,), _quartic)[:1], rng)
    else:
        return _from_matrix(family, side, *_size(rng, chars, *_RANGES[family]), rng)
    total = _sum(squares)
    if side == "a":
        return _given(n, total, squares=squares, text=_written(squares) if family == "2.1" else None)
    point = tuple(Fraction(_whole(rng, -6, 6), 4) for _ in range(n))
    less = _at(total, point) + 1 + abs(_tenths(rng, 100))
    less = Fraction(round(less * 10 + 1), 10)
    text = f"{_written(squares)} - {_decimal(less)}" if family == "2.1" else None
    return _given(n, _sum([*squares, (-less, {(0,) * n: ONE})]), point=point, text=text)


ONE = Fraction(1)
_RANGES = {
    "5.1": ((2, 4), (4, 6, 8, 10, 12)), "5.2": ((2, 3), (6, 8, 10, 12)),
    "5.3": ((2, 5), (6, 8, 10, 12)), "5.4": ((2, 5), (6, 8)),
}  # fmt: skip


def _dense_terms(n: int, d: int) -> int:
    return comb(n + d, d)


def _few(n: int, d: int) -> int:
    """About how many terms squares of short polynomials have: they are as short as they need to be."""
    return 10 + n


def _quartic(n: int, d: int) -> int:
    return n * (n + 1) + n + 1


def _size(rng: torch.Generator, chars: int, ns: tuple[int, int], degrees: tuple[int, ...], terms=_dense_terms):
    """A number of variables and a degree, uniform among those whose text should fit; the least if none does."""
    pairs = [(n, d) for n in range(ns[0], ns[1] + 1) for d in degrees]
    fit = [pair for pair in pairs if terms(*pair) * 14 <= chars] or [min(pairs, key=lambda pair: terms(*pair))]
    return fit[_whole(rng, 0, len(fit) - 1)]


def _regularised(side: str, n: int, rng: torch.Generator) -> Drawn | None:
    """s(|x|^2 - t)^2 + squares of linear polynomials; or s|x|^4 + an indefinite quadratic with nothing at 0."""
    s, zero = Fraction(_whole(rng, 1, 9)), (0,) * n
    ball: Terms = {tuple(2 * int(i == j) for j in range(n)): ONE for i in range(n)}
    if side == "a":
        squares = [(s, ball | {zero: -Fraction(_whole(rng, 1, 30), 10)})]
        squares += [(ONE, _dense(rng, n, 1)) for _ in range(n)]
        return _given(n, _sum(squares), squares=squares)
    total = _sum([(s, ball)])
    for m in _monomials(n, 2):
        if any(m):
            total[m] = total.get(m, Fraction(0)) + _tenths(rng, 80)
    slope = [total.get(tuple(int(i == j) for j in range(n)), Fraction(0)) for i in range(n)]
    for halvings in range(60) if any(slope) else ():
        point = tuple(-x / 2**halvings for x in slope)
        if _at(total, point) < 0:
            return _given(n, total, point=point)
    return None


def _from_matrix(family: str, side: str, n: int, d: int, rng: torch.Generator) -> Drawn | None:
    """b'Qb over all monomials b of at most half the degree."""
    basis = _monomials(n, d // 2)
    weights, columns = _factors(family, side, len(basis), rng)
    squares = [
        (w, {b: c for b, c in zip(basis, column, strict=True) if c}) for w, column in zip(weights, columns, strict=True)
    ]
    squares = [(w, terms) for w, terms in squares if terms]
    if side == "a":
        return _given(n, _sum(squares), d, squares=squares)
    if family == "5.1":  # any symmetric matrix
        half = [(b, b2, _tenths(rng, 60)) for i, b in enumerate(basis) for b2 in basis[i:]]
        total: Terms = {}
        for a, b, c in half:
            _add(total, tuple(map(int.__add__, a, b)), c)
    elif family == "5.4":  # one weight, any of the lesser half, becomes a small negative one
        which = _whole(rng, len(squares) // 2, len(squares) - 1)
        less = -Fraction(_whole(rng, 1, 10), 10)
        total = _sum([(less if i == which else w, terms) for i, (w, terms) in enumerate(squares)])
    else:  # all eigenvalues lowered, which leaves some below zero
        total = _sum(squares)
        shift = Fraction(_whole(rng, 1, 20), 10)
        for b in basis:
            _add(total, tuple(2 * e for e in b), -shift)
    return _given(n, total)


def _factors(family: str, side: str, size: int, rng: torch.Generator) -> tuple[list[Fraction], Matrix]:
    """(weights, columns) of a positive semidefinite matrix."""
    if family == "5.3":
        return [ONE] * 3, [[Fraction(_whole(rng, -3, 3)) for _ in range(size)] for _ in range(3)]
    if family == "5.1":
        return [ONE] * size, [[_tenths(rng, 10) for _ in range(size)] for _ in range(size)]
    columns, full_ = [], (family, side) == ("5.4", "a")
    for i in range(size):  # lower triangular: one on the diagonal, below it all or a tenth of the entries
        below = [_tenths(rng, 10) if full_ or _whole(rng, 1, 10) == 1 else Fraction(0) for _ in range(size)]
        columns.append([Fraction(0)] * i + [ONE] + below[i + 1 :])
    if family == "5.2":
        return [abs(_tenths(rng, 10)) + Fraction(1, 10) for _ in range(size)], columns
    powers = [Fraction(10) ** round(12 * i / max(size - 1, 1)) for i in range(size)]
    return powers[::-1], columns


def _line(rng: torch.Generator, n: int, degree: int, chars: int) -> Terms:
    """A polynomial with few terms, one of the degree; more of them where there is room."""
    most = max(2, min(6, chars // 120))
    made: Terms = {}
    for place in range(_whole(rng, 2, most)):
        own = degree if place == 0 else _whole(rng, 0, degree)
        at = [_whole(rng, 0, n - 1) for _ in range(own)]
        _add(made, tuple(at.count(i) for i in range(n)), _tenths(rng, 15))
    return made


def _dense(rng: torch.Generator, n: int, degree: int) -> Terms:
    return {m: _tenths(rng, 15) for m in _monomials(n, degree)}


def _monomials(n: int, degree: int) -> list[Exponents]:
    """All of at most this degree."""
    whole = full(polynomial({tuple(2 * degree * int(i == j) for j in range(n)): 1 for i in range(n)}))
    return whole or []


def _whole(rng: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=rng))


def _tenths(rng: torch.Generator, spread: float) -> Fraction:
    """A normal number with this many tenths of deviation, to one decimal, not 0."""
    return Fraction(round(float(torch.randn((), generator=rng)) * spread) or 1, 10)


def _add(total: Terms, m: Exponents, c: Fraction) -> None:
    total[m] = total.get(m, Fraction(0)) + c


def _sum(squares: list[tuple[Fraction, Terms]]) -> Terms:
    total: Terms = {}
    for weight, terms in squares:
        for a, x in terms.items():
            for b, y in terms.items():
                _add(total, tuple(map(int.__add__, a, b)), weight * x * y)
    return total


def _at(terms: Terms, point: tuple[Fraction, ...]) -> Fraction:
    return polynomial_over(terms, len(point)).at(point)


def polynomial_over(terms: Terms, n: int) -> Polynomial:
    """The terms over x1 ... xn, whether these occur or not."""
    return Polynomial(tuple(f"x{i + 1}" for i in range(n)), tuple(terms.items()))


def _given(
    n: int, terms: Terms, degree: int | None = None, squares=(), point=(), text: str | None = None
) -> Drawn | None:
    """What was drawn; None if a variable does not occur, or the degree is not the one that was meant."""
    p = polynomial(terms)
    if len(p.variables) != n or not p.terms or degree not in (None, p.degree):
        return None
    return Drawn(text or decimals(p), p, tuple((w, t) for w, t in squares if w), tuple(point))


def decimals(p: Polynomial) -> str:
    """The polynomial in decimals that are exact, as a language model gets it."""
    return _text(p.variables, p.terms) or "0"


def _text(variables: tuple[str, ...], terms) -> str:
    text = ""
    for exponents, c in terms:
        name = "*".join(v if e == 1 else f"{v}^{e}" for v, e in zip(variables, exponents, strict=True) if e)
        size = _decimal(abs(c))
        body = size if not name else name if size == "1" else f"{size}*{name}"
        text += (("-" if c < 0 else "") if not text else (" - " if c < 0 else " + ")) + body
    return text


def _decimal(c: Fraction) -> str:
    places = next(k for k in range(40) if 10**k % c.denominator == 0)
    whole = str(abs(c.numerator) * 10**places // c.denominator).rjust(places + 1, "0")
    return f"{whole[:-places]}.{whole[-places:]}" if places else whole


def _written(squares: list[tuple[Fraction, Terms]]) -> str:
    """(...)^2 + (...)^2; every weight is 1."""
    return " + ".join(f"({decimals(polynomial_over(terms, len(next(iter(terms)))))})^2" for _, terms in squares)


def truth(made: Certificate) -> bool | None:
    """Whether the polynomial is a sum of squares, by a certificate that the verifier accepts; None: not known.

    A proof with a multiplier, or of a lower bound, shows that it is nonnegative, which is less.
    """
    if made.status not in ("exact", "not_sos") or made.bound != "0" or made.refusal() is not None:
        return None
    if made.status == "not_sos" or made.functional:
        return False
    return None if made.multiplier or made.weighted or made.zero else True


def order(kinds: tuple[str, ...], equal: bool) -> Iterator[tuple[str, int]]:
    """(class, number) without end, at every point in about the proportions of SIZES, or the same of each."""
    share = {kind: 1 if equal else SIZES[kind] for kind in kinds}
    seen = dict.fromkeys(kinds, 0)
    while True:
        kind = min(kinds, key=lambda k: (seen[k] + 0.5) / share[k])
        yield kind, seen[kind]
        seen[kind] += 1
