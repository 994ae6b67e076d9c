"""sos.heuristic: on coercive polynomials the rules find proofs over a fraction of the monomials, at equal verdicts.

Planted polynomials (`kit.planted`) of all four structures, coercive and as the paper draws them. Paired: the
operations of all semidefinite programs that were asked, failed guesses included, as the cube of the basis sizes,
against those of the complete diagonal-consistent basis, by log10. Also reported: the share of exact proofs of
both, and a dumb control: as many random candidates as the rules' first guess has, repaired in the same way, which
says whether the rules know anything beyond the size.

On polynomials as the paper draws them exact reduction alone leaves little to gain: reported beside the claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from luthier.claims import Claim
from luthier.kit import lattice, proof, rules
from luthier.kit.attempts import Settings
from luthier.kit.planted import STRUCTURES, Planting, generator, plant
from luthier.sos.heuristic import Heuristic

COERCIVE = ((4, 3, 10), (5, 3, 12), (3, 5, 12))
PAPER = ((6, 6, 20), (4, 6, 16))
"""variables, half degree, monomials"""


def run(seed: int, ctx: Any) -> Mapping[str, float]:
    won: dict[str, list[float]] = {}
    for coercive, shapes in ((True, COERCIVE), (False, PAPER)):
        kind = "" if coercive else "as the paper draws them, "
        for n, half, size in shapes:
            for matrix in STRUCTURES:
                key = generator(ctx.key("planted", n, half, matrix, coercive))
                p = plant(Planting(n=n, half=half, size=size, matrix=matrix, coercive=coercive), key).polynomial
                for name, value in compared(p, ctx.rng("random", n, half, matrix, coercive), ctx).items():
                    won.setdefault(f"{kind}{name}" if kind else name, []).append(value)
    return {name: sum(values) / len(values) for name, values in won.items()}


def compared(p: Any, rng: Any, ctx: Any) -> dict[str, float]:
    """log10 of the operations asked and the verdicts, of one polynomial."""
    import torch

    made = Heuristic().certify(p, ctx)
    complete = lattice.possible(p) or []
    whole = proof.over(p, complete, Settings(), ctx, complete=True)
    guess = min(([b for b in (rules.corners(p, complete), rules.doubled(p, complete)) if b]), key=len)
    order = torch.randperm(len(complete), generator=rng)[: len(guess)].tolist()
    random = rules.repaired(p, [complete[i] for i in order], complete)
    drawn = proof.over(p, random, Settings(), ctx, complete=False)
    first = proof.over(p, guess, Settings(), ctx, complete=False)
    return {
        "method": math.log10(made.numbers["cubed"]), "control/complete basis": 3 * math.log10(len(complete)),
        "share exact": float(made.status == "exact"), "share exact, complete basis": float(whole.status == "exact"),
        "share exact, first guess alone": float(first.status == "exact"),
        "share exact, random guess of that size": float(drawn.status == "exact"),
        "monomials, random guess after repair": float(len(random)), "monomials, first guess": float(len(guess)),
        "monomials, complete": float(len(complete)),
    }  # fmt: skip


CLAIM = Claim(
    id="sos.heuristic",
    sentence="On coercive planted polynomials the rules need at most a tenth of the operations of the complete "
    "diagonal-consistent basis, failed guesses included.",
    relation="below", effect=1.0, unit="log10 of the cubed sizes of the bases asked", control="the complete basis",
    seeds=5, minutes=2, run=run, source="arXiv 2510.13444, section on efficiency; its fork's table of rules",
)  # fmt: skip
