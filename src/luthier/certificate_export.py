"""A certificate as mathematics: plain text and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.certificate import Certificate

GREEK = re.compile(
    "alpha|beta|[Gg]amma|[Dd]elta|epsilon|zeta|eta|[Tt]heta|iota|kappa|[Ll]ambda|mu|nu|[Xx]i|[Pp]i|rho|[Ss]igma|tau|"
    "[Uu]psilon|[Pp]hi|chi|[Pp]si|[Oo]mega"
)


LONG = 2000
"""letters of a claim that is not proven, at most: where it is, the identity is about all of it"""


def text_of(made: Certificate) -> str:
    """The verdict, the claim, and what proves it: the identity, or what was tried."""
    from luthier.certificate import written

    def poly(terms: Any) -> str:
        return written(made.variables, terms)

    bound = Fraction(made.bound)
    claim = claim_of(made) if made.status == "exact" else claim_of(made, LONG)
    lines = [f"{made.status}: {made.reason}", claim]
    if made.status == "exact":
        left = made.problem + (f" {'+' if bound < 0 else '-'} {abs(bound)}" if bound else "")
        if made.multiplier:
            left = f"({_sum_text(poly, made.multiplier)})*({left})"
        parts = [_sum_text(poly, made.squares)] if made.squares else []
        for which, squares in weighted(made):
            parts.append("*".join([f"({_sum_text(poly, squares)})", *(f"({poly(made.nonneg[k])})" for k in which)]))
        pairs = zip(made.cofactors, made.zero, strict=False)
        parts += [f"({poly(c)})*({poly(h)})" for c, h in pairs if c]
        lines += [left] * (left != claim) + [f"= {' + '.join(parts) or '0'}"]
    else:
        lines += [f"tried: {step}" for step in made.tried]
    lines += [f"about as low at {_point_text(made.variables, at)}" for at in made.minimisers]
    return "\n".join(lines)


def claim_of(made: Certificate, most: int = 1 << 30) -> str:
    """p >= bound where ..., and p alone if no more is asked than squares. most: letters of p, and of where."""
    from luthier.certificate import written

    where = [f"{written(made.variables, g)} >= 0" for g in made.nonneg]
    where += [f"{written(made.variables, h)} = 0" for h in made.zero]
    p, conditions = (cut if len(cut) <= most else f"{cut[: most - 4]} ..." for cut in (made.problem, ", ".join(where)))
    if where:
        return f"{p} >= {made.bound} where {conditions}"
    return f"{p} >= {made.bound}" if made.multiplier or made.bound != "0" else p


def _sum_text(poly: Any, squares: Any) -> str:
    each = [f"{'' if Fraction(weight) == 1 else weight + '*'}({poly(terms)})^2" for weight, terms in squares]
    return " + ".join(each) or "0"


def _point_text(variables: Sequence[str], point: Sequence[str]) -> str:
    return ", ".join(f"{v} = {x}" for v, x in zip(variables, point, strict=True))


def latex_of(made: Certificate) -> str:
    """The proof as LaTeX (amsmath); LuthierError where there is none."""
    must_hold(made)
    names, notes = [_latex_name(v) for v in made.variables], []
    if len(set(names)) < len(names):  # x1 and x_1 look the same
        names = [f"v_{{{i}}}" for i in range(1, len(names) + 1)]
        notes = [f"% {n} is {printable(v)}" for n, v in zip(names, made.variables, strict=True)]

    def poly(terms: Any) -> str:
        return written_with(names, terms, _latex_number, "^{{{}}}", r"\,")

    bound = Fraction(made.bound)
    conditions = [rf"{poly(g)} \ge 0" for g in made.nonneg] + [f"{poly(h)} = 0" for h in made.zero]
    where = " wherever $" + "$, $".join(conditions) + "$" if conditions else ""
    head = [*notes, "Let", r"\[", f"p = {poly(made.polynomial)}.", r"\]"]
    if made.status == "exact":
        return "\n".join([*head, *_latex_identity(made, poly, bound), _latex_end(made, poly, bound, where)])
    if made.point:
        at = ",\\, ".join(f"{n} = {_latex_number(Fraction(x))}" for n, x in zip(names, made.point, strict=True))
        value = _latex_number(_at(made.polynomial, made.point))
        met = f", where ${'$, $'.join(conditions)}$" if conditions else ""
        return "\n".join([*head, f"At ${at}${met}, $p = {value} < {_latex_number(bound)}$." if at else
                          f"$p = {value} < {_latex_number(bound)}$."])  # fmt: skip
    return "\n".join([*head, *_latex_functional(made, poly, bound)])


def _less(bound: Fraction) -> str:
    """p less the bound."""
    return "p" if not bound else f"p {'+' if bound < 0 else '-'} {_latex_number(abs(bound))}"


def _latex_identity(made: Certificate, poly: Any, bound: Fraction) -> list[str]:
    def squares(several: Any) -> list[str]:
        return [
            f"{'' if Fraction(w) == 1 else _latex_number(Fraction(w)) + ' '}\\left({poly(t)}\\right)^{{2}}"
            for w, t in several
        ]

    left = _less(bound)
    if made.multiplier:
        left = rf"\left({' + '.join(squares(made.multiplier))}\right)\left({left}\right)"
    parts = squares(made.squares)
    for which, several in weighted(made):
        factors = "".join(rf"\left({poly(made.nonneg[k])}\right)" for k in which)
        parts.append(rf"\left({' + '.join(squares(several))}\right){factors}")
    pairs = zip(made.cofactors, made.zero, strict=False)
    parts += [rf"\left({poly(c)}\right)\left({poly(h)}\right)" for c, h in pairs if c]
    first, *rest = parts or ["0"]
    rows = [f"{left} &= {first}", *(f"&\\quad + {part}" for part in rest)]
    return ["Then", r"\begin{align*}", " \\\\\n".join(rows) + ".", r"\end{align*}"]


def _latex_end(made: Certificate, poly: Any, bound: Fraction, where: str) -> str:
    hence = rf"Hence $p \ge {_latex_number(bound)}${where}"
    if made.multiplier and not steady(made):
        return f"{hence}: the multiplier is positive on a dense set, and $p$ is continuous."
    return f"{hence}."


def _latex_functional(made: Certificate, poly: Any, bound: Fraction) -> list[str]:
    values = [rf"L({poly(((m, '1'),))}) &= {_latex_number(Fraction(c))}" for m, c in made.functional]
    at = {m: Fraction(c) for m, c in made.functional}
    constant = (0,) * len(made.variables)
    value = sum((Fraction(c) * at.get(m, 0) for m, c in made.polynomial), Fraction(0)) - bound * at.get(constant, 0)
    basis = ", ".join(poly(((b, "1"),)) for b in made.basis)
    return [
        r"Let the linear functional $L$ be 0 on all monomials but", r"\begin{align*}",
        " \\\\\n".join(values) + ".", r"\end{align*}",
        rf"A square in a sum of squares that equals ${_less(bound)}$ holds no monomials but ${basis}$.",
        rf"$L$ is nonnegative on such squares: the matrix of its values on products of two of them is positive "
        rf"semidefinite. But $L({_less(bound)}) = {_latex_number(value)} < 0$: it is no sum of squares.",
    ]  # fmt: skip


def _latex_number(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number)
    return rf"{'-' if number < 0 else ''}\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


def _latex_name(name: str) -> str:
    """x_{12} for x12, \\alpha for alpha, \\mathit{mass} for a word."""
    head, digits = re.fullmatch(r"(.*?)_?(\d*)", name, re.S).groups()  # type: ignore[union-attr]
    head = head.removeprefix("\\")
    plain = "".join(c if c.isalnum() else r"\_" if c == "_" else "?" for c in head)
    shown = f"\\{head}" if GREEK.fullmatch(head) else plain if len(head) == 1 else rf"\mathit{{{plain}}}"
    return f"{shown}_{{{digits}}}" if digits else shown


def printable(name: str) -> str:
    """A name that stays on its line."""
    return "".join(c if c.isprintable() else "?" for c in name)


def must_hold(made: Certificate) -> None:
    if made.status not in ("exact", "not_sos"):
        raise LuthierError(f"a verdict that is {made.status} has no proof to write down")
    why = made.refusal()
    if why:
        raise LuthierError(f"the proof does not hold: {why}")


def weighted(made: Certificate) -> list[Any]:
    """The weighted sums that hold a square."""
    return [(which, squares) for which, squares in made.weighted if squares]


def steady(made: Certificate) -> bool:
    """Whether the multiplier holds a constant square, and so is positive everywhere."""
    return any(terms and not any(e for m, _ in terms for e in m) for _, terms in made.multiplier)


def _at(terms: Any, point: Sequence[str]) -> Fraction:
    total = Fraction(0)
    for monomial, c in terms:
        value = Fraction(c)
        for x, e in zip(point, monomial, strict=True):
            value *= Fraction(x) ** e
        total += value
    return total


def written_with(names: Sequence[str], terms: Iterable[Any], number: Any, power: str, times: str) -> str:
    """A polynomial with its own way to write numbers, powers and products."""
    text = ""
    for exponents, coefficient in terms:
        c = Fraction(coefficient)
        factors = [n if e == 1 else n + power.format(e) for n, e in zip(names, exponents, strict=True) if e]
        if abs(c) != 1 or not factors:
            factors.insert(0, number(abs(c)))
        sign = ("-" if c < 0 else "") if not text else (" - " if c < 0 else " + ")
        text += sign + times.join(factors)
    return text or "0"
