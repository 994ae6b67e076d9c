"""The experiment that claims about depth share: decoders of 20 thin layers, trained from scratch (`_scratch`).

Arms: pre-norm, LNS, and a constant: every norm of a layer scaled by what LNS's scales are on average, so
that what depth does is told apart from what a smaller scale does. An arm is trained once for all claims
that ask for it in one run, so it knows its seed and nothing of the claim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from luthier.claims import _scratch
from luthier.kit.context import Context
from luthier.norm.lns import ScaledNorm

LAYERS = 20
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS, "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4,
}  # fmt: skip
LNS = {"norm": "norm.lns"}
MEAN = sum(layer**-0.5 for layer in range(1, LAYERS + 1)) / LAYERS
ARMS = ("pre-norm", "LNS", "constant scale")


@cache
def trained(arm: str, seed: int) -> tuple[Any, dict[str, float]]:
    """The model of one arm after training, and what `_scratch.trained` says of it."""
    held: list[Any] = []

    def prepare(model: Any) -> None:
        held.append(model)
        norms = [m for m in model.model.layers.modules() if isinstance(m, ScaledNorm)]
        for norm in norms if arm == "constant scale" else ():
            norm.scale = MEAN

    found = _scratch.trained(
        seed, Context(step="claims about depth"), {} if arm == "pre-norm" else LNS, prepare, **SIZES
    )
    return held[0], found
