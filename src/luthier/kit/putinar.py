"""What is to be certified where constraints hold, and how low a polynomial is: Putinar's form, degree by degree.

    q (p - t) = s + sum of s_k G_k + sum of c_j h_j      s, s_k sums of squares, G_k constraints (or products of two)

Every term has at most the degree asked for. Lasserre, SIAM J. Optim. 11 (2001); Putinar, Indiana Univ. Math. J. 42
(1993): on a set that a ball bounds by one of its constraints, every p > 0 has such a form of some degree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction

from luthier.flows import Certificate, Ctx
from luthier.kit import exact, gram, lattice
from luthier.kit.attempts import Attempt, Settings, attempt
from luthier.kit.cones import ONE, Cone, Free, Program, cone, plus, split, times
from luthier.kit.polynomial import Exponents, Polynomial, Terms
from luthier.kit.problem import Problem
from luthier.kit.proof import given, negative, too_large, undecided


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
    parts = in_blocks(whole, set(target), settings)
    return (Attempt(), parts) if isinstance(parts, str) else (attempt(target, parts, settings, ctx, refute=False), "")


def in_blocks(whole: Program, support: set[Exponents], settings: Settings) -> Program | str:
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
    number = exact.counted([*first, *itertools.chain(*several.values())])
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
    one: Terms = {(0,) * count: ONE}
    base = {} if p.is_form else dict(one)
    base |= {tuple(2 * (i == j) for j in range(count)): ONE for i in range(count)}
    total: Terms = one
    for _ in range(r):
        total = times(total, base)
    return total, [(c, [(tuple(e // 2 for e in m), ONE)]) for m, c in total.items()]


def reduced(asked: Problem, target: Terms, factor: Terms) -> Program | None:
    """The squares of a polynomial of which any multiple of the factor may be taken away."""
    support = {m: ONE for m in (*target, *factor)}
    p = Polynomial(asked.variables, tuple(support.items()))
    basis = lattice.basis(p, "consistent")
    return None if not basis else Program((cone(basis),))


def multiplied(asked: Problem, made: Certificate, settings: Settings, ctx: Ctx, most: int) -> Certificate:
    """A proof that p is nonnegative although it is no sum of squares, if q p is one for some multiplier q."""
    p = asked.polynomial
    tried = list(made.tried)
    for r in range(1, most + 1):
        factor, squares = multiplier(p, r)
        target = times(dict(p.terms), factor)
        whole = reduced(asked, target, {})
        if whole is None:
            tried.append(f"multiplier (..)^{r}: more than {gram.MOST} monomials")
            break
        found, why = _tried(asked, target, whole, settings, ctx)
        tried += [f"multiplier (..)^{r}: {line}" for line in [*found.tried, *([why] if why else [])]]
        if found.squares is not None:
            base = f"|x|^{2 * r}" if p.is_form else "(1 + |x|^2)" + (f"^{r}" if r > 1 else "")
            factors = [s for _, several in found.squares for s in several]
            reason = f"nonnegative: {base} times it is a sum of {exact.counted(factors)}; it is none"
            functional = [(m, Fraction(c)) for m, c in made.functional]
            return given(asked, "exact", reason, squares=factors, multiplier=squares, basis=made.basis,
                         functional=functional, numbers={**made.numbers, **found.numbers, "multiplier": r},
                         tried=tried)  # fmt: skip
    return made
