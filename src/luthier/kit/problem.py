"""What is to be certified: a polynomial, and where: nonneg g >= 0 and zero h = 0, all over the same variables.

problem("x^2 - 1")      problem("x + y", nonneg=["1 - x^2 - y^2"])      problem({"polynomial": "x", "zero": "x^2 - 1"})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from luthier.errors import LuthierError, unknown
from luthier.kit.polynomial import Exponents, Polynomial, natural, polynomial

KEYS = ("polynomial", "nonneg", "zero")
MOST = 200
"""constraints"""


@dataclass(frozen=True)
class Problem:
    """A polynomial and its constraints, each over `polynomial.variables`."""

    polynomial: Polynomial
    nonneg: tuple[Polynomial, ...] = ()
    zero: tuple[Polynomial, ...] = ()

    @property
    def variables(self) -> tuple[str, ...]:
        return self.polynomial.variables

    @property
    def constrained(self) -> bool:
        return bool(self.nonneg or self.zero)

    def holds(self, point: Sequence[Fraction | int]) -> bool:
        """Whether the constraints hold at the point, exactly."""
        return all(g.at(point) >= 0 for g in self.nonneg) and not any(h.at(point) for h in self.zero)


def problem(value: Any, nonneg: Any = (), zero: Any = ()) -> Problem:
    """The problem that a polynomial (what `kit.polynomial` reads) and its constraints stand for.

    value: a polynomial, a Problem, or {"polynomial": ..., "nonneg": [...], "zero": [...]}.
    Raises LuthierError naming the constraint that cannot be read.
    """
    if isinstance(value, Problem):
        return value
    if isinstance(value, Mapping) and value and all(isinstance(k, str) for k in value):
        for key in value:
            if key not in KEYS:
                raise unknown("key", key, KEYS, where="problem")
        if "polynomial" not in value:
            raise LuthierError("the problem names no polynomial", do="write {polynomial: x^2 + 1}")
        return problem(value["polynomial"], value.get("nonneg", ()), value.get("zero", ()))
    read = [_each("nonneg", nonneg), _each("zero", zero)]
    every = [polynomial(value), *read[0], *read[1]]
    if read == [[], []]:
        return Problem(every[0])
    names = sorted({v for p in every for v in p.variables}, key=natural)
    first, *others = (_over(p, names) for p in every)
    return Problem(first, tuple(others[: len(read[0])]), tuple(others[len(read[0]) :]))


def _each(what: str, given: Any) -> list[Polynomial]:
    """Constraints given one or several."""
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(several) > MOST:
        raise LuthierError(f"{len(several)} constraints, {MOST} are allowed", where=what)
    found = []
    for number, each in enumerate(several, start=1):
        try:
            found.append(polynomial(each))
        except LuthierError as fault:
            raise fault.at(f"{what} {number}") from None
    return found


def _over(p: Polynomial, names: Sequence[str]) -> Polynomial:
    """The same polynomial over more variables."""
    place = [p.variables.index(name) if name in p.variables else None for name in names]

    def wide(exponents: Exponents) -> Exponents:
        return tuple(0 if i is None else exponents[i] for i in place)

    return Polynomial(tuple(names), tuple((wide(e), c) for e, c in p.terms))
