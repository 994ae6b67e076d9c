"""Mixture of experts: the papers (arXiv 2101.03961, 2401.06066) find a lower loss at equal compute a token
than a dense layer, since each token uses a part of many more parameters.

Here: eight experts, two a token, each half as wide as the dense layer, from scratch at equal steps.
The dumb control has the same experts behind a router that is never trained: a fixed random projection
of the hidden state, without a balance loss. Reported and not judged: how uneven the load is over the
last 50 steps (fullest expert over the mean, less 1) with the balance loss, with bias balancing in its
place, and with neither, and the loss with the latter two (arXiv 2408.15664 finds bias balancing more
even at a lower loss than the balance loss).
"""

from typing import Any

from torch import nn

from luthier.claims import Claim
from luthier.claims._scratch import trained
from luthier.kit.context import Context


def _experts(**fields: Any) -> dict[str, object]:
    return {"ffn": {"use": "block.moe", "set": {"experts": 8, "top_k": 2, **fields}}}


def _freeze_routers(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.requires_grad_(False)


def run(seed: int, ctx: Context) -> dict[str, float]:
    sparse, dense = trained(seed, ctx, _experts()), trained(seed, ctx, {})
    frozen = trained(seed, ctx, _experts(balance_weight=0.0), _freeze_routers)
    free = trained(seed, ctx, _experts(balance_weight=0.0))
    biased = trained(seed, ctx, _experts(balance_weight=0.0, scores="sigmoid", bias_rate=0.01))
    return {
        "method": sparse["loss"], "control/dense": dense["loss"], "control/frozen router": frozen["loss"],
        "loss without balancing": free["loss"], "loss with bias balancing": biased["loss"],
        "violation with the balance loss": sparse["violation"], "violation without balancing": free["violation"],
        "violation with bias balancing": biased["violation"], "cost/tokens": sparse["tokens"],
        "cost/parameters": sparse["parameters"], "cost/parameters of the dense control": dense["parameters"],
    }  # fmt: skip


CLAIM = Claim(
    id="block.moe",
    sentence="At equal compute a token, two of eight experts have a lower loss than a dense layer or a frozen router.",
    relation="below", effect=0.02, unit="nats per byte",
    control="a dense layer of equal compute; the same experts behind a router that is never trained",
    seeds=5, minutes=4, run=run, source="2101.03961 and 2401.06066, dense against sparse at equal FLOPs",
)  # fmt: skip
