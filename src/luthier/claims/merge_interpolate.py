"""Interpolation: the paper (arXiv 2510.10977) finds that the line between two specialists, at a point that is
chosen well, is better than task arithmetic and TIES on both abilities.

Here: two specialists of two domains in the place of Instruct and Thinking. The share is chosen on held-out data
out of six, and so are the scales of task arithmetic and TIES on the common base. The dumb control is the plain
average. Reported and not judged: the specialists themselves over both domains.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.claims.merge_ties import TIES_SCALES
from luthier.kit.context import Context
from luthier.merge.interpolate import Interpolate
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.merge.ties import Ties

SHARES = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75)
ENDS = ("capitals", "without blanks")


def run(seed: int, ctx: Context) -> dict[str, float]:
    start = domains.base(seed, ctx)
    one, other = (domains.specialist(seed, ctx, domain) for domain in ENDS)

    def best(methods: list, base: domains.Weights, experts: list[domains.Weights]) -> float:
        made = domains.chosen(methods, base, experts, seed, ctx, ENDS)
        return domains.mean_loss(made, seed, ctx, among=ENDS)

    return {
        "method": best([Interpolate(share=s) for s in SHARES], one, [other]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES], start, [one, other]),
        "control/ties": best([Ties(scale=s) for s in TIES_SCALES], start, [one, other]),
        "control/plain average": best([Linear()], start, [one, other]),
        "first specialist": domains.mean_loss(one, seed, ctx, among=ENDS),
        "second specialist": domains.mean_loss(other, seed, ctx, among=ENDS),
        "cost/merges tried": float(len(SHARES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.interpolate",
    sentence="A point on the line between two specialists has a lower mean loss over their domains than task "
    "arithmetic, TIES or their average.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic and TIES with as many choices; the plain average", seeds=5, minutes=4, run=run,
    source="2510.10977: model interpolation against TA and TIES",
)  # fmt: skip
