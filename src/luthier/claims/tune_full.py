"""Full tuning: the plain baseline. What it has to show is that it learns the task, and not only the form of an
answer, in this experiment; else nothing can be said of methods compared with it.

Here: the 135M model on sums, every parameter, against the same on the same tasks with each other's answers.
Reported and not judged: what it forgets of Python.
"""

from luthier.claims import Claim
from luthier.claims._tuning import RATE, STEPS, arm, base
from luthier.kit.context import Context


def run(seed: int, ctx: Context) -> dict[str, float]:
    full, form = arm(seed, ctx, "tune.full", rate=RATE / 4), arm(seed, ctx, "tune.full", "shuffled", RATE / 4)
    return {
        "method": full["loss"], "control/format only": form["loss"], "control/base": base()["loss"],
        "forgotten": full["kept"] - base()["kept"], "cost/steps": STEPS, "cost/tokens": full["tokens"],
        "cost/entries": full["entries"], "cost/bytes of optimizer state": full["bytes"],
    }  # fmt: skip


CLAIM = Claim(
    id="tune.full",
    sentence="Full tuning learns sums beyond the form of their answers, by 0.1 nats a token.",
    relation="below", effect=0.1, unit="nats per answer token", control="the same on shuffled answers; the base",
    seeds=5, minutes=10, run=run,
)  # fmt: skip
