"""Polynomials read from text: a small grammar of our own, nothing evaluated, every step counted.

    x^4 + 2*x**2*y - 1/3      x1^2 + 0.25 x2 x3      (x + y)^2 (x - y)^2 / 4      x(1)^2 + 1e-3

A name is one variable (`xy` is not x times y); x(1) and x[1] are x1. A product may be written without a
sign before a name or a bracket. Numbers are exact: 0.1 is one tenth, 2e3 is two thousand. Whatever is
not a polynomial is refused with the column; so are texts, powers and nestings beyond the limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from luthier.errors import LuthierError
from luthier.kit.polynomial import MAX_BITS, MAX_DEGREE, MAX_TERMS, MAX_VARIABLES, Exponents

MAX_TEXT, MAX_NAME, MAX_DEPTH, MAX_WORK = 100_000, 64, 40, 200_000
MAX_DIGITS = 2500
"""of a number: what MAX_BITS bits may print as, so that what is written reads back"""
TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\(\d+\)|\[\d+\])?)|(?P<sign>\*\*|[-+*/^()])",
    re.ASCII,
)
INSTEAD = {
    "−": "write -", "–": "write -", "—": "write -", "×": "write *", "·": "write *", "⋅": "write *", "∗": "write *",
    "÷": "write /", "²": "write ^2", "³": "write ^3", "⁴": "write ^4", "=": "give the polynomial alone, without =",
    ">": "give the polynomial alone, without >", "<": "give the polynomial alone, without <",
    ",": "decimals take a point", "{": "use round brackets", "[": "use round brackets", "√": "roots are not rational",
}  # fmt: skip
Sum = dict[Exponents, Fraction]


@dataclass(frozen=True)
class Token:
    """A piece of text. kind: number, name, sign or end."""

    kind: str
    text: str
    column: int


def parse(text: str) -> tuple[list[str], Sum]:
    """The variables in order of appearance, and {exponents: coefficient}."""
    if len(text) > MAX_TEXT:
        raise LuthierError(f"the polynomial's text has {len(text)} characters, {MAX_TEXT} are allowed")
    tokens = list(_tokens(text))
    names = list(dict.fromkeys(t.text for t in tokens if t.kind == "name"))
    if max(map(len, names), default=0) > MAX_NAME:
        raise LuthierError(f"a variable's name has {max(map(len, names))} letters, {MAX_NAME} are allowed")
    if len(names) > MAX_VARIABLES:
        raise LuthierError(f"the polynomial has {len(names)} variables, {MAX_VARIABLES} are allowed")
    return names, _Reader(tokens, names).whole()


def relation(text: str) -> tuple[str, list[tuple[list[str], Sum]]]:
    """The sign, ">=" or "=", and what is then >= 0 or = 0; of left <= right, left = right or 0 <= x <= 1."""
    if len(text) > MAX_TEXT:
        raise LuthierError(f"the relation has {len(text)} characters, {MAX_TEXT} are allowed")
    signs = list(re.finditer(r">=|<=|==?|[<>≤≥⩽⩾]", text))
    kinds = {found[0].strip("=") or "=" for found in signs}
    strict = next((found for found in signs if found[0] in "<>≤≥⩽⩾"), None)
    if strict:
        sign = "<=" if strict[0] in "<≤⩽" else ">="
        raise _fault(f"{strict[0]!r} has no meaning in a constraint", strict.start() + 1, f"write {sign}")
    if len(kinds) != 1 or len(signs) > 8:
        what = "holds no relation" if not signs else "holds relations that do not go together"
        raise LuthierError(what, do="write one such as 1 - x^2 >= 0, x = 0 or 0 <= x <= 1")
    ends = [0, *(found.end() for found in signs)]
    sides = [_side(text, at, end) for at, end in zip(ends, [*(f.start() for f in signs), len(text)], strict=True)]
    pairs = [(b, a) if "<" in kinds else (a, b) for a, b in zip(sides, sides[1:], strict=False)]
    return "=" if kinds == {"="} else ">=", [_less(a, b) for a, b in pairs]


def _side(text: str, at: int, end: int) -> tuple[list[str], Sum]:
    """One side of a relation; what is wrong is placed in the whole text."""
    return parse(" " * at + text[at:end])


def _less(left: tuple[list[str], Sum], right: tuple[list[str], Sum]) -> tuple[list[str], Sum]:
    """The difference, over the variables of both."""
    names = list(dict.fromkeys([*left[0], *right[0]]))
    total: Sum = {}
    for sign, (mine, terms) in ((1, left), (-1, right)):
        place = [names.index(name) for name in mine]
        for exponents, c in terms.items():
            wide = [0] * len(names)
            for i, e in zip(place, exponents, strict=True):
                wide[i] = e
            total[tuple(wide)] = total.get(tuple(wide), Fraction(0)) + sign * c
    return names, total


def _tokens(text: str) -> Iterator[Token]:
    at = 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise _fault(f"{text[at]!r} has no meaning in a polynomial", at + 1, INSTEAD.get(text[at]))
        kind, word = str(match.lastgroup), match[0]
        if kind == "name":
            word = re.sub(r"[()\[\]]", "", word)
        if kind != "space":
            yield Token(kind, word, at + 1)
        at = match.end()
    yield Token("end", "", len(text) + 1)


def _fault(what: str, column: int, do: str | None = None) -> LuthierError:
    return LuthierError(what, where=f"column {column}", do=do)


class _Reader:
    """Recursive descent over the tokens; `work` counts what has been done so far."""

    def __init__(self, tokens: list[Token], names: list[str]):
        self.tokens, self.at, self.depth, self.work = tokens, 0, 0, 0
        self.place = {name: i for i, name in enumerate(names)}
        self.one: Exponents = (0,) * len(names)

    @property
    def next(self) -> Token:
        return self.tokens[self.at]

    def take(self, *signs: str) -> Token | None:
        """The next token if it is one of these signs."""
        token = self.next
        if token.kind != "sign" or token.text not in signs:
            return None
        self.at += 1
        return token

    def whole(self) -> Sum:
        found = self.sum()
        if self.next.kind != "end":
            raise self.unexpected()
        return found

    def unexpected(self) -> LuthierError:
        token = self.next
        if token.kind == "end":
            return _fault("the polynomial ends too soon", token.column, "close brackets, and end with a term")
        do = "write a power as x^2 and a product as 2*x" if token.kind == "number" else None
        return _fault(f"{token.text!r} does not fit here", token.column, do)

    def sum(self) -> Sum:
        total: Sum = {}
        first = True
        while first or (self.next.kind == "sign" and self.next.text in "+-"):
            sign, column = self.signs(), self.next.column
            first = False
            for exponents, c in self.product().items():
                total[exponents] = self.bounded(total.get(exponents, Fraction(0)) + sign * c, column)
        return total

    def signs(self) -> int:
        """The product of the signs before a term."""
        sign = 1
        while token := self.take("+", "-"):
            sign = -sign if token.text == "-" else sign
        return sign

    def product(self) -> Sum:
        before = self.next
        total = self.power()
        while True:
            if self.take("*"):
                before = self.next
                total = self.times(total, self.power(), before.column)
            elif token := self.take("/"):
                before = self.next
                total = self.over(total, self.power(), token.column)
            elif self.next.kind == "name" or (self.next.kind == "sign" and self.next.text == "("):
                if before.kind == "name" and self.next.text == "(":
                    do = f"write {before.text}*(...) for a product; functions are no polynomials"
                    raise _fault(f"'{before.text}(' reads like a function", before.column, do)
                before = self.next
                total = self.times(total, self.power(), before.column)
            else:
                return total

    def power(self) -> Sum:
        base, column = self.atom(), self.next.column
        if not self.take("^", "**"):
            return base
        exponent = self.exponent(column)
        if self.next.kind == "sign" and self.next.text in ("^", "**"):
            raise _fault("a power of a power", self.next.column, "use brackets: (x^2)^3")
        total: Sum = {self.one: Fraction(1)}
        while exponent:  # by squares
            if exponent & 1:
                total = self.times(total, base, column)
            exponent >>= 1
            if exponent:
                base = self.times(base, base, column)
        return total

    def exponent(self, column: int) -> int:
        bracket, token = self.take("("), self.next
        if token.kind != "number" or not token.text.isdigit():
            raise _fault("an exponent is a whole number from 0", token.column, "write x^2, and 1/4 for 2^-2")
        self.at += 1
        if bracket and not self.take(")"):
            raise self.unexpected()
        if len(token.text) > 9 or int(token.text) > MAX_DEGREE:
            raise _fault(f"the exponent {token.text[:12]} is too large", token.column, f"at most {MAX_DEGREE}")
        return int(token.text)

    def atom(self) -> Sum:
        token = self.next
        if token.kind == "number":
            self.at += 1
            return {self.one: self.bounded(_number(token), token.column)}
        if token.kind == "name":
            self.at += 1
            i = self.place[token.text]
            return {(*self.one[:i], 1, *self.one[i + 1 :]): Fraction(1)}
        if not self.take("("):
            raise self.unexpected()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _fault(f"brackets nest deeper than {MAX_DEPTH}", token.column)
        found = self.sum()
        if not self.take(")"):
            raise self.unexpected()
        self.depth -= 1
        return found

    def times(self, a: Sum, b: Sum, column: int) -> Sum:
        self.work += len(a) * len(b) * (1 + len(self.one) // 16)
        if self.work > MAX_WORK:
            raise _fault("the polynomial is too large when multiplied out", column, "give it in expanded form")
        if _degree(a) + _degree(b) > MAX_DEGREE:
            raise _fault(f"the degree is above {MAX_DEGREE}", column)
        total: Sum = {}
        for left, x in a.items():
            for right, y in b.items():
                key = tuple(map(int.__add__, left, right))
                total[key] = self.bounded(total.get(key, Fraction(0)) + x * y, column)
        if len(total) > MAX_TERMS:
            raise _fault(f"the polynomial has more than {MAX_TERMS} terms", column)
        return total

    def over(self, a: Sum, b: Sum, column: int) -> Sum:
        divisor = {exponents: c for exponents, c in b.items() if c}
        if set(divisor) != {self.one}:
            what = "division by zero" if not divisor else "division by a variable"
            raise _fault(what, column, "divide by a number that is not 0")
        return {e: self.bounded(c / divisor[self.one], column) for e, c in a.items()}

    def bounded(self, number: Fraction, column: int) -> Fraction:
        if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
            raise _fault(f"a coefficient grows beyond {MAX_BITS} bits", column)
        return number


def _degree(terms: Sum) -> int:
    return max(map(sum, terms), default=0)


def _number(token: Token) -> Fraction:
    mantissa, _, power = token.text.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(power) > 5 or abs(int(power or 0)) > MAX_DIGITS:
        raise _fault(f"a number of more than {MAX_DIGITS} digits", token.column)
    return Fraction(token.text)
