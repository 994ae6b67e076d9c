"""DARE: the paper (arXiv 2311.03099) finds that most entries of a change may be dropped at random if the rest is
rescaled, and that models merged after the drop interfere less than models merged as they are.

Here: three specialists of three domains, added up after the drop. The paper searches the drop rate, so DARE
chooses among three densities and two scales, six candidates in all, as plain addition (task arithmetic) does
among six scales. The dumb control is the plain average. Reported and not judged: the default density at its
best of six scales, the same without the rescale, and the same put to TIES' vote.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.claims.merge_ties import TIES_SCALES
from luthier.kit.context import Context
from luthier.merge.dare import Dare
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic

DENSITIES, DARE_SCALES = (0.1, 0.5, 0.9), (0.3, 0.5)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)
    ctx = ctx.with_(seed=seed)

    def best(methods: list) -> float:
        return domains.mean_loss(domains.chosen(methods, start, experts, seed, ctx), seed, ctx)

    return {
        "method": best([Dare(density=d, scale=s) for d in DENSITIES for s in DARE_SCALES]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES]),
        "control/plain average": best([Linear()]),
        "a tenth kept": best([Dare(scale=s) for s in SCALES]),
        "not rescaled": best([Dare(rescale="none", scale=s) for s in SCALES]),
        "with a vote": best([Dare(vote="majority", normalize=True, scale=s) for s in TIES_SCALES]),
        "cost/merges tried": float(len(SCALES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.dare",
    sentence="Dropping entries of three specialists' changes at random and rescaling the rest gives a lower mean loss "
    "over their domains than adding the changes as they are, or averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with a scale chosen alike; the plain average", seeds=5, minutes=4, run=run,
    source="2311.03099: merging with DARE against merging without",
)  # fmt: skip
