"""sos.neural_sos: on coercive polynomials the trained network needs a fraction of what exact reduction alone does.

Planted polynomials (`kit.planted`) of all four structures, keyed by this claim's seeds, which the training never
saw. Paired: the operations of all semidefinite programs that were asked, failed guesses included, as the cube of the
basis sizes, by log10. Controls: the complete diagonal-consistent basis, and the network's own scores read backwards,
which is the same machinery without what was learnt.

Beside the claim, since the paper does not say it: the rules of thumb (`sos.heuristic`), which need no training; the
hidden basis; polynomials as the paper draws them, where little is to be gained; and shares of exact proofs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from luthier.claims import Claim
from luthier.kit import lattice, predictor, proof, rules, staged
from luthier.kit.attempts import Settings
from luthier.kit.planted import STRUCTURES, Planting, generator, plant
from luthier.sos.heuristic import Heuristic
from luthier.sos.neural_sos import NeuralSos

COERCIVE = ((4, 3, 12), (5, 3, 16), (6, 3, 20), (4, 4, 16))
PAPER = ((6, 6, 30), (4, 6, 16))
"""variables, half degree, monomials"""


def run(seed: int, ctx: Any) -> Mapping[str, float]:
    won: dict[str, list[float]] = {}
    for coercive, shapes in ((True, COERCIVE), (False, PAPER)):
        for n, half, size in shapes:
            for matrix in STRUCTURES:
                key = generator(ctx.key("unseen", n, half, matrix, coercive))
                made = plant(Planting(n=n, half=half, size=size, matrix=matrix, coercive=coercive), key)
                for name, value in compared(made, ctx).items():
                    won.setdefault(name if coercive else f"as the paper draws them, {name}", []).append(value)
    return {name: sum(values) / len(values) for name, values in won.items()}


def compared(made: Any, ctx: Any) -> dict[str, float]:
    """log10 of the operations asked, and the verdicts, of one polynomial."""
    p = made.polynomial
    complete = lattice.possible(p) or []
    learned, ruled = NeuralSos().certify(p, ctx), Heuristic().certify(p, ctx)
    value = dict(zip(complete, predictor.scores(predictor.shipped("neural_sos"), p, complete), strict=True))
    likely = [a for a in complete if value[a] > 0.5]
    backwards = sorted(complete, key=value.__getitem__)
    turned = staged.staged(
        p, [rules.repaired(p, backwards[: len(likely)], complete)], lambda: backwards, complete, 1.5,
        lambda basis, last: proof.over(p, basis, Settings(), ctx, complete=last),
    )  # fmt: skip
    return {
        "method": math.log10(learned.numbers["cubed"]), "rules of thumb": math.log10(ruled.numbers["cubed"]),
        "control/scores read backwards": math.log10(turned.numbers["cubed"]),
        "control/complete basis": 3 * math.log10(len(complete)), "hidden basis": 3 * math.log10(len(made.hidden)),
        "first guess holds the hidden basis": float(set(made.hidden) <= set(likely)),
        "first guess in hidden sizes": len(likely) / len(made.hidden),
        "share exact": float(learned.status == "exact"), "share exact, rules": float(ruled.status == "exact"),
        "programs": learned.numbers["programs"], "programs, rules": ruled.numbers["programs"],
    }  # fmt: skip


CLAIM = Claim(
    id="sos.neural_sos",
    sentence="On coercive planted polynomials the network's bases take at most a tenth of the operations of the "
    "complete diagonal-consistent basis, and of the network's scores read backwards, failed guesses included.",
    relation="below", effect=1.0, unit="log10 of the cubed sizes of the bases asked",
    control="exact reduction alone; scores read backwards", seeds=5, minutes=4, run=run,
    source="arXiv 2510.13444, its comparison with Newton's polytope",
)  # fmt: skip
