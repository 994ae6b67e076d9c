"""DELLA: the paper (arXiv 2406.11617) finds that dropping small entries of a change more often than large ones, then
electing signs, gives a better merge than task arithmetic, DARE and TIES.

Here: three specialists of three domains. The paper searches the drop rate, so DELLA chooses among three densities
and two scales, six candidates in all, as plain addition (task arithmetic) does among six scales. The dumb control
is the plain average. Reported and not judged: DARE with the same vote, densities and scales, the ranks' part in
the effect; and DELLA without the vote.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_dare import DARE_SCALES
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.dare import Dare
from luthier.merge.della import Della
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic

DENSITIES, DELLA_SCALES = (0.3, 0.5, 0.9), (1.0, 1.5)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)
    ctx = ctx.with_(seed=seed)

    def best(methods: list) -> float:
        return domains.mean_loss(domains.chosen(methods, start, experts, seed, ctx), seed, ctx)

    pairs = [(d, s) for d in DENSITIES for s in DELLA_SCALES]
    added = [(d, s) for d in DENSITIES for s in DARE_SCALES]
    return {
        "method": best([Della(density=d, scale=s) for d, s in pairs]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES]),
        "control/plain average": best([Linear()]),
        "DARE with a vote": best([Dare(density=d, scale=s, vote="plus", normalize=True) for d, s in pairs]),
        "without the vote": best([Della(density=d, scale=s, vote="none", normalize=False) for d, s in added]),
        "cost/merges tried": float(len(SCALES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.della",
    sentence="Dropping small entries of three specialists' changes more often than large ones, then electing signs, "
    "gives a lower mean loss over their domains than task arithmetic or averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with a scale chosen alike; the plain average", seeds=5, minutes=4, run=run,
    source="2406.11617: DELLA against task arithmetic",
)  # fmt: skip
