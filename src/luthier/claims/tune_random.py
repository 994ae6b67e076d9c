"""Random mask: no paper's own claim; what a control has to show is that it learns at all, the task and not only
the form of an answer, so that a chosen mask is measured against a real opponent.

Here: the 135M model on sums, a random 5 % of the block matrices, against the same mask trained on the same
tasks with each other's answers. Reported and not judged: full tuning and the base.
"""

from luthier.claims import Claim
from luthier.claims._tuning import RATE, STEPS, arm, base
from luthier.kit.context import Context


def run(seed: int, ctx: Context) -> dict[str, float]:
    random = arm(seed, ctx, "tune.random", share=0.05)
    form = arm(seed, ctx, "tune.random", answers="shuffled", share=0.05)
    return {
        "method": random["loss"], "control/format only": form["loss"], "control/base": base()["loss"],
        "full tuning": arm(seed, ctx, "tune.full", rate=RATE / 4)["loss"], "forgotten": random["kept"] - base()["kept"],
        "cost/steps": STEPS, "cost/tokens": random["tokens"], "cost/entries": random["entries"],
        "cost/bytes of optimizer state": random["bytes"],
    }  # fmt: skip


CLAIM = Claim(
    id="tune.random",
    sentence="A random 5 % of the block matrices learns sums beyond the form of their answers, by 0.1 nats a token.",
    relation="below", effect=0.1, unit="nats per answer token", control="the same mask on shuffled answers; the base",
    seeds=5, minutes=10, run=run,
)  # fmt: skip
