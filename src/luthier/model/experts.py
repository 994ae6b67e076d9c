"""The experts of any stock mixture-of-experts model, run by `kit.moe_apply`.

    import luthier.model
    model.set_experts_implementation("luthier")     # or from_pretrained(..., experts_implementation="luthier")

For models whose experts are gated, without biases and stored gate before up, as in Mixtral, OLMoE, Qwen
and DeepSeek; others are refused by name. The same products on every device: on CPUs it is fast, on GPUs
transformers' grouped kernels should be (not measured). Not for torch.compile: it runs as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import _default_apply_gate

from luthier.errors import LuthierError
from luthier.kit.moe_apply import Activation, moe_apply

SILU = ("SiLU", "SiLUActivation")


@torch.compiler.disable
def forward(experts: Any, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """What transformers calls in place of an experts module's forward: (N, D) in x's dtype.

    index_NK of the number of experts or more marks another rank's expert.
    """
    _check(experts)
    y_ND = moe_apply(x_ND, index_NK, weight_NK, (experts.gate_up_proj,), experts.down_proj, _activation(experts))
    return y_ND


def _activation(experts: Any) -> Activation:
    return F.silu if type(experts.act_fn).__name__ in SILU else experts.act_fn


def _check(experts: Any) -> None:
    odd = {
        "no gate": not experts.has_gate, "biases": experts.has_bias, "transposed matrices": experts.is_transposed,
        "gate and up interleaved": not experts.is_concatenated, "a norm after them": experts.has_post_expert_norm,
        "a gate of their own": type(experts)._apply_gate is not _default_apply_gate,
    }  # fmt: skip
    if any(odd.values()):
        raise LuthierError(
            f"the experts have {', '.join(what for what, has in odd.items() if has)}", where=type(experts).__name__,
            do='use experts_implementation="grouped_mm" for this model',
        )  # fmt: skip
