"""Linear merge: the paper (arXiv 2203.05482) finds that the average of models fine-tuned from one base with
different settings is better than they are, at no cost in inference.

Here: four fine-tunes in one domain, which differ in data order and learning rate. The control is the
best of them, chosen like the paper chooses, on held-out data. Reported and not judged: their mean loss.
"""

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.kit.context import Context
from luthier.merge.linear import Linear

RATES = (4e-3, 2e-3, 2e-3, 1e-3)


def run(seed: int, ctx: Context) -> dict[str, float]:
    domain = "capitals"
    members = [domains.specialist(seed, ctx, domain, n, rate) for n, rate in enumerate(RATES)]
    best = min(members, key=lambda weights: domains.loss(weights, domain, seed, ctx, 1))
    soup = domains.merged(Linear(), domains.base(seed, ctx), members, ctx)
    losses = [domains.loss(weights, domain, seed, ctx) for weights in members]
    return {
        "method": domains.loss(soup, domain, seed, ctx), "control/best member": domains.loss(best, domain, seed, ctx),
        "mean of the members": sum(losses) / len(losses),
        "base": domains.loss(domains.base(seed, ctx), domain, seed, ctx),
        "cost/members": float(len(RATES)), **domains.COST,
    }  # fmt: skip


CLAIM = Claim(
    id="merge.linear",
    sentence="The average of four fine-tunes of one base has a lower loss than the best of them.",
    relation="below", effect=0.01, unit="nats per byte", control="the member that is best on held-out data",
    seeds=5, minutes=3, run=run, source="2203.05482: soups against the best single model",
)  # fmt: skip
