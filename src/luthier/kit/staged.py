"""From a guess of the monomials to a verdict: small bases first, the complete one last.

    openings   bases that somebody guessed, smallest first
    growth     the best-ranked monomials, rho times as many each time
    last       the complete basis, the only one over which a functional can prove that p is no sum of squares

A basis is asked only if the complete one is at least rho times as large. What may be lost by wrong guesses is
therefore bounded, whatever guessed: let a program over N monomials cost N^w. The growing sizes before the last
are at most N/rho, N/rho^2, ..., so that they cost at most N^w / (rho^w - 1) together; each opening beside the
first costs at most (N/rho)^w. With `bound(2, rho, w)` for two openings, rho = 1.5 and w = 3: 1.72 times the cost
of starting from the complete basis at worst; at w = 5, which is nearer to an interior point's, 1.29 times.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from luthier.flows import Certificate
from luthier.kit.polynomial import Exponents, Polynomial
from luthier.kit.rules import repaired, uncovered

Basis = list[Exponents]
Ask = Callable[[Basis, bool], Certificate]
"""The verdict over a basis; the flag says whether it is the complete one."""
Ranking = Callable[[], Sequence[Exponents]]
"""The candidates, likeliest first; asked for only when the openings have failed."""


def bound(openings: int, rho: float, power: float) -> float:
    """At most how much dearer than the complete basis alone it can get."""
    return 1 + 1 / (rho**power - 1) + max(0, openings - 1) * rho**-power


def staged(
    p: Polynomial, openings: Sequence[Basis], ranking: Ranking, complete: Basis, rho: float, ask: Ask
) -> Certificate:
    """The first proof that is found; if there is none, what floats say, else the last verdict."""
    before: list[str] = []
    floats: Certificate | None = None
    sizes = []
    guesses = ((basis, False) for basis in stages(p, openings, ranking, complete, rho))
    for basis, last in itertools.chain(guesses, [(complete, True)]):
        made = ask(basis, last)
        sizes.append(len(basis))
        if made.status in ("exact", "not_sos"):
            return _told(made, before, sizes, complete)
        if made.status == "numeric":
            floats = made
        before += [f"over {len(basis)} of {len(complete)} monomials: {made.status}, {made.reason}", *made.tried]
    return _told(dataclasses.replace(floats or made, tried=()), before, sizes, complete)


def stages(p: Polynomial, openings: Sequence[Basis], ranking: Ranking, complete: Basis, rho: float) -> Iterator[Basis]:
    """Every basis that is asked before the complete one; each covers p's exponents."""
    most, size = len(complete) / rho, 0
    for basis in sorted({tuple(sorted(b)): b for b in openings}.values(), key=len):
        if basis and len(basis) <= most and not uncovered(p, basis):
            yield basis
            size = max(size, len(basis))
    ranked = ranking() if rho * size <= most else []
    places = {a: -float(i) for i, a in enumerate(ranked)}
    while size and ranked:
        grown = repaired(p, list(ranked[: int(rho * size) + 1]), complete, places)
        if not rho * size <= len(grown) <= most:
            return
        yield grown
        size = len(grown)


def _told(made: Certificate, before: Sequence[str], sizes: Sequence[int], complete: Basis) -> Certificate:
    """The certificate with what was asked before it."""
    numbers = {**made.numbers, "complete": len(complete), "programs": len(sizes), "asked": sum(sizes),
               "cubed": sum(size**3 for size in sizes)}  # fmt: skip
    return dataclasses.replace(made, tried=(*before, *made.tried), numbers=numbers)
