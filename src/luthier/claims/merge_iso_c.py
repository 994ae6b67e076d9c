"""Iso-C: the paper (arXiv 2502.04959) finds that a sum of changes merges better once all its singular values are
made equal, and better still with directions of each task's own among them (Iso-CTS).

Here: three specialists of three domains. Iso-C and task arithmetic each choose one scale on held-out data out of
six. The dumb control is the plain average. Reported and not judged: Iso-C at the scale of 1, and Iso-CTS with the
paper's share of 0.8, with a scale chosen alike.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.iso_c import IsoC
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic

ISO_SCALES = (0.5, 0.8, 1.0, 1.3, 1.7, 2.2)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)

    def best(methods: list) -> float:
        return domains.mean_loss(domains.chosen(methods, start, experts, seed, ctx), seed, ctx)

    return {
        "method": best([IsoC(scale=s) for s in ISO_SCALES]),
        "control/task arithmetic": best([TaskArithmetic(scale=s) for s in SCALES]),
        "control/plain average": best([Linear()]), "at scale 1": best([IsoC()]),
        "Iso-CTS": best([IsoC(scale=s, common=0.8) for s in ISO_SCALES]),
        "cost/merges tried": float(len(ISO_SCALES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.iso_c",
    sentence="Iso-C gives a lower mean loss over the domains of three specialists than task arithmetic or averaging.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with a scale chosen alike; the plain average", seeds=5, minutes=4, run=run,
    source="2502.04959: Iso-C against task arithmetic",
)  # fmt: skip
