"""CABS: the paper (arXiv 2503.01874) finds that changes which are pruned block by block and do not overlap merge
better than whole ones or ones pruned otherwise.

Here: three specialists of three domains in one fixed order, a quarter of each block of 256 as in the paper's code.
CABS and task arithmetic each choose one scale on held-out data out of six. The dumb control is the plain average.
Reported and not judged: CABS with a third of each block kept, which leaves next to nothing free, and in the
other order of the specialists, each with a scale chosen alike.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.cabs import Cabs
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic

CABS_SCALES = (0.5, 0.8, 1.0, 1.2, 1.6, 2.0)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)

    def best(methods: list, order: list) -> float:
        return domains.mean_loss(domains.chosen(methods, start, order, seed, ctx), seed, ctx)

    scaled = [Cabs(scale=s) for s in CABS_SCALES]
    return {
        "method": best(scaled, experts),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES], experts),
        "control/plain average": best([Linear()], experts),
        "a third kept": best([Cabs(scale=s, density=1 / 3) for s in CABS_SCALES], experts),
        "other order": best(scaled, experts[::-1]),
        "cost/merges tried": float(len(CABS_SCALES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.cabs",
    sentence="CABS gives a lower mean loss over the domains of three specialists than task arithmetic or averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with a scale chosen alike; the plain average", seeds=5, minutes=4, run=run,
    source="2503.01874: CABS against task arithmetic",
)  # fmt: skip
