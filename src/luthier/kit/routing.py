"""Routing tokens to experts: the choice, what keeps the load even, and how uneven it is.

Shapes: B sequences, T positions, N = B*T tokens, E experts, K chosen per token. `keep` marks the real
tokens, those that are not padding; None means all.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def choose(scores_NE: Tensor, k: int, renormalise: bool = False, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k best experts of each token and their weights, (N, K) each (or (B, T, K)), best first.

    bias_E takes part in the choice only (arXiv 2408.15664): the weights are the plain scores.
    """
    ranked_NE = scores_NE if bias_E is None else scores_NE.detach() + bias_E
    index_NK = ranked_NE.topk(k, dim=-1).indices
    weight_NK = scores_NE.gather(-1, index_NK)
    if renormalise:
        # the floor is for sigmoid scores, all of which may vanish
        weight_NK = weight_NK / weight_NK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    return index_NK, weight_NK


def loads(index_BTK: Tensor, experts: int, keep_BT: Tensor | None = None) -> Tensor:
    """How many real tokens of each sequence chose each expert: (B, E), fp32."""
    ones = torch.ones(index_BTK.shape, dtype=torch.float32, device=index_BTK.device)
    if keep_BT is not None:
        ones = ones * keep_BT[..., None]
    load_BE = torch.zeros(index_BTK.shape[0], experts, dtype=torch.float32, device=index_BTK.device)
    return load_BE.scatter_add_(1, index_BTK.flatten(1), ones.flatten(1))


def balance_loss(
    scores_BTE: Tensor,
    load_BE: Tensor,
    k: int,
    keep_BT: Tensor | None = None,
    over: Literal["sequence", "batch"] = "batch",
) -> Tensor:
    """sum_e f_e P_e with f_e the share of choices times E and P_e the mean score: 1 where even.

    over "batch": f and P are taken over all tokens (Switch, arXiv 2101.03961, eq. 4-6, for any k);
    "sequence": for each sequence, then averaged over those that have a real token (DeepSeek-V3,
    arXiv 2412.19437, section 2.1.2). No gradient flows through f, a count.
    """
    keep = scores_BTE.new_ones(scores_BTE.shape[:2]) if keep_BT is None else keep_BT.to(scores_BTE.dtype)
    tokens_B, mass_BE = keep.sum(1), (scores_BTE * keep[..., None]).sum(1)
    if over == "batch":
        tokens_B, mass_BE, load_BE = tokens_B.sum(0, True), mass_BE.sum(0, True), load_BE.sum(0, True)
    tokens_B1 = tokens_B.clamp_min(1)[:, None]
    share_BE = load_BE * load_BE.shape[1] / (k * tokens_B1)
    loss_B = (share_BE * mass_BE / tokens_B1).sum(1)
    return loss_B.sum() / (tokens_B > 0).sum().clamp_min(1)


def z_loss(logits_BTE: Tensor, keep_BT: Tensor | None = None) -> Tensor:
    """The mean over real tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
    square_BT = torch.logsumexp(logits_BTE, dim=-1).square()
    if keep_BT is None:
        return square_BT.mean()
    return (square_BT * keep_BT).sum() / keep_BT.sum().clamp_min(1)


def stepped_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The routing bias after a step: up by `rate` where the load lies below the mean, down where above,
    still where it is the mean (arXiv 2408.15664, algorithm 1)."""
    return bias_E + rate * torch.sign(load_E.mean() - load_E)


def max_violation(load_E: Tensor) -> Tensor:
    """How far the fullest expert lies above the mean load, as a share of it: 0 where even (MaxVio of
    arXiv 2408.15664)."""
    return load_E.max() / load_E.mean().clamp_min(1e-20) - 1.0


def over_ranks(load_E: Tensor) -> Tensor:
    """The loads summed over all processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        load_E = load_E.clone()
        torch.distributed.all_reduce(load_E)
    return load_E


def router_logits(x_BTD: Tensor, weight_ED: Tensor) -> Tensor:
    """The router's logits in fp32 (fp64 stays), also under autocast: ties and near ties are decided
    by bits that bf16 does not have."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    with torch.autocast(x_BTD.device.type, enabled=False):
        return F.linear(x_BTD.to(wide), weight_ED.to(wide))
