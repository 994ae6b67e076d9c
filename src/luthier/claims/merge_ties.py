"""TIES: the paper (arXiv 2306.01708) finds that trimming changes and electing signs loses less to interference
than task arithmetic, and so gives the better merge of several specialists.

Here: three specialists of three domains, density 0.2 as in the paper. TIES and task arithmetic each choose
one scale on held-out data out of six. The dumb control is the plain average. Reported and not judged:
TIES at the scale of 1 that the paper advises where nothing can be held out, and without the trim.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.merge.ties import Ties

TIES_SCALES = (0.5, 0.8, 1.0, 1.3, 1.7, 2.2)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)

    def best(methods: list) -> float:
        return domains.mean_loss(domains.chosen(methods, start, experts, seed, ctx), seed, ctx)

    return {
        "method": best([Ties(scale=s) for s in TIES_SCALES]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES]),
        "control/plain average": best([Linear()]), "at scale 1": best([Ties()]),
        "without the trim": best([Ties(density=1.0, scale=s) for s in TIES_SCALES]),
        "cost/merges tried": float(len(TIES_SCALES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.ties",
    sentence="TIES gives a lower mean loss over the domains of three specialists than task arithmetic or averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with a scale chosen alike; the plain average", seeds=5, minutes=4, run=run,
    source="2306.01708: TIES against task arithmetic with validation",
)  # fmt: skip
