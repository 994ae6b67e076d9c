"""A certificate as mathematics: plain text, LaTeX, and a theorem for Lean 4 with Mathlib.

The Lean text states p >= bound over the reals and proves it by the certificate's identity (`ring`), the signs of
its parts (`positivity`, `mul_nonneg`) and one division by the multiplier; nothing is searched for. No Lean runs
here: names and syntax follow Mathlib's sources, and the tests read the identity back from the text.
"""

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
LEAN_NAME = re.compile(r"[A-Za-z][0-9]*", re.ASCII)
"""A variable that is a name in Lean, no word of its language, and none that the theorem uses."""


def text_of(made: Certificate) -> str:
    """The verdict, and what proves it: the identity, or what was tried."""
    from luthier.certificate import written

    def poly(terms: Any) -> str:
        return written(made.variables, terms)

    bound = Fraction(made.bound)
    claim = poly(made.polynomial) + (f" >= {bound}" if bound else "")
    where = [f"{poly(g)} >= 0" for g in made.nonneg] + [f"{poly(h)} = 0" for h in made.zero]
    lines = [f"{made.status}: {claim}{' where ' + ', '.join(where) if where else ''}: {made.reason}"]
    if made.status == "exact":
        left = f"{poly(made.polynomial)} {'+' if bound < 0 else '-'} {abs(bound)}" if bound else ""
        if made.multiplier:
            left = f"({_sum_text(poly, made.multiplier)})*({left or poly(made.polynomial)})"
        parts = [_sum_text(poly, made.squares)] if made.squares else []
        for which, squares in made.weighted:
            parts.append("*".join([f"({_sum_text(poly, squares)})", *(f"({poly(made.nonneg[k])})" for k in which)]))
        pairs = zip(made.cofactors, made.zero, strict=False)
        parts += [f"({poly(c)})*({poly(h)})" for c, h in pairs if c]
        lines += [left] * bool(left) + [f"= {' + '.join(parts) or '0'}"]
    else:
        lines += [f"tried: {step}" for step in made.tried]
    lines += [f"about as low at {_point_text(made.variables, at)}" for at in made.minimisers]
    return "\n".join(lines)


def _sum_text(poly: Any, squares: Any) -> str:
    each = [f"{'' if Fraction(weight) == 1 else weight + '*'}({poly(terms)})^2" for weight, terms in squares]
    return " + ".join(each) or "0"


def _point_text(variables: Sequence[str], point: Sequence[str]) -> str:
    return ", ".join(f"{v} = {x}" for v, x in zip(variables, point, strict=True))


def latex_of(made: Certificate) -> str:
    """The proof as LaTeX (amsmath); LuthierError where there is none."""
    _must_hold(made)
    names = [_latex_name(v) for v in made.variables]

    def poly(terms: Any) -> str:
        return _written(names, terms, _latex_number, "^{{{}}}", r"\,")

    bound = Fraction(made.bound)
    conditions = [rf"{poly(g)} \ge 0" for g in made.nonneg] + [f"{poly(h)} = 0" for h in made.zero]
    where = " wherever $" + "$, $".join(conditions) + "$" if conditions else ""
    head = ["Let", r"\[", f"p = {poly(made.polynomial)}.", r"\]"]
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
    for which, several in made.weighted:
        factors = "".join(rf"\left({poly(made.nonneg[k])}\right)" for k in which)
        parts.append(rf"\left({' + '.join(squares(several)) or 0}\right){factors}")
    pairs = zip(made.cofactors, made.zero, strict=False)
    parts += [rf"\left({poly(c)}\right)\left({poly(h)}\right)" for c, h in pairs if c]
    first, *rest = parts or ["0"]
    rows = [f"{left} &= {first}", *(f"&\\quad + {part}" for part in rest)]
    return ["Then", r"\begin{align*}", " \\\\\n".join(rows) + ".", r"\end{align*}"]


def _latex_end(made: Certificate, poly: Any, bound: Fraction, where: str) -> str:
    hence = rf"Hence $p \ge {_latex_number(bound)}${where}"
    if made.multiplier and not _steady(made):
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
    plain = "".join(c if c.isalnum() else r"\_" if c == "_" else "?" for c in head)
    shown = f"\\{head}" if GREEK.fullmatch(head) else plain if len(head) == 1 else rf"\mathit{{{plain}}}"
    return f"{shown}_{{{digits}}}" if digits else shown


def lean_of(made: Certificate, name: str = "certificate") -> str:
    """A file for Lean 4 with Mathlib that proves what the certificate proves; LuthierError where it cannot be said."""
    _must_hold(made)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name, re.ASCII):
        raise LuthierError(f"{name[:40]!r} is no name for a theorem", do="take letters, digits and _")
    names, notes = _lean_names(made.variables)

    def poly(terms: Any) -> str:
        return _written(names, terms, str, "^{}", "*")

    if made.status == "exact":
        body = _lean_exact(made, name, names, poly)
    elif made.point:
        body = _lean_point(made, name, names, poly)
    else:
        raise LuthierError("that no squares add up to it is not written in Lean", do="take LaTeX or JSON")
    return "\n".join(["import Mathlib", "", *notes, *body, ""])


