"""Criteria for sums of squares in the order of SoS-1K (arXiv 2502.20545): each decides with a proof or not at all.

    degree    an odd degree: p is negative far out in some direction
    leading   a pure power of the highest degree with a negative coefficient: negative far out on that axis
    point     a point where p < 0: the constant, unit vectors, a grid, where descents from keyed starts end
    special   quadratics by elimination; s|x|^4 plus a quadratic by one number t (below); told, but not decided
              here, are the other cases in which nonnegative and sum of squares are one
    form      squares that are visible: even powers with positive coefficients, or a text such as 2(x - y)^2 + 1
    gram      the Gram matrix that shares every coefficient equally among its places is positive semidefinite

s|x|^4 + q(x) = s(|x|^2 - t)^2 + (2st|x|^2 - st^2 + q(x)): a sum of squares where the last bracket, a quadratic,
is one. Its least eigenvalue is concave in t, so a search over t finds it where it exists with room.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from luthier.errors import LuthierError
from luthier.kit import exact, gram
from luthier.kit.descent import below_zero
from luthier.kit.lowest import lowest
from luthier.kit.polynomial import Exponents, Polynomial, polynomial
from luthier.kit.problem import Problem
from luthier.kit.regularised import level, quadratic, regularised, shifted

MOST_BASIS, MOST_POWERS = 120, 5_000_000
"""monomials that a Gram matrix may have, and powers that are taken on the way out"""
Point = tuple[Fraction, ...]


@dataclass(frozen=True)
class Decision:
    """status: exact (with squares) or not_sos (with a point; of a constant with a functional)."""

    status: str
    reason: str
    squares: tuple[exact.Square, ...] = ()
    point: Point = ()
    functional: tuple[tuple[Exponents, Fraction], ...] = ()


@dataclass(frozen=True)
class Look:
    """What the criteria look at. text: how the polynomial was written, where it came as text. rng: torch.Generator."""

    p: Polynomial
    text: str | None
    rng: Any


def degree(look: Look) -> Decision | str:
    p, most = look.p, look.p.degree
    if most % 2 == 0:
        return f"the degree {most} is even"
    top = Polynomial(p.variables, tuple(term for term in p.terms if sum(term[0]) == most))
    for v in _directions(len(p.variables), most, look.rng):
        slope = top.at(v)
        if slope:
            return _far(p, tuple(-x if slope > 0 else x for x in v), f"the degree {most} is odd")
    return f"the degree {most} is odd, but no direction shows it"


def _directions(count: int, most: int, rng: Any) -> Iterator[tuple[int, ...]]:
    """Whole vectors: the axes, the diagonal, and others at random."""
    import torch

    yield from (tuple(int(i == j) for j in range(count)) for i in range(count))
    yield (1,) * count
    for _ in range(200):
        yield tuple(torch.randint(-most, most + 1, (count,), generator=rng).tolist())


def _far(p: Polynomial, v: Sequence[int], why: str) -> Decision | str:
    """The first t = 1, 2, 4, ... at which p(tv) < 0."""
    for power in range(max(8, min(400, MOST_POWERS // (len(p.terms) * len(p.variables))))):
        point = tuple(Fraction(x * 2**power) for x in v)
        if p.at(point) < 0:
            return _at(p, point, why)
    return f"{why}, but p is negative farther out than is looked at"


def _at(p: Polynomial, point: Point, why: str) -> Decision:
    where = ", ".join(f"{v} = {x}" for v, x in zip(p.variables, point, strict=True))
    return Decision("not_sos", f"{why}: it is negative at {where}", point=point)


def leading(look: Look) -> Decision | str:
    p, most = look.p, look.p.degree
    for exponents, c in p.terms:
        if c < 0 and max(exponents, default=0) == most > 0 and sum(exponents) == most:
            axis = tuple(int(e > 0) for e in exponents)
            name = p.variables[axis.index(1)]
            return _far(p, axis, f"the coefficient {c} of {name}^{most} is negative")
    return "no pure power of the highest degree has a negative coefficient"


def point(look: Look) -> Decision | str:
    p = look.p
    if not p.variables:
        value = p.at(())
        constant = ((), Fraction(1))
        return Decision("not_sos", "a negative constant", functional=(constant,)) if value < 0 else "nowhere negative"
    found = below_zero(Problem(p), {}) or lowest(p, look.rng)
    return "no point found where it is negative" if found is None else _at(p, found, "a grid, then descents")


def special_case(p: Polynomial) -> str | None:
    """The case, if it is one, in which every nonnegative polynomial is a sum of squares."""
    form = p.is_form
    if p.degree == 2:
        return "a quadratic"
    if len(p.variables) == 1 and p.degree % 2 == 0:
        return "one variable"
    if p.degree == 4 and len(p.variables) == 2:
        return "a quartic in two variables"
    if p.degree == 4 and len(p.variables) == 3 and form:
        return "a quartic form in three variables"
    return "a multiple of |x|^4 and a quadratic" if regularised(p) else None


def special(look: Look) -> Decision | str:
    p = look.p
    case = special_case(p)
    if case is None:
        return "no case in which nonnegative is enough"
    s = regularised(p)
    if (p.degree != 2 and s is None) or len(p.variables) >= MOST_BASIS:
        return f"{case}: a sum of squares if nonnegative, which this does not decide"
    low = {exponents: c for exponents, c in p.terms if sum(exponents) <= 2}
    matrix, t = quadratic(low, len(p.variables)), Fraction(0)
    if s is not None:
        t = level(matrix, float(s))
        matrix = shifted(matrix, s, t)
    units = [tuple(int(i == j) for j in range(len(p.variables))) for i in range(len(p.variables))]
    squares = _eliminated(matrix, [*units, (0,) * len(p.variables)])
    if squares is not None:
        ball = [(s, [(tuple(2 * e for e in u), Fraction(1)) for u in units] + [((0,) * len(units), -t)])] if s else []
        return Decision("exact", f"{case}, by elimination", squares=(*_whole(ball), *squares))
    vector = np.linalg.eigh(np.array(matrix, dtype=float))[1][:, 0]
    start = {(0,) * len(units): 1.0, **dict(zip(units, (vector[:-1] / (vector[-1] or 1e-6)).tolist(), strict=True))}
    found = below_zero(Problem(p), start)
    return f"{case}, which elimination does not decide" if found is None else _at(p, found, case)


def _whole(squares: list[exact.Square]) -> list[exact.Square]:
    return [(weight, [(m, c) for m, c in terms if c]) for weight, terms in squares]


def form(look: Look) -> Decision | str:
    plain = _even(look.p)
    if plain is not None:
        return Decision("exact", "even powers with positive coefficients", squares=tuple(plain))
    seen = visible(look.text, look.p) if look.text else None
    return "no squares are visible" if seen is None else Decision("exact", "squares as written", squares=tuple(seen))


def _even(p: Polynomial) -> list[exact.Square] | None:
    if any(c < 0 or any(e % 2 for e in exponents) for exponents, c in p.terms):
        return None
    return [(c, [(tuple(e // 2 for e in exponents), Fraction(1))]) for exponents, c in p.terms]


PIECE = re.compile(
    r"(?P<number>[0-9.]+(?:[eE][+-]?[0-9]+)?)?\s?\*?\s?(?P<inner>\(.*\))\s?(?:\^|\*\*)\s?(?P<power>[0-9]{1,9})"
)


def visible(text: str, p: Polynomial) -> list[exact.Square] | None:
    """The squares of a text that is a sum of c*(...)^2k and of even powers; None if it is anything else."""
    found: list[exact.Square] = []
    for piece in _pieces(text):
        match = PIECE.fullmatch(piece)
        try:
            if match is None:
                even = _even(polynomial(piece))
                if even is None:
                    return None
                found += [(c, _over(polynomial(piece), p, terms)) for c, terms in even]
                continue
            power, weight = int(match["power"]), polynomial(match["number"] or "1").at(())
            if power % 2 or power == 0 or not weight:
                return None
            inner = polynomial(f"({match['inner']})^{power // 2}")
            found.append((weight, _over(inner, p, inner.terms)))
        except LuthierError:
            return None
    return found or None


def _pieces(text: str) -> Iterator[str]:
    """The text cut at every + outside brackets."""
    depth, start = 0, 0
    for at, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if sign == "+" and depth == 0 and text[at - 1 : at] not in ("e", "E"):
            yield text[start:at].strip()
            start = at + 1
    yield text[start:].strip()


def _over(
    q: Polynomial, p: Polynomial, terms: Sequence[tuple[Exponents, Fraction]]
) -> list[tuple[Exponents, Fraction]]:
    """Terms of q over the variables of p, which has all of them if q's square is a part of p."""
    if not set(q.variables) <= set(p.variables):
        raise LuthierError("a variable of one square does not occur in the sum")
    place = [q.variables.index(v) if v in q.variables else None for v in p.variables]
    return [(tuple(0 if i is None else exponents[i] for i in place), c) for exponents, c in terms]


