"""A certificate as a theorem for Lean 4 with Mathlib.

It states p >= bound over the reals and proves it by the certificate's identity (`ring`), the signs of its parts
(`positivity`, `mul_nonneg`) and one division by the multiplier; nothing is searched for. No Lean runs here: names
and syntax follow Mathlib's sources, and the tests read the identity back from the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from luthier.certificate_export import must_hold, printable, steady, weighted, written_with
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.certificate import Certificate

LEAN_NAME = re.compile(r"[A-Za-z][0-9]*", re.ASCII)
"""A variable that is a name in Lean, no word of its language, and none that the theorem uses."""


def lean_of(made: Certificate, name: str = "certificate") -> str:
    """A file for Lean 4 with Mathlib that proves what the certificate proves; LuthierError where it cannot be said."""
    must_hold(made)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name, re.ASCII):
        raise LuthierError(f"{name[:40]!r} is no name for a theorem", do="take letters, digits and _")
    names, notes = _lean_names(made.variables)

    def poly(terms: Any) -> str:
        return written_with(names, terms, str, "^{}", "*")

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

    if made.squares or not (weighted(made) or made.cofactors):
        part(squares(made.squares), "by positivity" if made.squares else "le_rfl")
    for which, several in weighted(made):
        sign, text = "", ""
        for k in which:
            sign = f"mul_nonneg ({sign}) nonneg_{k}" if sign else f"nonneg_{k}"
            text = f"{text} * ({poly(made.nonneg[k])})" if text else f"({poly(made.nonneg[k])})"
        part(f"({squares(several)}) * ({text})" if text else squares(several),
             f"mul_nonneg (by positivity) ({sign})" if sign else "by positivity")  # fmt: skip
    for k, (c, h) in enumerate(zip(made.cofactors, made.zero, strict=False)):
        part(f"({poly(c)}) * ({poly(h)})", f"(mul_eq_zero_of_right _ zero_{k}).ge")
    total, signs = parts[0], proofs[0]
    for text, sign in zip(parts[1:], proofs[1:], strict=True):
        total, signs = f"{total} + {text}", f"add_nonneg ({signs}) {sign}"
    less = f"({poly(made.polynomial)} : ℝ) - ({made.bound} : ℝ)"
    left = f"({squares(made.multiplier)} : ℝ) * ({less})" if made.multiplier else less
    steps = [*facts, f"  have key : {left} = {total} := by ring", f"  have whole := ({signs}).trans_eq key.symm"]
    steps += _lean_end(made, names, poly, squares)
    return [
        "set_option maxHeartbeats 0 in", "set_option maxRecDepth 100000 in",
        *_lean_doc(made, poly),
        f"theorem {name}{_lean_given(made, names, poly, squares)} :",
        f"    ({made.bound} : ℝ) ≤ ({poly(made.polynomial)} : ℝ) := by",
        *steps,
    ]  # fmt: skip


def _lean_end(made: Certificate, names: list[str], poly: Any, squares: Any) -> list[str]:
    """From the sign of (multiplier)(p - bound) to that of p - bound."""
    if not made.multiplier:
        return ["  exact sub_nonneg.mp whole"]
    end = "exact sub_nonneg.mp (nonneg_of_mul_nonneg_right whole positive)"
    positive = f"have positive : 0 < ({squares(made.multiplier)} : ℝ) := by positivity"
    if steady(made):
        return [f"  {positive}", f"  {end}"]
    if not _only_at_origin(made):
        return [f"  {end}"]
    steps = []  # at the origin by its value, elsewhere one of the variables is not 0
    for depth, variable in enumerate(names):
        head = "  " * depth + "· " if depth else "  "
        steps.append(f"{head}rcases eq_or_ne {variable} 0 with at_{depth} | at_{depth}")
    zeros = ", ".join(f"at_{depth}" for depth in range(len(names)))
    steps.append(f"{'  ' * len(names)}· norm_num [{zeros}]")
    for depth in reversed(range(len(names))):
        pad = "  " * (depth + 1)
        steps += [f"{pad}· {positive}", f"{pad}  {end}"]
    return steps


def _supposed(made: Certificate) -> bool:
    """Whether the theorem takes it as given that the multiplier is positive."""
    return bool(made.multiplier) and not steady(made) and not _only_at_origin(made)


def _only_at_origin(made: Certificate) -> bool:
    """Whether the multiplier holds the square of a power of each variable, and so is 0 at the origin at most."""
    alone = [terms[0][0] for _, terms in made.multiplier if len(terms) == 1]
    powers = [[i for i, e in enumerate(m) if e] for m in alone]
    return all([i] in powers for i in range(len(made.variables)))


def _lean_doc(made: Certificate, poly: Any) -> list[str]:
    doc = f"/-- The polynomial is at least {made.bound}"
    doc += " where the constraints hold" if made.nonneg or made.zero else ""
    if _supposed(made):
        doc += ",\nwherever the multiplier is positive; that is a dense set, and by continuity it is so everywhere,\n"
        doc += "which is not written here"
    return [*f"{doc}. -/".split("\n")]


def _lean_given(made: Certificate, names: list[str], poly: Any, squares: Any) -> str:
    given = f" ({' '.join(names)} : ℝ)" if names else ""
    for k, g in enumerate(made.nonneg):
        given += f"\n    (nonneg_{k} : 0 ≤ ({poly(g)} : ℝ))"
    for k, h in enumerate(made.zero):
        given += f"\n    (zero_{k} : ({poly(h)} : ℝ) = 0)"
    if _supposed(made):
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
    return names, [f"-- {new} is {printable(old)}" for new, old in changed]


def _upright(terms: Any) -> Any:
    """A constant that is squared, without its sign: `positivity` then sees that it is not 0."""
    return [(m, str(abs(Fraction(c)))) for m, c in terms] if len(terms) == 1 and not any(terms[0][0]) else terms
