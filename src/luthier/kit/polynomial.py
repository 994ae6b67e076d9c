"""Polynomials with rational coefficients: one canonical record, made from text, a map, arrays or a SymPy object.

Whatever comes in is bounded before work is done on it; what does not fit is refused with one line.
Floats count as the decimal number they print as: 0.1 is one tenth.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from luthier.certificate import written
from luthier.errors import LuthierError

MAX_VARIABLES, MAX_DEGREE, MAX_TERMS, MAX_BITS = 256, 256, 20_000, 8192
Exponents = tuple[int, ...]
Terms = Mapping[Exponents, Fraction]


@dataclass(frozen=True)
class Polynomial:
    """Variables that occur, in natural order, and (exponents, coefficient) of every term, largest first."""

    variables: tuple[str, ...]
    terms: tuple[tuple[Exponents, Fraction], ...]

    @property
    def support(self) -> tuple[Exponents, ...]:
        return tuple(exponents for exponents, _ in self.terms)

    @property
    def degree(self) -> int:
        return max((sum(exponents) for exponents in self.support), default=0)

    @property
    def is_form(self) -> bool:
        """Whether all terms have one degree, above 0."""
        return self.degree > 0 and all(sum(exponents) == self.degree for exponents in self.support)

    def at(self, point: Sequence[Fraction | int]) -> Fraction:
        """The exact value at a point."""
        total = Fraction(0)
        for exponents, coefficient in self.terms:
            total += coefficient * math.prod(x**e for x, e in zip(point, exponents, strict=True))
        return total

    def __str__(self) -> str:
        return written(self.variables, self.terms)


def polynomial(value: Any) -> Polynomial:
    """The polynomial that text, a number, a map {exponents: coefficient}, an array or a SymPy object stands for.

    An array c holds at [i, j, ...] the coefficient of x1^i*x2^j*...; a pair (exponents, coefficients) holds one
    term in each row.
    """
    if isinstance(value, Polynomial):
        return value
    if isinstance(value, str):
        from luthier.kit.polynomial_text import parse

        return canonical(*parse(value))
    if isinstance(value, Mapping):
        return _of_map(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return canonical((), {(): rational(value)})
    if hasattr(value, "as_poly") or getattr(value, "is_Relational", False):
        return _of_sympy(value)
    if isinstance(value, tuple) and len(value) == 2:
        return _of_rows(*value)
    if hasattr(value, "__array__") and hasattr(value, "ndim"):
        return _of_array(value)
    raise LuthierError(f"expected a polynomial, got {type(value).__name__}",
                       do="write text such as x^2 + 1, or a map such as {(2, 0): 1}")  # fmt: skip


def relations(text: str) -> tuple[str, list[Polynomial]]:
    """(">=" or "=", what is then >= 0 or = 0) of text such as 1 - x^2 >= 0, x = y or 0 <= x <= 1."""
    from luthier.kit.polynomial_text import relation

    sign, found = relation(text)
    return sign, [canonical(*each) for each in found]


def canonical(variables: Sequence[str], terms: Terms) -> Polynomial:
    """Terms that vanish and variables that do not occur left out, the rest in a fixed order."""
    terms = {exponents: c for exponents, c in terms.items() if c}
    if len(terms) > MAX_TERMS:
        raise LuthierError(f"the polynomial has {len(terms)} terms, {MAX_TERMS} are allowed")
    common = 1
    for c in terms.values():
        common = math.lcm(common, c.denominator)
        if common.bit_length() > MAX_BITS:
            raise LuthierError(f"the coefficients' common denominator has more than {MAX_BITS} bits")
    used = [i for i in range(len(variables)) if any(exponents[i] for exponents in terms)]
    order = sorted(used, key=lambda i: natural(variables[i]))
    moved = [(tuple(exponents[i] for i in order), c) for exponents, c in terms.items()]
    return Polynomial(tuple(variables[i] for i in order), tuple(sorted(moved, key=lambda t: _rank(t[0]))))


def natural(name: str) -> tuple:
    """x2 before x10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def _rank(exponents: Exponents) -> tuple:
    """Higher degree first, then lexicographic."""
    return -sum(exponents), tuple(-e for e in exponents)


def graded(monomials: Iterable[Exponents]) -> list[Exponents]:
    """Monomials in the order in which a polynomial is written."""
    return sorted(monomials, key=_rank)