def even_gram(look: Look) -> Decision | str:
    candidates = gram.box(look.p) if look.p.terms else []
    basis = gram.consistent(look.p, candidates) if candidates else []
    if not basis or len(basis) > MOST_BASIS:
        return f"a Gram matrix over {len(basis)} monomials is not looked at"
    places: dict[Exponents, list[tuple[int, int]]] = {}
    for i, j in itertools.product(range(len(basis)), repeat=2):
        places.setdefault(tuple(map(int.__add__, basis[i], basis[j])), []).append((i, j))
    if any(m not in places for m in look.p.support):
        return "no Gram matrix: a monomial is no product of two that squares may hold"
    coefficients, unit = dict(look.p.terms), max(abs(c) for _, c in look.p.terms)
    matrix = [[Fraction(0)] * len(basis) for _ in basis]
    for m, several in places.items():
        for i, j in several:
            matrix[i][j] = coefficients.get(m, Fraction(0)) / len(several)
    least = np.linalg.eigvalsh(np.array([[float(x / unit) for x in row] for row in matrix]))[0]
    squares = _eliminated(matrix, basis) if least > -1e-9 else None
    if squares is None:
        return "the Gram matrix with equal shares is not positive semidefinite"
    return Decision("exact", f"the Gram matrix with equal shares over {len(basis)} monomials", squares=tuple(squares))


def _eliminated(matrix: exact.Matrix, basis: Sequence[Exponents]) -> list[exact.Square] | None:
    """The squares of a positive semidefinite matrix over plain monomials."""
    factors = exact.ldl(matrix)
    if factors is None:
        return None
    return [(d, [(b, c) for b, c in zip(basis, column, strict=True) if c]) for d, column in factors]


CRITERIA: dict[str, Callable[[Look], Decision | str]] = {
    "degree": degree, "leading": leading, "point": point, "special": special, "form": form, "gram": even_gram,
}  # fmt: skip
