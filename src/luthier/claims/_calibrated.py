"""What claims about merges with data add to `_domains`: each specialist with windows of its own training text.

The windows come from the text the specialists were trained on: neither from that to choose by nor from that to
test on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.claims import _domains as domains
from luthier.claims._scratch import windows
from luthier.flows import Item
from luthier.kit.context import Context
from luthier.testing.tiny import TinyData, TinySubject

WINDOWS = 128
"""of each specialist's text; a method looks at all of them"""
COST = {"cost/windows looked at": float(3 * WINDOWS), **domains.COST}


class Bytes:
    """A tokenizer whose tokens are bytes."""

    pad_token_id, eos_token_id, chat_template = 0, None, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> Mapping[str, Any]:
        return {"input_ids": list(text.encode("latin-1"))}


def door(seed: int, ctx: Context, experts: Sequence[domains.Weights]) -> Context:
    """The context in which a merge with data finds the specialists of all domains, in their order."""
    subjects = [
        TinySubject(domain, domains._model(weights, seed).eval(), Bytes())
        for domain, weights in zip(domains.DOMAINS, experts, strict=True)
    ]
    return ctx.with_(seed=seed, roles={"subjects": subjects, "data": [_data(seed, ctx, d) for d in domains.DOMAINS]})


def _data(seed: int, ctx: Context, domain: str) -> TinyData:
    found = windows(domains.told(domain)[0], WINDOWS, ctx.with_(seed=seed).rng("calibration", domain))
    texts = [bytes(window.tolist()).decode("latin-1") for window in found]
    return TinyData(domain, [Item(hashlib.sha256(t.encode()).hexdigest()[:16], text=t) for t in texts], ())
