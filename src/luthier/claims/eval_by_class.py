"""eval.by_class: a table by class shows what the mean hides: a model that says the same whatever it is asked.

No paper says it. Here: the 135M instruct model, untrained for it, is asked whether polynomials are sums of squares,
eight of each of six classes, three of which are and three of which are not. The method's value is the standard
deviation of its accuracy over the six classes; the control's that over six groups of eight drawn without regard to
class (the mean of 200 draws), which is what chance leaves. Reported: the accuracy over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from luthier.claims import Claim
from luthier.claims._bundled import Host
from luthier.engine.data import open_data
from luthier.eval.accuracy import Accuracy
from luthier.eval.by_class import ALL, ByClass
from luthier.kit.context import Context

CLASSES, EACH, DRAWS = ("2.1a", "2.1b", "3.1a", "3.1b", "3.2a", "3.2b"), 8, 200


def run(seed: int, ctx: Any) -> Mapping[str, float]:
    many = EACH * len(CLASSES)
    settings = {"chars": 120, "classes": list(CLASSES), "equal": True}
    asked = open_data(
        "sos", {"source": "sos1k:plain", "set": settings, "split": {"train": 0, "test": many}}, Context(seed=seed)
    )
    short = Accuracy(max_new_tokens=4)
    rows = ByClass(accuracy=short).measure([Host()], [asked], ctx).dicts()
    mine = [row for row in rows if row["model"] == "smollm2"]
    shares = torch.tensor([row["value"] for row in mine if row["class"] != ALL])
    right = torch.tensor([row["value"] for row in short.measure([Host()], [asked], ctx).dicts()])
    drawn = [
        right[torch.randperm(many, generator=ctx.rng("groups", i))].view(len(CLASSES), EACH).mean(1).std()
        for i in range(DRAWS)
    ]
    return {
        "method": float(shares.std()), "control": float(torch.stack(drawn).mean()),
        "accuracy over all": float(right.mean()), "cost/answers": 2.0 * many,
    }  # fmt: skip


CLAIM = Claim(
    id="eval.by_class",
    sentence="Accuracy of a model untrained for the task spreads over the classes by 0.2 more than over random groups.",
    relation="above", effect=0.2, unit="standard deviation of accuracy", control="groups drawn without regard to class",
    seeds=5, minutes=3, run=run,
)  # fmt: skip
