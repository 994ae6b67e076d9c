"""What is to be certified where constraints hold, and how low a polynomial is: Putinar's form, degree by degree.

    q (p - t) = s + sum of s_k G_k + sum of c_j h_j      s, s_k sums of squares, G_k constraints (or products of two)

Every term has at most the degree asked for. Lasserre, SIAM J. Optim. 11 (2001); Putinar, Indiana Univ. Math. J. 42
(1993): on a set that a ball bounds by one of its constraints, every p > 0 has such a form of some degree.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction

from luthier.flows import Certificate, Ctx
from luthier.kit import balance, exact, gram, lattice, moments
from luthier.kit.cones import ONE, Cone, Free, Program, cone, plus, split, times
from luthier.kit.minimisers import minimisers
from luthier.kit.orbits import folded
from luthier.kit.polynomial import Exponents, Polynomial, Terms
from luthier.kit.problem import Problem
from luthier.kit.proof import (
    WORTH,
    Attempt,
    Settings,
    attempt,
    counted,
    given,
    negative,
    too_large,
    undecided,
    unit_of,
)

NICE = (1, 10, 100, 1000)
"""denominators of bounds that are tried first"""
RESIDUAL = 1e-5
"""A solver's answer that misses coefficients by more, in p's size, is no bound."""
CLOSE, BELOW = 1e-5, (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""How far from the solver's optimum such a bound may lie; how far below it others are tried; in p's size."""


