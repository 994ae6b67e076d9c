"""PCB-Merging: the paper (arXiv 2410.02396) finds that weighing every entry of every change, by how large it is in
its expert and whether the others agree, merges better than task arithmetic and TIES.

Here: three specialists of three domains, a tenth of each expert's entries as in the paper's code. PCB-Merging and
task arithmetic each choose one scale on held-out data out of six. The dumb control is the plain average. Reported
and not judged: the form of the other released script, with a scale chosen alike, and PCB-Merging at the scale of 1.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.linear import Linear
from luthier.merge.pcb import Pcb
from luthier.merge.task_arithmetic import TaskArithmetic

PCB_SCALES = (0.5, 0.8, 1.0, 1.3, 1.7, 2.2)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)

    def best(methods: list) -> float:
        return domains.mean_loss(domains.chosen(methods, start, experts, seed, ctx), seed, ctx)

    return {
        "method": best([Pcb(scale=s) for s in PCB_SCALES]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES]),
        "control/plain average": best([Linear()]), "at scale 1": best([Pcb()]),
        "agreement in pairs": best([Pcb(scale=s, inter="pairs", clamp=0.01) for s in PCB_SCALES]),
        "cost/merges tried": float(len(PCB_SCALES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.pcb",
    sentence="PCB-Merging gives a lower mean loss over the domains of three specialists than task arithmetic or "
    "averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with a scale chosen alike; the plain average", seeds=5, minutes=5, run=run,
    source="2410.02396: PCB-Merging against task arithmetic",
)  # fmt: skip
