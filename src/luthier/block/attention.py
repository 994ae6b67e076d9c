"""Grouped-query attention: rotary positions, a cache, shared key-value heads; causal, or looking both ways.

Paper: arXiv 2305.13245 (grouped queries; rotary positions are arXiv 2104.09864).  Query head i reads
key-value head i // (heads / kv_heads), rotary halves lie as in Llama, and the products run through
torch's scaled_dot_product_attention.  Sizes are the model's unless a field says otherwise, so that
layers may differ.  Footguns: keys are cached after they were turned, so a cache cannot be moved to
other positions; a row of the mask with no key at all gives zeros; a decoder in which any layer looks
both ways has no cache and cannot generate from left to right.
Shapes: B sequences, T positions of this pass, S positions seen, D channels, N query heads, G key-value
heads, H width of a head.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.fields import Count, Positive
from luthier.kit.parts import Aux, Pass
from luthier.kit.rotary import rotate
from luthier.shapes import Part, Reduces


class Attention(Part):
    """See the head of this file."""

    kv_heads: Count | None = None
    """key-value heads, a divisor of the query heads: 1 is multi-query, as many as the query heads is
    plain multi-head attention; null takes the model's `num_key_value_heads`"""
    theta: Positive | None = None
    """base of the rotary wavelengths; null takes the model's `rope_theta`"""
    causal: bool = True
    """each position sees itself and what stands before it; false: every position sees all, as mask predictors need"""

    slots = ("mixer",)
    reduces_to = Reduces({}, "llama.attention", tolerance=1e-6)

    def build(self, spec: Any) -> nn.Module:
        config = spec.config
        kv_heads = config.num_key_value_heads if self.kv_heads is None else self.kv_heads
        if config.num_attention_heads % kv_heads:
            raise LuthierError(
                f"{kv_heads} key-value heads do not divide {config.num_attention_heads} query heads",
                where=f"{self.id}.kv_heads",
            )
        return GroupedAttention(spec, kv_heads, config.rope_theta if self.theta is None else self.theta, self.causal)


class GroupedAttention(nn.Module):
    """Projections named as in Llama."""

    def __init__(self, spec: Any, kv_heads: int, theta: float, causal: bool):
        super().__init__()
        width, heads, self.head_dim = spec.config.hidden_size, spec.config.num_attention_heads, spec.config.head_dim
        self.layer, self.groups, self.theta, self.causal = spec.layer, heads // kv_heads, theta, causal
        self.q_proj = spec.linear(width, heads * self.head_dim)
        self.k_proj = spec.linear(width, kv_heads * self.head_dim)
        self.v_proj = spec.linear(width, kv_heads * self.head_dim)
        self.o_proj = spec.linear(heads * self.head_dim, width)

    def forward(self, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Aux]:
        split = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BNTH = self.q_proj(x_BTD).view(split).transpose(1, 2)
        k_BGTH = self.k_proj(x_BTD).view(split).transpose(1, 2)
        v_BGSH = self.v_proj(x_BTD).view(split).transpose(1, 2)
        cos_BTH, sin_BTH = at.rotary(self.head_dim, self.theta)
        q_BNTH, k_BGSH = rotate(q_BNTH, cos_BTH, sin_BTH), rotate(k_BGTH, cos_BTH, sin_BTH)
        if at.cache is not None:
            k_BGSH, v_BGSH = at.cache.update(k_BGSH, v_BGSH, self.layer)
        mask = at.mask if self.causal else at.both
        fused = mask is None  # with a mask, fast kernels want every query head to have its own keys
        if not fused:
            k_BGSH, v_BGSH = (kv.repeat_interleave(self.groups, dim=1) for kv in (k_BGSH, v_BGSH))
        y_BNTH = F.scaled_dot_product_attention(
            q_BNTH, k_BGSH, v_BGSH, mask, is_causal=self.causal and fused and q_BNTH.shape[2] > 1, enable_gqa=fused
        )
        return self.o_proj(y_BNTH.transpose(1, 2).flatten(2)), {}
