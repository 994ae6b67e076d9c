"""RMSNorm: divides each position by its root mean square and scales each channel by a learned gain.

Paper: arXiv 1910.07467.  The statistics are taken in fp32 whatever the input's dtype, and the result
is cast back before the gain is applied, as in Llama; in bf16 the order of the two matters in the last
bit.  `center` subtracts the mean first, which makes it LayerNorm without a bias: the paper's claim is
that nothing is lost without it.  Footgun: eps stands under the root, so positions far smaller than
sqrt(eps) are not brought to unit size.
Shapes: B sequences, T positions, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.fields import Positive
from luthier.kit.norms import rms_unit
from luthier.kit.parts import Aux, Pass
from luthier.shapes import Part, Reduces


class Rms(Part):
    """See the head of this file."""

    eps: Positive | None = None
    """added to the mean square under the root; null takes the model's `rms_norm_eps`"""
    center: bool = False
    """subtract the mean over the channels first (LayerNorm without a bias)"""

    slots = ("norm",)
    reduces_to = (
        Reduces({}, "llama.norm", tolerance=1e-6),
        Reduces({"center": True}, "torch.layer_norm", tolerance=1e-5),
    )

    def build(self, spec: Any) -> nn.Module:
        eps = spec.config.rms_norm_eps if self.eps is None else self.eps
        return RmsNorm(spec.config.hidden_size, eps, self.center)


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension."""

    initial = {"weight": 1.0}

    def __init__(self, width: int, eps: float, center: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.center = eps, center

    def forward(self, x_BTD: Tensor, at: Pass | None = None) -> tuple[Tensor, Aux]:
        return self.weight * rms_unit(x_BTD, self.eps, self.center), {}
