"""TSV-Merge: the paper (arXiv 2412.00081) finds that cutting experts' changes to their strongest singular
directions, and making these orthogonal between experts, loses less than task arithmetic and its kin.

Here: three specialists of three domains. TSV-Merge and task arithmetic each choose one scale on held-out data
out of six. The dumb control is the plain average. Reported and not judged: TSV-Merge at the scale of 1, which
the paper advises where nothing can be held out.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.merge.tsv import Tsv

TSV_SCALES = (0.4, 0.6, 0.8, 1.0, 1.3, 1.7)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)

    def best(methods: list) -> float:
        return domains.mean_loss(domains.chosen(methods, start, experts, seed, ctx), seed, ctx)

    return {
        "method": best([Tsv(scale=s) for s in TSV_SCALES]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES]),
        "control/plain average": best([Linear()]), "at scale 1": best([Tsv()]),
        "cost/merges tried": float(len(TSV_SCALES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.tsv",
    sentence="TSV-Merge gives a lower mean loss over the domains of three specialists than task arithmetic or "
    "averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with a scale chosen alike; the plain average", seeds=5, minutes=4, run=run,
    source="2412.00081: TSV-M against task arithmetic",
)  # fmt: skip
