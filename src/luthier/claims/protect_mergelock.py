"""MergeLock: the paper (arXiv 2509.01548, main tables) finds that a merge with a locked model loses nearly all it
could do, while the locked model itself does what it did.

Here: a specialist of each of three domains is averaged with its base. Judged is what the average loses against
the specialist alone, on its domain. Controls: the same specialist without the lock, and, as the dumb one, the
specialist under noise that moves it as far as the lock does: that spoils merges too, but first of all itself.
Reported beside: what the average loses after protect.restore has aligned the locked specialist to the base,
without the key, and how much the lock changes the specialist itself.
"""

import torch
from torch import Tensor

from luthier.claims import Claim, _locks
from luthier.claims import _domains as domains
from luthier.claims._domains import Weights
from luthier.kit.context import Context
from luthier.protect.restore import Restore


def noisy(expert: Weights, like: Weights, domain: str, ctx: Context) -> Weights:
    """The expert under noise that moves every tensor as far as `like` is away."""
    made: dict[str, Tensor] = {}
    for name, tensor in expert.items():
        noise = torch.randn(tensor.shape, generator=ctx.rng("noise", domain, name))
        made[name] = tensor + noise * ((like[name] - tensor).norm() / noise.norm())
    return made


def run(seed: int, ctx: Context) -> dict[str, float]:
    def judge(start: Weights, expert: Weights, domain: str) -> dict[str, float]:
        lock = _locks.locked(expert, seed, domain, ctx)
        noise = noisy(expert, lock, domain, ctx.with_(seed=seed))
        back = _locks.changed(Restore(), start, lock, ctx)
        loss = {
            name: (domains.loss(w, domain, seed, ctx), domains.loss(_locks.average(start, w, ctx), domain, seed, ctx))
            for name, w in (("plain", expert), ("lock", lock), ("noise", noise), ("back", back))
        }
        lost = {name: merged - alone for name, (alone, merged) in loss.items()}
        return {
            "method": lost["lock"], "control/without the lock": lost["plain"], "control/as much noise": lost["noise"],
            "restored without the key": lost["back"], "change of the specialist": loss["lock"][0] - loss["plain"][0],
            "noise's change of the specialist": loss["noise"][0] - loss["plain"][0],
        }  # fmt: skip

    return {**_locks.each(seed, ctx, judge), **domains.COST}


CLAIM = Claim(
    id="protect.mergelock",
    sentence="Averaging a locked model with its base loses far more than averaging the unlocked one, though the model "
    "itself is unchanged; protect.restore undoes that without the key.",
    relation="above", effect=0.5, unit="nats per byte",
    control="averaging the same model without the lock; under as much noise", seeds=5, minutes=4, run=run,
    source="2509.01548: merging with protected models",
)  # fmt: skip
