"""Gated feed-forward layer: one projection, through an activation, gates another (SwiGLU by default).

Paper: arXiv 2002.05202.  y = down(act(gate x) * up x).  At equal `width` a gated layer has half again
the parameters of an ungated one: compare at two thirds of the width, as the paper does.
Shapes: B sequences, T positions, D channels, F inner width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from luthier.fields import Count
from luthier.kit.parts import Aux, Pass
from luthier.shapes import Part, Reduces

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": F.sigmoid, "none": lambda x: x}


class Dense(Part):
    """See the head of this file."""

    width: Count | None = None
    """inner width; null takes the model's `intermediate_size`"""
    activation: Literal["silu", "gelu", "relu", "sigmoid", "none"] = "silu"
    """silu is SwiGLU, gelu GEGLU, relu ReGLU, sigmoid GLU, none the bilinear layer"""
    gated: bool = True
    """false drops the gate: y = down(act(up x)), the layer the paper compares with"""

    slots = ("ffn",)
    reduces_to = Reduces({}, "llama.mlp", tolerance=1e-6)

    def build(self, spec: Any) -> nn.Module:
        width = spec.config.intermediate_size if self.width is None else self.width
        return FeedForward(spec, width, self.activation, self.gated)


class FeedForward(nn.Module):
    """Projections named as in Llama."""

    def __init__(self, spec: Any, width: int, activation: str, gated: bool):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = spec.linear(spec.config.hidden_size, width) if gated else None
        self.up_proj = spec.linear(spec.config.hidden_size, width)
        self.down_proj = spec.linear(width, spec.config.hidden_size)

    def forward(self, x_BTD: Tensor, at: Pass | None = None) -> tuple[Tensor, Aux]:
        up_BTF = self.up_proj(x_BTD)
        if self.gate_proj is None:
            return self.down_proj(self.activation(up_BTF)), {}
        return self.down_proj(self.activation(self.gate_proj(x_BTD)) * up_BTF), {}
