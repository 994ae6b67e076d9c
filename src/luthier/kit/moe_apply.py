"""Running tokens through their chosen experts: sort by expert, one matrix product an expert, add back.

Nothing is padded or dropped, so the cost is that of the tokens there are. `unbind` and `split` rather
than indexing: the backward of `weights[e]` would fill a gradient of all experts for each expert.
Shapes: N tokens, K experts per token, E experts, D width, F inner width, R = N*K rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_apply(
    x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:  # fmt: skip
    """sum_k weight[n, k] * down_e(activation(gate_e x) * up_e x), e = index[n, k]: (N, D) in x's dtype.

    The counts go to the host once, to split the rows.
    """
    expert_R, order_R = index_NK.flatten().sort(stable=True)
    token_R = order_R // index_NK.shape[1]
    counts = torch.bincount(expert_R, minlength=gate_EFD.shape[0]).tolist()
    rows_RD = x_ND.index_select(0, token_R)
    experts = zip(rows_RD.split(counts), gate_EFD.unbind(0), up_EFD.unbind(0), down_EDF.unbind(0), strict=True)
    made_RD = torch.cat([F.linear(activation(F.linear(x, g)) * F.linear(x, u), d) for x, g, u, d in experts])
    weight_R1 = weight_NK.flatten().index_select(0, order_R)[:, None]
    out_ND = torch.zeros_like(x_ND)
    return out_ND.index_add(0, token_R, (made_RD * weight_R1.to(made_RD.dtype)).to(out_ND.dtype))
