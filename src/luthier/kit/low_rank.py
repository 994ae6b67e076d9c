"""The best low-rank approximation of a matrix, from the Gram matrix of its short side.

M, N: rows and columns of W.  S = min(M, N): the short side.  Q: vectors kept.  R: rank.
By Eckart and Young the best rank-R approximation projects W onto the R leading eigenvectors of
W Wᵀ (or Wᵀ W, whichever is smaller). Squaring the singular values loses the small ones only, and
those are thrown away.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leading(W_MN: Tensor, count: int) -> Tensor:
    """V (S, Q): the `count` leading singular vectors of the short side, strongest first; exact, fp32."""
    A_SL = _short_first(W_MN)
    _, V_SS = torch.linalg.eigh(A_SL @ A_SL.T)
    return V_SS[:, -min(count, V_SS.shape[1]) :].flip(1).contiguous()


def refine(W_MN: Tensor, V_SQ: Tensor, steps: int = 8) -> Tensor:
    """V (S, Q) of a matrix that has moved a little: `steps` of subspace iteration from the old V.

    V is made orthonormal after every second step: between two, fp32 bears (σ_1/σ_Q)⁴. The last step ends
    in a Rayleigh-Ritz rotation, so the first columns are again the strongest. Keep more vectors than you
    need, twice as many or 16 more: the error of the first R falls with (σ_Q/σ_R)² a step.
    """
    A_SL = _short_first(W_MN)
    for left in reversed(range(steps)):
        V_SQ = A_SL @ (A_SL.T @ V_SQ)
        if left % 2 == 0:
            V_SQ, _ = torch.linalg.qr(V_SQ)
    B_LQ = A_SL.T @ V_SQ
    _, U_QQ = torch.linalg.eigh(B_LQ.T @ B_LQ)
    return V_SQ @ U_QQ.flip(1)


def project(W_MN: Tensor, V_SR: Tensor) -> Tensor:
    """W (M, N) projected onto the vectors V of its short side; fp32. With `leading`, the best rank-R one."""
    W_MN = W_MN.float()
    if W_MN.shape[0] <= W_MN.shape[1]:
        return V_SR @ (V_SR.T @ W_MN)
    return (W_MN @ V_SR) @ V_SR.T


def _short_first(W_MN: Tensor) -> Tensor:
    W_MN = W_MN.float()
    return W_MN if W_MN.shape[0] <= W_MN.shape[1] else W_MN.T
