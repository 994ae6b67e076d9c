"""SLERP: practice has it that an arc between two models keeps what a straight line loses, and so gives the
better merge of two specialists than averaging or adding their changes. There is no paper that measured it.

Here: two specialists of two domains, one in the place of the base. SLERP chooses one t out of six on held-out
data. Controls: the straight line with the same six, and task arithmetic on their common base with a scale out
of six; the dumb one is the plain average. Reported and not judged: SLERP at t = 0.5, and kept to the arc
whatever the cosine.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.interpolate import Interpolate
from luthier.merge.linear import Linear
from luthier.merge.slerp import Slerp
from luthier.merge.task_arithmetic import TaskArithmetic

PLACES = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75)
ENDS = ("capitals", "without blanks")


def run(seed: int, ctx: Context) -> dict[str, float]:
    start = domains.base(seed, ctx)
    one, other = (domains.specialist(seed, ctx, domain) for domain in ENDS)

    def best(methods: list, base: domains.Weights, experts: list[domains.Weights]) -> float:
        made = domains.chosen(methods, base, experts, seed, ctx, ENDS)
        return domains.mean_loss(made, seed, ctx, among=ENDS)

    return {
        "method": best([Slerp(t=t) for t in PLACES], one, [other]),
        "control/straight line": best([Interpolate(share=t) for t in PLACES], one, [other]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES], start, [one, other]),
        "control/plain average": best([Linear()], start, [one, other]),
        "halfway": best([Slerp()], one, [other]),
        "always on the arc": best([Slerp(t=t, threshold=1.0) for t in PLACES], one, [other]),
        "cost/merges tried": float(len(PLACES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.slerp",
    sentence="SLERP of two specialists gives a lower mean loss over their domains than a straight line, task "
    "arithmetic or averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="linear interpolation and task arithmetic with as many choices; the plain average", seeds=5, minutes=4,
    run=run, source="common practice (mergekit's slerp), without a paper",
)  # fmt: skip
