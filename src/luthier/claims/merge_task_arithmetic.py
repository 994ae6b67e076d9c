"""Task arithmetic: the paper (arXiv 2212.04089) adds the changes of several specialists to their base and
gets one model that does better than the base on all their tasks.

Here: three specialists of three domains, one scale chosen on held-out data out of six. The controls are
the base and, as a dumb one, the plain average of the specialists. Reported and not judged: what the
specialists reach at home.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.kit.context import Context
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic

SCALES = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)
    added = domains.chosen([TaskArithmetic(scale=s) for s in SCALES], start, experts, seed, ctx)
    average = domains.merged(Linear(), start, experts, ctx)
    home = [domains.loss(e, d, seed, ctx) for e, d in zip(experts, domains.DOMAINS, strict=True)]
    return {
        "method": domains.mean_loss(added, seed, ctx), "control/base": domains.mean_loss(start, seed, ctx),
        "control/plain average": domains.mean_loss(average, seed, ctx), "specialists at home": sum(home) / len(home),
        "cost/merges tried": float(len(SCALES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.task_arithmetic",
    sentence="The summed changes of three specialists give a lower mean loss over their domains than the base, "
    "and than the specialists' plain average.",
    relation="below", effect=0.01, unit="nats per byte", control="the base; the plain average of the specialists",
    seeds=5, minutes=3, run=run, source="2212.04089: adding task vectors",
)  # fmt: skip
