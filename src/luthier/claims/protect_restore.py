"""Restore: the paper (arXiv 2606.30360, abstract) finds that anchoring on the base brings locked models back to where
they merge as if they had never been locked.

Here: a specialist of each of three domains is locked, aligned to its base without the key, and averaged with it.
The control is the average with the specialist that was never locked. Reported beside: the average without any
alignment, with an alignment by turns alone (Procrustes), and the base itself, which is no merge at all.
"""

from luthier.claims import Claim, _locks
from luthier.claims import _domains as domains
from luthier.claims._domains import Weights
from luthier.kit.context import Context
from luthier.protect.restore import Restore


def run(seed: int, ctx: Context) -> dict[str, float]:
    def judge(start: Weights, expert: Weights, domain: str) -> dict[str, float]:
        lock = _locks.locked(expert, seed, domain, ctx)

        def merged(other: Weights) -> float:
            return domains.loss(_locks.average(start, other, ctx), domain, seed, ctx)

        return {
            "method": merged(_locks.changed(Restore(), start, lock, ctx)), "control/never locked": merged(expert),
            "by Procrustes": merged(_locks.changed(Restore(fit="procrustes"), start, lock, ctx)),
            "not aligned": merged(lock), "the base itself": domains.loss(start, domain, seed, ctx),
        }  # fmt: skip

    return {**_locks.each(seed, ctx, judge), **domains.COST}


CLAIM = Claim(
    id="protect.restore",
    sentence="A locked model that was aligned to its base without the key merges with it as if never locked.",
    relation="within", effect=0.01, unit="nats per byte", control="averaging the model that was never locked", seeds=5,
    minutes=4, run=run, source="2606.30360: abstract",
)  # fmt: skip
