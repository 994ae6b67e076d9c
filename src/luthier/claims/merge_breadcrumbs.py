"""Model Breadcrumbs: the paper (arXiv 2312.06795) finds that changes without their outliers and their small entries
add up to a better model of several tasks than the changes as they are.

Here: three specialists of three domains, shares as in the paper's code. Breadcrumbs and task arithmetic each
choose one scale on held-out data out of six. The dumb control is the plain average. Reported and not judged:
shares of whole tensors, the outliers left in, and TIES' vote after the drop.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.claims.merge_ties import TIES_SCALES
from luthier.kit.context import Context
from luthier.merge.breadcrumbs import Breadcrumbs
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)

    def best(methods: list) -> float:
        return domains.mean_loss(domains.chosen(methods, start, experts, seed, ctx), seed, ctx)

    return {
        "method": best([Breadcrumbs(scale=s) for s in SCALES]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES]),
        "control/plain average": best([Linear()]),
        "of whole tensors": best([Breadcrumbs(scope="tensor", scale=s) for s in SCALES]),
        "with outliers": best([Breadcrumbs(gamma=0.0, scale=s) for s in SCALES]),
        "with a vote": best([Breadcrumbs(vote="majority", normalize=True, scale=s) for s in TIES_SCALES]),
        "cost/merges tried": float(len(SCALES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.breadcrumbs",
    sentence="Without their outliers and small entries the changes of three specialists add up to a lower mean loss "
    "over their domains than as they are, or averaged.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with a scale chosen alike; the plain average", seeds=5, minutes=4, run=run,
    source="2312.06795: breadcrumbs against task vectors",
)  # fmt: skip
