"""Evolve: the paper (arXiv 2403.13187) finds that an evolved merge (DARE, then TIES' vote, a density and a weight for
each model found by CMA-ES) does better than merges set by hand.

Here: three specialists of three domains, 45 merges judged on held-out windows in each arm: five generations of CMA-ES
over three weights and three densities, against 45 scales of plain addition, 45 draws from the same six ranges, and the
plain average. What each arm likes best is measured on test windows. Reported and not judged: how much lower the
evolved merge's loss is on the windows it was chosen by. The paper judges 1000 merges, and 12,800 models in its second
space, the order of layers. That space is reported and not judged, on the decoder of eight layers that claims about
layers share, with its two tuned variants: what sixty models of CMA-ES find, what sixty drawn at random, and the base.
"""

import json
import tempfile
from pathlib import Path

from luthier.claims import Claim
from luthier.claims import _domains as domains
from luthier.claims import _layers as layers
from luthier.compress.stitch import Stitch
from luthier.flows import Space
from luthier.kit.context import Context
from luthier.merge.evolve import Evolve
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.shapes import Transform
from luthier.testing.judged import search

MERGES, WIDEST, ORDERS = 45, 1.5, 60
NAMES = [f"{domain} nll" for domain in domains.DOMAINS]


def run(seed: int, ctx: Context) -> dict[str, float]:
    start, experts = domains.base(seed, ctx), domains.specialists(seed, ctx)
    ctx = ctx.with_(seed=seed)

    def judged(candidate: Transform, side: int = 1) -> list[float]:
        weights = domains.merged(candidate, start, experts, ctx)
        return [domains.loss(weights, domain, seed, ctx, side) for domain in domains.DOMAINS]

    def worth(candidate: Transform, side: int = 2) -> float:
        return sum(judged(candidate, side)) / len(NAMES)

    def evolved(method: Evolve) -> Transform:
        table, _ = search(method, judged, NAMES, judged(Linear()), MERGES, Space(1, (1, 1, 1)), seed)
        return Transform.from_value(json.loads(table.where(chosen=True)[0]["candidate"]))

    best, scales = evolved(Evolve()), [WIDEST * (i + 1) / MERGES for i in range(MERGES)]
    return {
        "method": worth(best),
        "control/task arithmetic": worth(min((TaskArithmetic(scale=s) for s in scales), key=lambda m: worth(m, 1))),
        "control/random": worth(evolved(Evolve(by="random"))), "control/plain average": worth(Linear()),
        "lower where it was chosen by": worth(best) - worth(best, 1),
        "cost/merges judged": float(MERGES), **domains.COST, **_orders(seed, ctx),
    }  # fmt: skip


def _orders(seed: int, ctx: Context) -> dict[str, float]:
    """The losses that orders of layers leave, of which each search judges as many."""
    with tempfile.TemporaryDirectory() as folder:
        bench = layers.Bench(seed, ctx, Path(folder))
        whole = bench.left(Stitch(layers=tuple(f"base.{i}" for i in range(layers.LAYERS))))
        found = {by: bench.cut(Evolve(space="flow", by=by), trials=ORDERS) for by in ("cmaes", "random")}
        return {
            "layer orders/evolved": found["cmaes"]["loss"], "layer orders/random": found["random"]["loss"],
            "layer orders/base": whole["loss"], "cost/layer orders judged": float(ORDERS),
        }  # fmt: skip


CLAIM = Claim(
    id="merge.evolve",
    sentence="With 45 merges of three specialists judged, CMA-ES finds densities and weights whose merge has a lower "
    "mean loss over their domains than addition at the best of 45 scales, than the best of 45 draws, or the average.",
    relation="below", effect=0.01, unit="nats per byte",
    control="task arithmetic with one of as many scales; as many draws from the same ranges; the plain average",
    seeds=5, minutes=4, run=run, source="2403.13187: merging in the parameter space",
)  # fmt: skip
