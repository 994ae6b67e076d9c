"""The layer and the stack that are built in: pre-norm residual blocks, one after the other.

Names are Llama's, so that a decoder of stock parts has a stock state dict.
"""

from __future__ import annotations

from torch import Tensor, nn

from luthier.kit.parts import Aux, Pass, add_aux
from luthier.model.spec import Spec


class PlainLayer(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.self_attn = spec.part("mixer")
        self.mlp = spec.part("ffn")
        self.input_layernorm = spec.part("norm")
        self.post_attention_layernorm = spec.part("norm")

    def forward(self, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Aux]:
        aux: Aux = {}
        for norm, branch in ((self.input_layernorm, self.self_attn), (self.post_attention_layernorm, self.mlp)):
            normed_BTD, from_norm = norm(x_BTD, at)
            y_BTD, from_branch = branch(normed_BTD, at)
            x_BTD = x_BTD + y_BTD
            add_aux(add_aux(aux, from_norm), from_branch)
        return x_BTD, aux


class PlainStack(nn.ModuleList):
    """All layers in order."""

    def __init__(self, spec: Spec):
        super().__init__(spec.at(i).part("layer") for i in range(spec.config.num_hidden_layers))

    def forward(self, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Aux]:
        aux: Aux = {}
        for layer in self:
            x_BTD, more = at.run(layer, x_BTD, at)
            add_aux(aux, more)
        return x_BTD, aux


PLAIN = {"layer": PlainLayer, "stack": PlainStack}
