"""WIDEN: the paper (arXiv 2408.03092) finds that it merges a model that moved far from the base with one that
moved little, where averaging and adding changes lose one of them.

Here: two specialists, one at twice the usual rate and one at a quarter of it, judged by the mean loss over their
domains. WIDEN chooses its two numbers out of six pairs on held-out data, task arithmetic its scale out of six.
The dumb control is the plain average. Reported and not judged: WIDEN at its defaults, and how far the two moved.
"""

import itertools

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims._scratch import RATE
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.merge.widen import Widen

PAIRS = tuple(itertools.product((0.5, 1.0, 1.5), (0.5, 1.0)))
RATES = {"capitals": RATE / 8, "without blanks": RATE}


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, among = domains.base(seed, ctx), tuple(RATES)
    experts = [domains.specialist(seed, ctx, domain, rate=rate) for domain, rate in RATES.items()]

    def best(methods: list) -> float:
        made = domains.chosen(methods, start, experts, seed, ctx, among)
        return domains.mean_loss(made, seed, ctx, among=among)

    moved = [sum(float((e[n] - start[n]).square().sum()) for n in start) ** 0.5 for e in experts]
    return {
        "method": best([Widen(above_average_ratio=ratio, calibration=score) for ratio, score in PAIRS]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES]),
        "control/plain average": best([Linear()]),
        "at the defaults": best([Widen()]), "moved little": moved[0], "moved far": moved[1],
        "cost/merges tried": float(len(PAIRS)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.widen",
    sentence="Of two specialists that moved differently far WIDEN gives a lower mean loss over their domains than "
    "task arithmetic or averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with a scale chosen alike; the plain average", seeds=5, minutes=4, run=run,
    source="2408.03092: WIDEN against task arithmetic and averaging on a chat and a pretrained model",
)  # fmt: skip
