"""sos.dsos: scaled diagonal dominance proves sums of squares that diagonal dominance does not, and not all of them.

Planted polynomials z'GG'z of the four published structures (`kit.planted`), small enough for a semidefinite program.
What is counted is how many get a proof in fractions that the verifier accepts. Of the sparse ones, whose squares hold
few monomials each, many should be sums of squares of two monomials; those are what the claim is about. Controls there:
diagonally dominant Gram matrices alone, and diagonal ones, which needs no program at all: every term is an even
monomial with a positive coefficient. Also published: the same over the other structures, where the paper promises
nothing, what the semidefinite program proves of all, and what both cost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from luthier.claims import Claim
from luthier.flows import Certificate
from luthier.kit.planted import STRUCTURES, Planting, generator, plant
from luthier.kit.polynomial import Polynomial
from luthier.sos.certify import SumOfSquares
from luthier.sos.dsos import Diagonal

SIZES = ((3, 3, 8), (4, 2, 8), (4, 3, 12), (6, 2, 12))
"""variables, half the degree, about how many monomials the planted basis has"""


def squares_alone(p: Polynomial) -> bool:
    """Whether every term is a positive multiple of a monomial's square."""
    return all(c > 0 and not any(e % 2 for e in exponents) for exponents, c in p.terms)


def run(seed: int, ctx: Any) -> Mapping[str, float]:
    won: dict[str, list[float]] = {}
    spent: dict[str, float] = {}

    def note(name: str, structure: str, made: Certificate) -> None:
        won.setdefault(f"{name}/{structure}", []).append(float(made.status == "exact" and made.verify()))

    methods: dict[str, Any] = {
        "sdsos": Diagonal(), "dsos": Diagonal(cone="dsos"), "semidefinite": SumOfSquares(multipliers=0),
    }  # fmt: skip
    for sizes in SIZES:
        for structure in STRUCTURES:
            for coercive in (False, True):
                n, half, size = sizes
                what = Planting(n=n, half=half, size=size, matrix=structure, coercive=coercive)
                p = plant(what, generator(ctx.key("planted", *sizes, structure, coercive))).polynomial
                won.setdefault(f"diagonal/{structure}", []).append(float(squares_alone(p)))
                for name, method in methods.items():
                    began = time.process_time()
                    note(name, structure, method.certify(p, ctx))
                    spent[name] = spent.get(name, 0.0) + time.process_time() - began
    means = {key: sum(values) / len(values) for key, values in won.items()}
    judged = {
        "method": means["sdsos/sparse"], "control/dsos": means["dsos/sparse"],
        "control/diagonal alone": means["diagonal/sparse"],
    }  # fmt: skip
    cost = {f"cost/CPU-seconds, {name}": value for name, value in spent.items()}
    return {**judged, **{f"proven by {key}": value for key, value in means.items()}, **cost}


CLAIM = Claim(
    id="sos.dsos",
    sentence="Of planted sparse sums of squares more have a scaled diagonally dominant Gram matrix than a diagonally "
    "dominant one.",
    relation="above", effect=0.2, unit="share of polynomials proven", control="dominant or diagonal Gram matrices",
    seeds=5, minutes=1, run=run, source="arXiv 1706.02586, section 3: DSOS within SDSOS within sums of squares",
)  # fmt: skip
