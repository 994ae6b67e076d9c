"""Gated layers: the paper (arXiv 2002.05202) finds SwiGLU and GEGLU better than an ungated layer of as
many parameters, with either activation.

Here: SwiGLU of width 192 against ungated layers of width 288, with ReLU and with SiLU, from scratch.
The second control tells the gate from the activation.
"""

from luthier.claims import Claim
from luthier.claims._scratch import SIZES, trained
from luthier.kit.context import Context


def _ungated(activation: str) -> dict[str, object]:
    width = SIZES["intermediate_size"] * 3 // 2
    return {"ffn": {"use": "block.dense", "set": {"gated": False, "activation": activation, "width": width}}}


def run(seed: int, ctx: Context) -> dict[str, float]:
    gated, relu, silu = (trained(seed, ctx, slots) for slots in ({}, _ungated("relu"), _ungated("silu")))
    return {
        "method": gated["loss"], "control/ungated relu": relu["loss"], "control/ungated silu": silu["loss"],
        "cost/tokens": gated["tokens"], "cost/parameters": gated["parameters"],
        "cost/parameters of the control": relu["parameters"],
    }  # fmt: skip


CLAIM = Claim(
    id="block.dense",
    sentence="At equal parameters SwiGLU has a lower loss than ungated layers with ReLU or SiLU.",
    relation="below", effect=0.01, unit="nats per byte",
    control="ungated feed-forward layers of as many parameters, with ReLU and with SiLU",
    seeds=5, minutes=2, run=run, source="table 1",
)  # fmt: skip
