"""The record that a Certify returns, and how its polynomials are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any

from luthier import verifier
from luthier.errors import LuthierError

Terms = tuple[tuple[tuple[int, ...], str], ...]
"""A polynomial as data: (exponents, coefficient) of each term, the coefficient as "3" or "-2/7"."""
Squares = tuple[tuple[str, Terms], ...]
"""A weighted sum of squares as data: (weight, what is squared)."""


@dataclass(frozen=True)
class Certificate:
    """What a Certify returns: a verdict on a polynomial p, and what proves it, as plain data.

    status: `exact` (the identity below holds, so that p >= bound where all `nonneg` are >= 0 and all `zero`
    are 0), `not_sos` (p < bound at `point`; or `functional` is nonnegative on every square over `basis`, which
    holds all monomials a square may have, and negative on p - bound), `numeric` (the identity to the solver's
    tolerance, which is no proof) or `unknown`.  An `exact` one with a functional proves both: p >= bound, and
    p - bound itself is no sum of squares.  reason: one line.  tried: what was tried, in order.

    The identity, (squares) being the sum of weight * terms^2:
    (multiplier)(p - bound) = (squares) + sum of (weighted squares) * product of some nonneg + sum of cofactor * zero
    """

    status: str
    reason: str
    variables: tuple[str, ...]
    polynomial: Terms
    squares: tuple[tuple[str, Terms], ...] = ()
    basis: tuple[tuple[int, ...], ...] = ()
    functional: Terms = ()
    point: tuple[str, ...] = ()
    bound: str = "0"
    nonneg: tuple[Terms, ...] = ()
    """polynomials that are >= 0 where the claim is made"""
    zero: tuple[Terms, ...] = ()
    """polynomials that are 0 there"""
    multiplier: Squares = ()
    """a sum of squares that p - bound is multiplied by; none means 1"""
    weighted: tuple[tuple[tuple[int, ...], Squares], ...] = ()
    """(which of nonneg, multiplied together; the squares they are multiplied by)"""
    cofactors: tuple[Terms, ...] = ()
    """what each of `zero` is multiplied by"""
    minimisers: tuple[tuple[str, ...], ...] = ()
    """points where p is about as low as the bound; no part of the proof"""
    tried: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    """sizes, and what the solver reported"""

    @property
    def problem(self) -> str:
        """The polynomial as text."""
        return written(self.variables, self.polynomial)

    def __str__(self) -> str:
        """The verdict, and for `exact` the whole identity that proves it."""
        from luthier.certificate_export import text_of

        return text_of(self)

    def to_latex(self) -> str:
        """The proof as LaTeX, checked first; LuthierError where the verdict is not proven."""
        from luthier.certificate_export import latex_of

        return latex_of(self)

    def to_lean(self, name: str = "certificate") -> str:
        """The proof as a theorem for Lean 4 with Mathlib, checked first; LuthierError where there is none.

        That a polynomial is no sum of squares (a functional) has no Lean form yet. No Lean runs here: the text
        follows Mathlib's sources.
        """
        from luthier.certificate_lean import lean_of

        return lean_of(self, name)

    def verify(self) -> bool:
        """Whether the data prove the status, checked in fractions by `luthier.verifier`."""
        return self.refusal() is None

    def data(self) -> dict[str, Any]:
        """All fields by name, as JSON holds them: nothing in them is an object of ours."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def refusal(self) -> str | None:
        """Why the data do not prove the status, None if they do."""
        return verifier.refusal(self.data())

    def to_json(self) -> str:
        return json.dumps(self.data(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read back what `to_json` gave. Whether it proves anything is for `verify` to say."""
        try:
            raw = json.loads(text)
            names = {f.name for f in fields(cls)}
            made = cls(**{k: v if k == "numbers" else _tupled(v) for k, v in raw.items() if k in names})
        except (ValueError, TypeError, AttributeError, RecursionError) as fault:
            raise LuthierError(f"this is no certificate ({type(fault).__name__})") from None
        return made


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def written(variables: Sequence[str], terms: Iterable[tuple[tuple[int, ...], Any]]) -> str:
    """The polynomial as text that reads back as the same one."""
    text = ""
    for exponents, coefficient in terms:
        number, name = Fraction(coefficient), monomial_text(variables, exponents)
        size = str(abs(number))
        body = size if not name else name if abs(number) == 1 else f"{size}*{name}"
        sign = ("-" if number < 0 else "") if not text else (" - " if number < 0 else " + ")
        text += sign + body
    return text or "0"


def monomial_text(variables: Sequence[str], exponents: tuple[int, ...]) -> str:
    """x^2*y; empty for the constant."""
    powers = [(v, e) for v, e in zip(variables, exponents, strict=True) if e]
    return "*".join(v if e == 1 else f"{v}^{e}" for v, e in powers)
