"""What norms share.  B: sequences, T: positions, D: channels."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_unit(x_BTD: Tensor, eps: float, center: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in at least fp32, in the dtype of x.

    center: subtract the mean first.
    """
    wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    if center:
        wide_BTD = wide_BTD - wide_BTD.mean(dim=-1, keepdim=True)
    scale_BT1 = torch.rsqrt(wide_BTD.square().mean(dim=-1, keepdim=True) + eps)
    return (wide_BTD * scale_BT1).to(x_BTD.dtype)
