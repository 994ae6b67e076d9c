"""Model Stock: the paper (arXiv 2403.19522) finds that two fine-tunes of one task and their base give a better
model than averaging them does, on the task and where the data shifts, with nothing chosen.

Here: two fine-tunes in one domain that differ in data order, judged by the mean loss on that domain and on the
source as it was before. Nothing is chosen, so the controls choose nothing either: the plain average and plain
addition of the two. Reported and not judged: both losses apart, an angle for each row, and task arithmetic
whose scale is the best of six on held-out data.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims.merge_task_arithmetic import SCALES
from luthier.kit.context import Context
from luthier.merge.linear import Linear
from luthier.merge.model_stock import ModelStock
from luthier.merge.task_arithmetic import TaskArithmetic

DOMAIN = "capitals"
JUDGED = (DOMAIN, None)


def run(seed: int, ctx: Context) -> dict[str, float]:
    start = domains.base(seed, ctx)
    members = [domains.specialist(seed, ctx, DOMAIN, n) for n in range(2)]

    def best(*methods: domains.Transform) -> float:
        made = domains.chosen(methods, start, members, seed, ctx, JUDGED)
        return domains.mean_loss(made, seed, ctx, among=JUDGED)

    stock, average = (domains.merged(method, start, members, ctx) for method in (ModelStock(), Linear()))
    return {
        "method": best(ModelStock()),
        "control/plain average": best(Linear()), "control/plain addition": best(TaskArithmetic()),
        "on the domain": domains.loss(stock, DOMAIN, seed, ctx),
        "average on the domain": domains.loss(average, DOMAIN, seed, ctx),
        "on the source": domains.loss(stock, None, seed, ctx),
        "average on the source": domains.loss(average, None, seed, ctx),
        "an angle for each row": best(ModelStock(filter_wise=True)),
        "task arithmetic, best of six scales": best(*(TaskArithmetic(scale=s) for s in SCALES)),
        "cost/members": float(len(members)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.model_stock",
    sentence="Model Stock of two fine-tunes has a lower mean loss on their domain and the source than their average.",
    relation="below", effect=0.01, unit="nats per byte", control="the plain average and plain addition of the two",
    seeds=5, minutes=3, run=run, source="2403.19522: Model Stock against averages of two fine-tunes",
)  # fmt: skip
