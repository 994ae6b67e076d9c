"""The modules that Parts with experts are made of, named as in DeepSeek-V3, and what they report.

Shapes: B sequences, T positions, D channels, E experts, K chosen per token, C routers, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kit import routing
from luthier.kit.moe_apply import moe_apply
from luthier.kit.parts import Aux


class Router(nn.Module):
    """A router's weight (E, D), or several in one (C, E, D); the bias where bias balancing is on."""

    initial = {"e_score_correction_bias": 0.0}

    def __init__(self, *shape: int, biased: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        bias_E = torch.zeros(shape[:-1], dtype=torch.float32) if biased else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Casts leave the bias in fp32: its steps of 1e-3 would vanish in bf16."""
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias_E is not None and not bias_E.is_meta:
            self.e_score_correction_bias = bias_E.to(self.weight.device)
        return self


class Experts(nn.Module):
    """The routed experts' weights, one tensor a role."""

    def __init__(self, experts: int, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x_BTD: Tensor, index_BTK: Tensor, weight_BTK: Tensor) -> Tensor:
        """The weighted sum over each token's experts, (B, T, D)."""
        wide, (index_NK, weight_NK) = (
            (self.gate_proj, self.up_proj),
            (index_BTK.flatten(0, 1), weight_BTK.flatten(0, 1)),
        )
        return moe_apply(x_BTD.flatten(0, 1), index_NK, weight_NK, wide, self.down_proj).view_as(x_BTD)


class Shared(nn.Module):
    """The shared experts, side by side in one SwiGLU layer of inner width `width`."""

    def __init__(self, spec: Any, width: int):
        super().__init__()
        self.gate_proj = spec.linear(spec.config.hidden_size, width)
        self.up_proj = spec.linear(spec.config.hidden_size, width)
        self.down_proj = spec.linear(width, spec.config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


def check_choice(experts: int, top_k: int, renormalise: bool, where: str) -> None:
    """Raise LuthierError where a choice of `top_k` experts cannot be made, or its router could never learn."""
    if top_k > experts:
        raise LuthierError(f"top_k {top_k} exceeds the {experts} experts", where=where)
    if top_k == 1 and experts > 1 and renormalise:
        what = "renormalised, the one chosen expert always weighs 1 and the router never learns"
        raise LuthierError(what, where=where, do="set renormalise: false")


def expert_width(given: int | None, dense: int, runs: int, where: str) -> int:
    """The inner width of one expert: as given, or the dense layer's divided among the `runs` a token makes."""
    width = given or dense // runs
    if width < 1:
        what = f"intermediate_size {dense} is too small to divide among {runs} experts"
        raise LuthierError(what, where=f"{where}.width", do="set width")
    return width


def load_metrics(load_E: Tensor, place: str) -> Aux:
    """metric/load.PLACE (tokens per expert) and metric/max_violation.PLACE (fullest expert over the mean, less 1)."""
    return {f"metric/load.{place}": load_E, f"metric/max_violation.{place}": routing.max_violation(load_E)}
