"""RegMean: the paper (arXiv 2212.09849) finds that matching every linear layer's outputs gives better merges than
averaging and than Fisher merge.

Here: three specialists of three domains, each looked at with windows of its own training text. RegMean chooses one
factor of the entries off the diagonal on held-out data out of six, task arithmetic one scale out of six. The dumb
control is the plain average. Reported and not judged: the paper's factor of 0.9, Fisher merge as it comes, and
RegMean with as little data as two windows.
"""

from luthier.claims import Claim
from luthier.claims import _calibrated as calibrated
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.fisher import Fisher
from luthier.merge.linear import Linear
from luthier.merge.regmean import RegMean
from luthier.merge.task_arithmetic import TaskArithmetic

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)
    door = calibrated.door(seed, ctx, experts)

    def best(methods: list) -> float:
        return domains.mean_loss(domains.chosen(methods, start, experts, seed, door), seed, ctx)

    return {
        "method": best([RegMean(ratio=r) for r in RATIOS]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES]),
        "control/plain average": best([Linear()]), "at a factor of 0.9": best([RegMean()]),
        "fisher merge": best([Fisher()]), "with two windows": best([RegMean(ratio=r, examples=2) for r in RATIOS]),
        "cost/merges tried": float(len(RATIOS)), **calibrated.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.regmean",
    sentence="RegMean gives a lower mean loss over the domains of three specialists than task arithmetic or averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with as many choices; the plain average", seeds=5, minutes=4, run=run,
    source="2212.09849: RegMean against simple averaging and Fisher merge",
)  # fmt: skip
