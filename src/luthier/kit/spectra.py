"""Singular values and vectors of whole matrices, from the Gram matrix of the short side, in doubles.

K = A Aᵀ has the squares of A's singular values. Doubles bear the squaring: a vector of singular value σ comes out
with an error of some 1e-16 (σ_1/σ)², below that of a singular value decomposition in fp32 for every σ above NOISE.
The work is one eigendecomposition of the short side, whatever the long one.

S, L: short and long side.  Q: directions kept.  R: those of them that are independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]
"""U (S, Q), sigma (Q,), V (L, Q): singular values with their vectors on the short and on the long side."""
NOISE = 1e-5
"""Of the largest singular value: what is smaller is rounding of fp32, and its directions are arbitrary."""


def wide(W_MN: Tensor) -> Tensor:
    """A (S, L): the matrix in doubles, its short side first; on the CPU where the device has no doubles."""
    A_MN = W_MN.cpu().double() if W_MN.device.type == "mps" else W_MN.double()
    return A_MN if A_MN.shape[0] <= A_MN.shape[1] else A_MN.T


def narrow(A_SL: Tensor, like_MN: Tensor) -> Tensor:
    """Back from `wide`: the orientation, dtype and device of `like_MN`."""
    return (A_SL if A_SL.shape == like_MN.shape else A_SL.T).to(like_MN)


def spectrum(K_SS: Tensor) -> tuple[Tensor, Tensor]:
    """sigma (Q,), strongest first, and V (S, Q): A's singular values above NOISE and their vectors, from A Aᵀ."""
    square_S, V_SS = torch.linalg.eigh(K_SS)
    sigma_S = square_S.clamp(min=0).sqrt().flip(0)
    count = int((sigma_S > NOISE * sigma_S[:1]).sum())
    return sigma_S[:count], V_SS.flip(1)[:, :count]


def strongest(A_SL: Tensor, count: int) -> Triple:
    """The `count` strongest singular values of A, or fewer if the rest is rounding."""
    sigma_Q, U_SQ = spectrum(A_SL @ A_SL.T)
    sigma_Q, U_SQ = sigma_Q[:count], U_SQ[:, :count]
    return U_SQ, sigma_Q, A_SL.T @ (U_SQ / sigma_Q)


def beside(parts: Sequence[Triple]) -> Triple:
    """Those of several matrices set side by side, without what is rounding next to the strongest of all."""
    U_SQ, sigma_Q, V_LQ = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    heard_Q = sigma_Q > NOISE * max(sigma_Q.tolist(), default=0.0)
    return U_SQ[:, heard_Q], sigma_Q[heard_Q], V_LQ[:, heard_Q]


def orthonormal(X_SQ: Tensor) -> Tensor:
    """The orthonormal columns nearest to those of X: X (XᵀX)^(-1/2).

    Where columns depend on each other there are many such; of these it is the part that all share: they span
    what X spans, and nothing is made up.
    """
    sigma_R, V_QR = spectrum(X_SQ.T @ X_SQ)
    return X_SQ @ ((V_QR / sigma_R) @ V_QR.T)
