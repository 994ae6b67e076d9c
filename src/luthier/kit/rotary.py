"""Rotary position embedding, half layout: entry i of a head turns with entry i + H/2.

Paper: arXiv 2104.09864, in the layout of Llama and its kin (GPT-J and the original code interleave).
Shapes: B sequences, N heads, T positions, H width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions_BT: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, width), fp32: pair i turns by position / theta^(2i/width)."""
    exponent_h = torch.arange(0, width, 2, dtype=torch.float32, device=positions_BT.device) / width
    angle_BTh = positions_BT[..., None].float() * (1.0 / theta**exponent_h)
    angle_BTH = torch.cat((angle_BTh, angle_BTh), dim=-1)
    return angle_BTH.cos(), angle_BTH.sin()


def rotate(x_BNTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """x with each head turned to its position, in x's dtype."""
    cos, sin = cos_BTH[:, None].to(x_BNTH.dtype), sin_BTH[:, None].to(x_BNTH.dtype)
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos + torch.cat((-second, first), dim=-1) * sin
