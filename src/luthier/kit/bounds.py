"""How low a polynomial is, where its constraints hold: the solver's bound, and the largest near it that has a proof.

Degree by degree (`kit.putinar`) where there are constraints, else multiplier by multiplier, until a point is found
where the bound is taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from luthier.flows import Certificate, Ctx
from luthier.kit import balance, exact, gram, moments
from luthier.kit.attempts import WORTH, Attempt, Settings, attempt
from luthier.kit.cones import ONE, Program, plus, times
from luthier.kit.minimisers import minimisers
from luthier.kit.orbits import folded
from luthier.kit.polynomial import Terms
from luthier.kit.problem import Problem
from luthier.kit.proof import given
from luthier.kit.putinar import degrees, in_blocks, multiplier, program, proven, reduced

NICE = (1, 10, 100, 1000)
"""denominators of bounds that are tried first"""
RESIDUAL = 1e-5
"""A solver's answer that misses coefficients by more, in p's size, is no bound."""
CLOSE, BELOW = 1e-5, (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""How far from the solver's optimum such a bound may lie; how far below it others are tried; in p's size."""


class Way(NamedTuple):
    """One attempt at a bound: its name, all squares it may use, and the multiplier as a polynomial and as squares."""

    name: str
    whole: Program | None
    factor: Terms
    squares: list[exact.Square]


def lowest(
    asked: Problem, settings: Settings, ctx: Ctx, degree: int | None, steps: int, products: bool, multipliers: int
) -> Certificate:
    """The largest bound that a sum of these degrees, or with these multipliers, proves."""
    tried: list[str] = []
    best: tuple[float, Certificate] | None = None
    for way in _ways(asked, degree, steps, products, multipliers):
        found = _bounded(asked, way, settings, ctx, tried)
        if found is None:
            continue
        value, slack, made = found
        proves, open_still = made.status == "exact", best is not None and best[1].status != "exact"
        higher = best is not None and value > best[0] + slack
        if best is None or (proves and open_still) or (higher and (proves or (asked.constrained and open_still))):
            best = value, made
        if made.minimisers:
            break
    if best is None:
        return given(asked, "unknown", "no bound by sums of squares of these degrees", numbers={}, tried=tried)
    return best[1]


def _ways(asked: Problem, degree: int | None, steps: int, products: bool, multipliers: int) -> Iterator[Way]:
    """Degree by degree where there are constraints, else multiplier by multiplier."""
    one, none = multiplier(asked.polynomial, 0)[0], []
    if asked.constrained:
        for each in degrees(asked, degree, steps):
            yield Way(f"degree {each}", program(asked, each, products), one, none)
        return
    for r in range(multipliers + 1):
        factor, squares = multiplier(asked.polynomial, r)
        whole = reduced(asked, times(dict(asked.polynomial.terms), factor), factor)
        yield Way(f"multiplier (..)^{r}" if r else "no multiplier", whole, factor, squares if r else none)


def _bounded(
    asked: Problem, way: Way, settings: Settings, ctx: Ctx, tried: list[str]
) -> tuple[float, float, Certificate] | None:
    """The solver's bound, how much higher another must be to count, and the certificate; what was tried is noted."""
    target = times(dict(asked.polynomial.terms), way.factor)
    parts = in_blocks(way.whole, {*target, *way.factor}, settings) if way.whole else f"more than {gram.MOST} monomials"
    if isinstance(parts, str):
        tried.append(f"{way.name}: {parts}")
        return None
    unit = balance.unit_of(target) if target else ONE
    found = _optimum(target, way.factor, parts, unit, settings)
    value = found.optimum * float(unit)
    tried.append(f"{way.name}: Clarabel: {found.status} in {found.iterations} iterations, {value:.9g}")
    if not found.finite or "Infeasible" in found.status or found.residual > RESIDUAL:
        return None
    points, all_of_them = ([], False) if way.squares else minimisers(asked, found.moments, _degree(parts), value)
    shown = [[f"{x:.9g}" for x in point] for point in points]
    numbers = {"bound": float(f"{value:.12g}"), "degree": _degree(parts), "block": parts.largest}
    proof = _exact_bound(target, way.factor, parts, value, float(unit), settings, ctx)
    if proof is None:
        why = "a bound to the solver's tolerance; no proof in fractions"
        near = Fraction(repr(float(f"{value:.9g}")))
        certificate = given(asked, "numeric", why, bound=near, minimisers=shown, numbers=numbers, tried=tried)
        return value, CLOSE * float(unit), certificate
    bound, made = proof
    number = f"{len(points)} minimiser{'s' * (len(points) != 1)}"
    said = f"; {'all ' * (all_of_them and len(points) > 1)}{number}" if points else "; largest bound found"
    certificate = proven(asked, made, numbers | made.numbers, tried, bound, way.squares, shown, said)
    return value, CLOSE * float(unit), certificate


def _optimum(target: Terms, factor: Terms, parts: Program, unit: Fraction, settings: Settings) -> moments.Solved:
    """The largest t so that target - t factor is a sum over the cones, in units of `unit`; its moments are of x."""
    k = balance.units(target) if target else []
    if any(k):
        target, factor, parts = balance.scaled(target, k), balance.scaled(factor, k), balance.scaled_program(parts, k)
    floats = {m: float(c / unit) for m, c in target.items()}
    fold = folded(parts, target) if settings.symmetry and target and parts.largest >= WORTH else None
    of = {m: float(c) for m, c in factor.items()}
    found = moments.solve(parts, floats, settings.tolerance, settings.seconds, of, fold)
    if not any(k):
        return found
    return dataclasses.replace(found, moments=balance.floats_in_x(found.moments, k))


def _exact_bound(
    target: Terms, factor: Terms, parts: Program, value: float, unit: float, settings: Settings, ctx: Ctx
) -> tuple[Fraction, Attempt] | None:
    """The largest exact bound near the solver's that squares in fractions prove."""
    size = max(1.0, unit)
    nice = dict.fromkeys(Fraction(value).limit_denominator(most) for most in NICE)
    ways = [(bound, settings) for bound in nice if abs(float(bound) - value) < CLOSE * size]
    roomy = dataclasses.replace(settings, faces=False)  # below the optimum there is room
    for bound, how in (*ways, *((_floor(value - gap * size), roomy) for gap in BELOW)):
        left = plus(target, factor, -bound)
        if not left:
            return bound, Attempt(squares=[])
        if any(m not in parts.monomials for m in left):
            continue
        made = attempt(left, parts, how, ctx, refute=False)
        if made.squares is not None:
            return bound, made
    return None


def _floor(value: float) -> Fraction:
    """Nine significant digits, rounded down."""
    if value == 0:
        return Fraction(0)
    places = 9 - math.ceil(math.log10(abs(value)))
    return Fraction(math.floor(Fraction(value) * Fraction(10) ** places)) / Fraction(10) ** places


def _degree(parts: Program) -> int:
    return max(sum(m) for m in parts.monomials)