def degrees(asked: Problem, degree: int | None, steps: int) -> list[int]:
    """The degree asked for, or the least even one that fits, and as many steps of 2 more."""
    every = (asked.polynomial, *asked.nonneg, *asked.zero)
    least = max(2, 2 * max(-(-q.degree // 2) for q in every))
    return [degree] if degree else [least + 2 * n for n in range(steps + 1)]


def program(asked: Problem, degree: int, products: bool) -> Program | None:
    """All cones and equations of this degree; None if they are too many. products: of two constraints, too."""
    count = len(asked.variables)
    if math.comb(count + degree // 2, degree // 2) > gram.MOST:
        return None

    def over(weight: Terms, which: tuple[int, ...]) -> Iterator[Cone]:
        room = degree - max((sum(m) for m in weight), default=0)
        if room >= 0:
            yield cone(list(gram.up_to(count, room // 2)), weight, which)

    one = {(0,) * count: ONE}
    cones = list(over(one, ()))
    for k, g in enumerate(asked.nonneg):
        cones += over(dict(g.terms), (k,))
    for (k, g), (j, h) in itertools.combinations(enumerate(asked.nonneg), 2) if products else ():
        cones += over(times(dict(g.terms), dict(h.terms)), (k, j))
    free = tuple(
        Free(dict(h.terms), tuple(gram.up_to(count, degree - h.degree)), j)
        for j, h in enumerate(asked.zero) if degree >= h.degree
    )  # fmt: skip
    return Program(tuple(c for c in cones if c.weight), free)


def nonnegative(
    asked: Problem, settings: Settings, ctx: Ctx, degree: int | None, steps: int, products: bool
) -> Certificate:
    """Whether p >= 0 where the constraints hold."""
    found = negative(asked, {})
    if found is not None:
        return found
    tried: list[str] = []
    numbers: dict[str, float] = {}
    numeric = False
    for each in degrees(asked, degree, steps):
        whole = program(asked, each, products)
        if whole is None:
            tried.append(f"degree {each}: more than {gram.MOST} monomials")
            break
        made, why = _tried(asked, dict(asked.polynomial.terms), whole, settings, ctx)
        numbers = {"degree": each, **made.numbers}
        tried += [f"degree {each}: {line}" for line in [*made.tried, *([why] if why else [])]]
        if made.squares is not None:
            return proven(asked, made, numbers, tried)
        numeric = numeric or made.numeric
    if numeric:
        return given(asked, "numeric", "nonnegative to the solver's tolerance; no proof in fractions",
                     numbers=numbers, tried=tried)  # fmt: skip
    return undecided(asked, "no such sum of these degrees", numbers, tried)


def _tried(asked: Problem, target: Terms, whole: Program, settings: Settings, ctx: Ctx) -> tuple[Attempt, str]:
    """An attempt in blocks, or why there was none."""
    parts = _parts(whole, set(target), settings)
    return (Attempt(), parts) if isinstance(parts, str) else (attempt(target, parts, settings, ctx, refute=False), "")


def _parts(whole: Program, support: set[Exponents], settings: Settings) -> Program | str:
    """The program in blocks that reach the support, or why it cannot be had."""
    parts = split(whole, support, settings.chordal)
    if parts.largest > settings.largest:
        return too_large(parts, settings)
    return parts if support <= parts.monomials.keys() else "a monomial is out of reach"


def proven(
    asked: Problem, made: Attempt, numbers: Mapping[str, float], tried: list[str], bound: Fraction = Fraction(0),
    multiplier: list[exact.Square] | None = None, points: list[list[str]] | None = None, said: str = "",
) -> Certificate:  # fmt: skip
    """The exact certificate of an attempt that gave squares."""
    several: dict[tuple[int, ...], list[exact.Square]] = {}
    for which, squares in made.squares or []:
        several.setdefault(which, []).extend(squares)
    first = several.pop((), [])
    cofactors: list[Terms] = [{} for _ in asked.zero]
    for j, terms in made.cofactors:
        cofactors[j] = plus(cofactors[j], terms)
    number = counted([*first, *itertools.chain(*several.values())])
    where = " where the constraints hold" if asked.constrained else ""
    factor = ", after multiplication by a sum of squares" if multiplier else ""
    what = f"at least {bound}" if said or bound else "nonnegative"
    why = f"{what}{where}: {number}{factor}{said}"
    return given(
        asked, "exact", why, squares=first, weighted=list(several.items()), cofactors=cofactors, bound=bound,
        multiplier=multiplier or [], minimisers=points or [], numbers=numbers, tried=tried,
    )  # fmt: skip


def multiplier(p: Polynomial, r: int) -> tuple[Terms, list[exact.Square]]:
    """(1 + |x|^2)^r, or |x|^2r for a form: as a polynomial and as weighted squares of monomials."""
    count = len(p.variables)
    form = count > 0 and len({sum(m) for m in p.support}) == 1
    one: Terms = {(0,) * count: ONE}
    base = {} if form else dict(one)
    base |= {tuple(2 * (i == j) for j in range(count)): ONE for i in range(count)}
    total: Terms = one
    for _ in range(r):
        total = times(total, base)
    return total, [(c, [(tuple(e // 2 for e in m), ONE)]) for m, c in total.items()]


def lowest(
    asked: Problem, settings: Settings, ctx: Ctx, degree: int | None, steps: int, products: bool, multipliers: int
) -> Certificate:
    """The largest bound that a sum of these degrees, or with these multipliers, proves."""
    tried: list[str] = []
    numbers: dict[str, float] = {}
    best: tuple[float, Certificate] | None = None
    p = asked.polynomial
    ways = [(each, 0) for each in degrees(asked, degree, steps)] if asked.constrained else [
        (0, r) for r in range(multipliers + 1)
    ]  # fmt: skip
    for each, r in ways:
        factor, squares = multiplier(p, r)
        target = times(dict(p.terms), factor)
        whole = program(asked, each, products) if asked.constrained else _reduced(asked, target, factor)
        name = f"degree {each}" if asked.constrained else f"multiplier (..)^{r}" if r else "no multiplier"
        parts = _parts(whole, {*target, *factor}, settings) if whole else f"more than {gram.MOST} monomials"
        if isinstance(parts, str):
            tried.append(f"{name}: {parts}")
            continue
        unit = unit_of(target) if target else ONE
        found = _optimum(target, factor, parts, unit, settings)
        tried.append(
            f"{name}: Clarabel: {found.status} in {found.iterations} iterations, {found.optimum * float(unit):.9g}"
        )
        if not found.finite or "Infeasible" in found.status or found.residual > RESIDUAL:
            continue
        value = found.optimum * float(unit)
        points, all_of_them = minimisers(asked, found.moments, _degree(parts), value) if r == 0 else ([], False)
        numbers = {"bound": float(f"{value:.12g}"), "degree": _degree(parts), "block": parts.largest}
        made = _exact_bound(asked, target, factor, parts, value, float(unit), settings, ctx)
        shown = [[f"{x:.9g}" for x in point] for point in points]
        if made is None:
            why = "a bound to the solver's tolerance; no proof in fractions"
            certificate = given(asked, "numeric", why, bound=Fraction(repr(float(f"{value:.9g}"))), minimisers=shown,
                                numbers=numbers, tried=tried)  # fmt: skip
        else:
            bound, made_of = made
            number = f"{len(points)} minimiser{'s' * (len(points) != 1)}"
            said = f"; {'all ' * all_of_them}{number}" if points else ""
            certificate = proven(asked, made_of, numbers | made_of.numbers, tried, bound, squares if r else None, shown,
                                 said or "; largest bound found")  # fmt: skip
        proves = certificate.status == "exact"
        higher = best is not None and value > best[0] + CLOSE * float(unit)
        steps_up = proves or (asked.constrained and best is not None and best[1].status != "exact")
        if best is None or (proves and best[1].status != "exact") or (higher and steps_up):
            best = value, certificate
        if points:
            break
    return best[1] if best else undecided_bound(asked, numbers, tried)


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
    in_x = {m: value * 2.0 ** sum(map(int.__mul__, k, m)) for m, value in found.moments.items()}
    return dataclasses.replace(found, moments=in_x)


def undecided_bound(asked: Problem, numbers: Mapping[str, float], tried: list[str]) -> Certificate:
    return given(asked, "unknown", "no bound by sums of squares of these degrees", numbers=numbers, tried=tried)


def _reduced(asked: Problem, target: Terms, factor: Terms) -> Program | None:
    """The squares of a polynomial of which any multiple of the factor may be taken away."""
    support = {m: ONE for m in (*target, *factor)}
    p = Polynomial(asked.variables, tuple(support.items()))
    candidates = gram.box(p)
    basis = lattice.possible(p) if candidates is None else gram.consistent(p, candidates)
    return None if not basis else Program((cone(basis),))


def _degree(parts: Program) -> int:
    return max(sum(m) for m in parts.monomials)


def _exact_bound(
    asked: Problem,
    target: Terms,
    factor: Terms,
    parts: Program,
    value: float,
    unit: float,
    settings: Settings,
    ctx: Ctx,
) -> tuple[Fraction, Attempt] | None:
    """The largest exact bound near the solver's that squares in fractions prove."""
    near = [Fraction(value).limit_denominator(most) for most in NICE]
    bounds = [b for b in dict.fromkeys(near) if abs(float(b) - value) < CLOSE * max(1.0, unit)]
    below = [_floor(value - gap * max(1.0, unit)) for gap in BELOW]
    for bound in (*bounds, *below):
        settings = dataclasses.replace(settings, faces=settings.faces and bound in bounds)  # below there is room
        left = plus(target, factor, -bound)
        if not left:
            return bound, Attempt(squares=[])
        if any(m not in parts.monomials for m in left):
            continue
        made = attempt(left, parts, settings, ctx, refute=False)
        if made.squares is not None:
            return bound, made
    return None


def _floor(value: float) -> Fraction:
    """Nine significant digits, rounded down."""
    if value == 0:
        return Fraction(0)
    places = 9 - math.ceil(math.log10(abs(value)))
    return Fraction(math.floor(Fraction(value) * Fraction(10) ** places)) / Fraction(10) ** places


def multiplied(asked: Problem, made: Certificate, settings: Settings, ctx: Ctx, most: int) -> Certificate:
    """A proof that p is nonnegative although it is no sum of squares, if q p is one for some multiplier q."""
    p = asked.polynomial
    tried = list(made.tried)
    for r in range(1, most + 1):
        factor, squares = multiplier(p, r)
        target = times(dict(p.terms), factor)
        whole = _reduced(asked, target, {})
        if whole is None:
            tried.append(f"multiplier (..)^{r}: more than {gram.MOST} monomials")
            break
        found, why = _tried(asked, target, whole, settings, ctx)
        tried += [f"multiplier (..)^{r}: {line}" for line in [*found.tried, *([why] if why else [])]]
        if found.squares is not None:
            form = len({sum(m) for m in p.support}) == 1
            base = f"|x|^{2 * r}" if form else "(1 + |x|^2)" + (f"^{r}" if r > 1 else "")
            factors = [s for _, several in found.squares for s in several]
            reason = f"nonnegative: {base} times it is a sum of {counted(factors)}; it is none"
            functional = [(m, Fraction(c)) for m, c in made.functional]
            return given(asked, "exact", reason, squares=factors, multiplier=squares, basis=made.basis,
                         functional=functional, numbers={**made.numbers, **found.numbers, "multiplier": r},
                         tried=tried)  # fmt: skip
    return made
