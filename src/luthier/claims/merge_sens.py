"""Sens-Merging: the paper (arXiv 2502.12420) finds that coefficients by layer and task, from sensitivities, make
task arithmetic better.

Here: three specialists of three domains, each looked at with windows of its own training text. Sens-Merging and
task arithmetic each choose one scale on held-out data out of the same six. The dumb control is the plain average.
Reported and not judged: near outputs weighing more instead of far ones, either factor alone, and a temperature at
which coefficients really differ.
"""

from typing import Any

from luthier.claims import Claim
from luthier.claims import _calibrated as calibrated
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.linear import Linear
from luthier.merge.sens import Sens
from luthier.merge.task_arithmetic import TaskArithmetic

LOOKED = 48
"""windows a specialist is looked at with: coefficients need fewer than weights do"""


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)
    door = calibrated.door(seed, ctx, experts)

    def best(**fields: Any) -> float:
        methods = [Sens(scale=s, examples=LOOKED, **fields) for s in SCALES]
        return domains.mean_loss(domains.chosen(methods, start, experts, seed, door), seed, ctx)

    added = domains.chosen([TaskArithmetic(scale=s) for s in SCALES], start, experts, seed, ctx)
    return {
        "method": best(), "control/task arithmetic": domains.mean_loss(added, seed, ctx),
        "control/plain average": domains.mean_loss(domains.merged(Linear(), start, experts, ctx), seed, ctx),
        "near weighs more": best(transfer="closeness"), "within tasks only": best(across=False),
        "across tasks only": best(within=False), "temperature 0.1": best(temperature=0.1),
        "cost/merges tried": float(len(SCALES)), **calibrated.COST, "cost/windows looked at": 3.0 * LOOKED,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.sens",
    sentence="Sens-Merging gives a lower mean loss over the domains of three specialists than task arithmetic or "
    "averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with the same scales to choose from; the plain average", seeds=5, minutes=6, run=run,
    source="2502.12420: Sens-Merging with task arithmetic",
)  # fmt: skip
