"""What claims about locks share: a specialist of `_domains`, and its plain average with the base.

Everything is judged on the specialist's own domain, in nats per byte, mean over the three domains. The small
decoder is rotary, with a key-value head of its own for each of its eight query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.claims import _domains as domains
from luthier.claims._domains import Weights
from luthier.claims._scratch import SIZES
from luthier.engine.stream import transform_tensors
from luthier.kit.context import Context
from luthier.kit.secret import Secret
from luthier.merge.linear import Linear
from luthier.model.config import config_from
from luthier.protect.mergelock import MergeLock
from luthier.shapes import Transform

CONFIG: dict[str, Any] = config_from(SIZES).to_dict()


def each(seed: int, ctx: Context, judge: Callable[[Weights, Weights, str], dict[str, float]]) -> dict[str, float]:
    """The mean over the domains of what `judge` says of (base, specialist, domain)."""
    start = domains.base(seed, ctx)
    found = [judge(start, domains.specialist(seed, ctx, name), name) for name in domains.DOMAINS]
    return {key: sum(f[key] for f in found) / len(found) for key in found[0]}


def locked(expert: Weights, seed: int, domain: str, ctx: Context) -> Weights:
    """The specialist under a key of its own."""
    keyed = ctx.with_(roles={"key": Secret(f"{seed} {domain} of the claims".encode())})
    return transform_tensors(MergeLock(), expert, [], keyed, CONFIG)


def changed(method: Transform, start: Weights, expert: Weights, ctx: Context) -> Weights:
    """What a method with a base makes of a specialist."""
    return transform_tensors(method, start, [expert], ctx, CONFIG)


def average(start: Weights, expert: Weights, ctx: Context) -> Weights:
    return transform_tensors(Linear(), None, [start, expert], ctx)
