"""Fisher merge: the paper (arXiv 2111.09832) finds that averages weighed by Fisher information are better merges
than plain averages.

Here: three specialists of three domains, each looked at with windows of its own training text. Fisher merge
chooses one floor on held-out data out of six, task arithmetic one scale out of six. The dumb control is the plain
average, which a high floor amounts to. Reported and not judged: the default floor, and with the data's own labels
and the gradients of 16 windows added before they are squared, as released code does.
"""

from luthier.claims import Claim
from luthier.claims import _calibrated as calibrated
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.fisher import Fisher
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic

FLOORS = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)
    door = calibrated.door(seed, ctx, experts)

    def best(methods: list) -> float:
        return domains.mean_loss(domains.chosen(methods, start, experts, seed, door), seed, ctx)

    return {
        "method": best([Fisher(floor=f) for f in FLOORS]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES]),
        "control/plain average": best([Linear()]), "at the default floor": best([Fisher()]),
        "gold labels, 16 at once": best([Fisher(floor=f, labels="gold", batch=16) for f in FLOORS]),
        "cost/merges tried": float(len(FLOORS)), **calibrated.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.fisher",
    sentence="Fisher merge gives a lower mean loss over the domains of three specialists than task arithmetic or "
    "averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with as many choices; the plain average", seeds=5, minutes=6, run=run,
    source="2111.09832: Fisher merging against simple averaging",
)  # fmt: skip