def rational(value: Any) -> Fraction:
    """An exact coefficient; floats by the decimal they print as."""
    if isinstance(value, numbers.Rational) and not isinstance(value, bool):
        found = Fraction(int(value.numerator), int(value.denominator))
    elif isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        found = Fraction(str(value) if hasattr(value, "dtype") else repr(float(value)))
    elif isinstance(value, str) and len(value) < MAX_BITS // 4 and re.fullmatch(r"[+-]?\d+(/0*[1-9]\d*)?", value):
        found = Fraction(value)
    else:
        raise LuthierError(f"the coefficient {str(value)[:40]} is no rational number", do="write it as 1/3 or 0.25")
    if max(found.numerator.bit_length(), found.denominator.bit_length()) > MAX_BITS:
        raise LuthierError(f"a coefficient of more than {MAX_BITS} bits")
    return found


def _of_map(value: Mapping) -> Polynomial:
    if len(value) > MAX_TERMS:
        raise LuthierError(f"the polynomial has {len(value)} terms, {MAX_TERMS} are allowed")
    terms = {checked(key): rational(c) for key, c in value.items()}
    lengths = {len(key) for key in terms}
    if len(lengths) > 1:
        raise LuthierError(f"exponents of {min(lengths)} and of {max(lengths)} variables in one map")
    return canonical([f"x{i + 1}" for i in range(lengths.pop() if lengths else 0)], terms)


def checked(key: Any) -> Exponents:
    """A tuple of whole numbers from 0, within the limits."""
    if not isinstance(key, tuple) or not all(isinstance(e, int) and not isinstance(e, bool) and e >= 0 for e in key):
        raise LuthierError(f"{str(key)[:40]} is no tuple of exponents", do="write keys such as (2, 0)")
    if len(key) > MAX_VARIABLES or sum(key) > MAX_DEGREE:
        raise LuthierError(f"a term of degree {sum(key)} in {len(key)} variables",
                           do=f"at most degree {MAX_DEGREE} in {MAX_VARIABLES} variables")  # fmt: skip
    return key


def _of_array(value: Any) -> Polynomial:
    import numpy as np

    array = np.asarray(value)
    if array.ndim > MAX_VARIABLES or array.dtype.kind not in "iufO":
        raise LuthierError(f"an array of {array.dtype} holds no coefficients", do="give an array of numbers")
    try:
        places = np.argwhere(array != 0)  # NaN is not 0 either
    except (TypeError, ValueError):
        raise LuthierError("an array of objects that are no numbers", do="give an array of numbers") from None
    if len(places) > MAX_TERMS:
        raise LuthierError(f"the polynomial has {len(places)} terms, {MAX_TERMS} are allowed")
    return _of_map({key: array[key] for key in map(tuple, places.tolist())})


def _of_rows(exponents: Any, coefficients: Any) -> Polynomial:
    """Terms row by row; those of equal exponents are added."""
    try:
        rows, count = len(exponents), len(coefficients)
    except TypeError:
        raise LuthierError("a pair that is no (exponents, coefficients)", do="give two arrays") from None
    if rows != count or rows > MAX_TERMS:
        raise LuthierError(f"{rows} rows of exponents and {count} coefficients",
                           do=f"give as many of both, at most {MAX_TERMS}")  # fmt: skip
    terms: dict[Exponents, Fraction] = {}
    for row, c in zip(exponents, coefficients, strict=True):
        key = checked(_row(row))
        terms[key] = terms.get(key, Fraction(0)) + rational(c)
    return _of_map(terms)


def _row(row: Any) -> Any:
    """The exponents of a term, which may be a list or a row of an array."""
    if isinstance(row, (list, tuple)):
        return tuple(row)
    if getattr(row, "ndim", 0) != 1:
        raise LuthierError(f"a {type(row).__name__} is no row of exponents", do="give an array of terms x variables")
    return tuple(row.tolist())


def _of_sympy(value: Any) -> Polynomial:
    """By what SymPy's expressions and polynomials offer; SymPy itself is not imported."""
    if getattr(value, "is_Relational", False):
        raise LuthierError(f"{str(value)[:60]} is a relation, not a polynomial", do="give one side less the other")
    symbols = sorted(str(s) for s in value.free_symbols)
    if not symbols and not hasattr(value, "gens"):
        return canonical((), {(): rational(value)})
    poly = value if hasattr(value, "gens") else value.as_poly(*value.free_symbols)
    if poly is None or not all(getattr(g, "is_Symbol", False) for g in poly.gens):
        raise LuthierError(f"{str(value)[:60]} is no polynomial in {', '.join(symbols)}")
    if getattr(poly.domain, "is_FiniteField", False):
        raise LuthierError(f"{str(value)[:60]} counts modulo {poly.domain.characteristic()}", do="leave out modulus")
    return canonical([str(g) for g in poly.gens], {checked(tuple(k)): rational(c) for k, c in poly.terms()})