def _lean_exact(made: Certificate, name: str, names: list[str], poly: Any) -> list[str]:
    def squares(several: Any) -> str:
        return " + ".join(f"{w} * ({poly(_upright(t))})^2" for w, t in several) or "0"

    facts, parts, proofs = [], [], []

    def part(text: str, proof: str) -> None:
        facts.append(f"  have part_{len(parts)} : 0 ≤ ({text} : ℝ) := {proof}")
        proofs.append(f"part_{len(parts)}")
        parts.append(f"({text} : ℝ)")

    if made.squares or not (made.weighted or made.cofactors):
        part(squares(made.squares), "by positivity" if made.squares else "le_rfl")
    for which, several in made.weighted:
        sign, text = "", ""
        for k in which:
            sign = f"mul_nonneg ({sign}) nonneg_{k}" if sign else f"nonneg_{k}"
            text = f"{text} * ({poly(made.nonneg[k])})" if text else f"({poly(made.nonneg[k])})"
        proof = "by positivity" if several else "le_rfl"
        part(f"({squares(several)}) * ({text})" if text else squares(several),
             f"mul_nonneg ({proof}) ({sign})" if sign else proof)  # fmt: skip
    for k, (c, h) in enumerate(zip(made.cofactors, made.zero, strict=False)):
        part(f"({poly(c)}) * ({poly(h)})", f"(mul_eq_zero_of_right _ zero_{k}).ge")
    total, signs = parts[0], proofs[0]
    for text, sign in zip(parts[1:], proofs[1:], strict=True):
        total, signs = f"{total} + {text}", f"add_nonneg ({signs}) {sign}"
    less = f"({poly(made.polynomial)} : ℝ) - ({made.bound} : ℝ)"
    left = f"({squares(made.multiplier)} : ℝ) * ({less})" if made.multiplier else less
    steps = [*facts, f"  have key : {left} = {total} := by ring", f"  have whole := ({signs}).trans_eq key.symm"]
    holds = "whole"
    if made.multiplier:
        holds = "nonneg_of_mul_nonneg_right whole positive"
        if _steady(made):
            steps.append(f"  have positive : 0 < ({squares(made.multiplier)} : ℝ) := by positivity")
    return [
        "set_option maxHeartbeats 0 in", "set_option maxRecDepth 100000 in",
        *_lean_doc(made, poly),
        f"theorem {name}{_lean_given(made, names, poly, squares)} :",
        f"    ({made.bound} : ℝ) ≤ ({poly(made.polynomial)} : ℝ) := by",
        *steps, f"  exact sub_nonneg.mp ({holds})",
    ]  # fmt: skip


def _lean_doc(made: Certificate, poly: Any) -> list[str]:
    doc = f"/-- The polynomial is at least {made.bound}"
    doc += " where the constraints hold" if made.nonneg or made.zero else ""
    if made.multiplier and not _steady(made):
        doc += ",\nwherever the multiplier is positive; that is a dense set, and by continuity it is so everywhere,\n"
        doc += "which is not written here"
    return [*f"{doc}. -/".split("\n")]


def _lean_given(made: Certificate, names: list[str], poly: Any, squares: Any) -> str:
    given = f" ({' '.join(names)} : ℝ)" if names else ""
    for k, g in enumerate(made.nonneg):
        given += f"\n    (nonneg_{k} : 0 ≤ ({poly(g)} : ℝ))"
    for k, h in enumerate(made.zero):
        given += f"\n    (zero_{k} : ({poly(h)} : ℝ) = 0)"
    if made.multiplier and not _steady(made):
        given += f"\n    (positive : 0 < ({squares(made.multiplier)} : ℝ))"
    return given


def _lean_point(made: Certificate, name: str, names: list[str], poly: Any) -> list[str]:
    claims = [f"0 ≤ ({poly(g)} : ℝ)" for g in made.nonneg] + [f"({poly(h)} : ℝ) = 0" for h in made.zero]
    claims.append(f"({poly(made.polynomial)} : ℝ) < ({made.bound} : ℝ)")
    doc = (
        f"/-- The polynomial is below {made.bound} at a point{' of where the constraints hold' * (len(claims) > 1)}. -/"
    )
    goals = ", ".join([*made.point, *("?_" for _ in claims)])
    return [doc, f"theorem {name} : ∃ {' '.join(names)} : ℝ, {' ∧ '.join(claims)} := by",
            f"  refine ⟨{goals}⟩ <;> norm_num"]  # fmt: skip


def _lean_names(variables: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names for the variables, and a comment for each that had to change."""
    taken = {v for v in variables if LEAN_NAME.fullmatch(v)}
    fresh = (f"v{i}" for i in range(1, 2 + 2 * len(variables)) if f"v{i}" not in taken)
    names = [v if v in taken else next(fresh) for v in variables]
    changed = [(new, old) for new, old in zip(names, variables, strict=True) if new != old]
    return names, [f"-- {new} is {''.join(c if c.isprintable() else '?' for c in old)}" for new, old in changed]


def _upright(terms: Any) -> Any:
    """A constant that is squared, without its sign: `positivity` then sees that it is not 0."""
    return [(m, str(abs(Fraction(c)))) for m, c in terms] if len(terms) == 1 and not any(terms[0][0]) else terms


def _must_hold(made: Certificate) -> None:
    if made.status not in ("exact", "not_sos"):
        raise LuthierError(f"a verdict that is {made.status} has no proof to write down")
    why = made.refusal()
    if why:
        raise LuthierError(f"the proof does not hold: {why}")


def _steady(made: Certificate) -> bool:
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


def _written(names: Sequence[str], terms: Iterable[Any], number: Any, power: str, times: str) -> str:
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
