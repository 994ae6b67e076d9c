"""LNS: RMSNorm whose output shrinks with depth, by one over the square root of its layer's number.

Paper: arXiv 2502.05795.  Layers count from 1; both norms of a layer are scaled, the one before the head
(which belongs to no layer) is not.  Under pre-norm the residual stream's variance grows with depth until
deep layers hardly change it (`probe.curse_of_depth` shows it); what a layer adds shrinks with its norm.

Notable.  The scale is multiplied into the gain before the gain is used, so a decoder with this norm and
one of the stock architecture with gains `weight * scale` (`model.export.to_stock`) agree bit for bit, in
any dtype.  `form: gain` is the other published variant: the same function at first, but an optimizer
of Adam's kind then moves the effective gain by its whole step, here by the step times the scale.

Footguns.  Initial weights that themselves shrink with depth undo it: keep the normal init.  The published
gains need some billion tokens; early on, losses are higher than without it.
Shapes: B sequences, T positions, D channels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from luthier.fields import Positive, Range
from luthier.kit.norms import rms_unit
from luthier.kit.parts import Aux, Pass
from luthier.shapes import Part, Reduces


class Lns(Part):
    """See the head of this file."""

    form: Literal["scale", "gain"] = "scale"
    """scale: a constant factor beside a gain that starts at 1 (the paper's); gain: a gain that starts at the factor"""
    power: Annotated[float, Range(0.0)] = 0.5
    """the factor is layer^-power; 0.5 is the paper's, 0 is plain RMSNorm"""
    eps: Positive | None = None
    """added to the mean square under the root; null takes the model's `rms_norm_eps`"""

    slots = ("norm",)
    reduces_to = (Reduces({"power": 0.0}, "norm.rms"), Reduces({"form": "gain", "power": 0.0}, "norm.rms"))
    departures = (
        "lmsdss/LayerNorm-Scaling 3ac54dd (peft_pretraining/modeling_llama.py) lowers the case of NORM_TYPE and then"
        " asks whether it is 'LNS', which it never is: the released scripts build layers without norms whose forward"
        " runs neither attention nor FFN, so the published numbers cannot come from this code"
        " (tests/golden/test_norm_lns.py::test_released_switch_builds_no_lns)",
        "dandingsky/GPAS 3198068 (peft_pretraining/modeling_llama.py, `lns`) starts trainable gains at 1/sqrt(layer)"
        " where the paper scales the norm's output: under Adam the effective gain moves sqrt(layer) times as far a"
        " step; it is `form: gain` here (tests/golden/test_norm_lns.py::test_forms_part_at_the_first_step_of_adam)",
    )

    def build(self, spec: Any) -> nn.Module:
        eps = spec.config.rms_norm_eps if self.eps is None else self.eps
        scale = 1.0 if spec.layer is None else (spec.layer + 1) ** -self.power
        return ScaledNorm(spec.config.hidden_size, eps, scale, self.form == "gain")


class ScaledNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain * scale; with `inside` the scale is where the gain starts from."""

    def __init__(self, width: int, eps: float, scale: float, inside: bool):
        super().__init__()
        self.initial = {"weight": scale if inside else 1.0}
        self.weight = nn.Parameter(torch.full((width,), self.initial["weight"]))
        self.eps, self.scale = eps, 1.0 if inside else scale

    def gain(self) -> Tensor:
        """The gain of the plain RMSNorm that does the same."""
        return self.weight * self.scale

    def forward(self, x_BTD: Tensor, at: Pass | None = None) -> tuple[Tensor, Aux]:
        return self.gain() * rms_unit(x_BTD, self.eps), {}
