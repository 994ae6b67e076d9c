"""Running tokens through their chosen experts: sort by expert, one matrix product an expert, add back.

One autograd function with a backward written out, since what autograd makes of a loop over experts is
slow: it keeps copies of the gathered rows, and fills a gradient of all experts for each one. Here the
rows of one expert are gathered, worked on and added back while they are in cache; kept for the backward
are the tokens, the pre-activations and the order; each expert's gradient is written once, in place.
Nothing is padded or dropped, so the cost is that of the tokens there are. The routing weight is
multiplied into the activation, where a row is narrower. `moe_loop` is the slow, obvious twin.
Under autocast the products run in autocast's dtype. No second derivatives.
Shapes: N tokens, K experts per token, E experts, D width, F inner width, n rows of one expert,
R = N*K rows, G = 2F: gate and up side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Callable[[Tensor], Tensor]

ROWS = 1024
"""rows of an expert worked on at once: few enough to stay in cache, enough to fill a matrix product"""


def moe_apply(
    x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, wide: tuple[Tensor, ...], down_EDF: Tensor,
    activation: Activation = F.silu,
) -> Tensor:  # fmt: skip
    """sum_k weight[n, k] * down_e(activation(gate_e x) * up_e x), e = index[n, k]: (N, D) in x's dtype.

    wide: (gate, up), (E, F, D) each, or both in one tensor (E, 2F, D), gate first.  An index of E or
    more means no expert.  The counts go to the host once, to split the rows.
    """
    kept = x_ND.dtype
    if torch.is_autocast_enabled(x_ND.device.type):
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, down_EDF, wide = x_ND.to(dtype), down_EDF.to(dtype), tuple(w.to(dtype) for w in wide)
    expert_R, order_R = index_NK.flatten().sort(stable=True)
    counts = torch.bincount(expert_R, minlength=down_EDF.shape[0])[: down_EDF.shape[0]]
    with torch.autocast(x_ND.device.type, enabled=False):
        y_ND: Any = _Experts.apply(x_ND, weight_NK, order_R, counts.tolist(), activation, down_EDF, *wide)
    return y_ND.to(kept)


def moe_loop(
    x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, wide: tuple[Tensor, ...], down_EDF: Tensor,
    activation: Activation = F.silu,
) -> Tensor:  # fmt: skip
    """The same by a plain loop over experts under autograd: what `moe_apply` is held to."""
    gate_EFD, up_EFD = wide if len(wide) == 2 else wide[0].chunk(2, dim=1)
    y_ND = torch.zeros_like(x_ND)
    for e in range(down_EDF.shape[0]):
        token_n, slot_n = (index_NK == e).nonzero(as_tuple=True)
        x_nD = x_ND[token_n]
        made_nD = F.linear(activation(F.linear(x_nD, gate_EFD[e])) * F.linear(x_nD, up_EFD[e]), down_EDF[e])
        y_ND = y_ND.index_add(0, token_n, made_nD * weight_NK[token_n, slot_n, None].to(made_nD.dtype))
    return y_ND


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_NK: Tensor, order_R: Tensor, counts: list[int], activation: Activation,
        down_EDF: Tensor, *wide: Tensor,
    ) -> Tensor:  # fmt: skip
        inner = down_EDF.shape[2]
        token_R = order_R // weight_NK.shape[1]
        weight_R1 = weight_NK.flatten().index_select(0, order_R).to(x_ND.dtype)[:, None]
        h_RG = x_ND.new_empty(sum(counts), 2 * inner)
        y_ND = torch.zeros_like(x_ND)
        x_buf, y_buf = _buffer(x_ND, counts), _buffer(x_ND, counts)
        for e, rows, _ in _stretches(counts):
            token_n, h_nG = token_R[rows], h_RG[rows]
            x_nD = torch.index_select(x_ND, 0, token_n, out=x_buf[: len(token_n)])
            for part_nF, matrix_FD in _halves(h_nG, wide, e):
                torch.mm(x_nD, matrix_FD.T, out=part_nF)
            a_nF = activation(h_nG[:, :inner]).mul_(h_nG[:, inner:]).mul_(weight_R1[rows])
            y_nD = torch.mm(a_nF, down_EDF[e].T, out=y_buf[: len(token_n)])
            y_ND.index_add_(0, token_n, y_nD)
        ctx.save_for_backward(x_ND, weight_NK, order_R, h_RG, down_EDF, *wide)
        ctx.counts, ctx.activation = counts, activation
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_ND, weight_NK, order_R, h_RG, down_EDF, *wide = ctx.saved_tensors
        counts = ctx.counts
        want_x, want_weight, want_down = (ctx.needs_input_grad[i] for i in (0, 1, 5))
        want_wide = any(ctx.needs_input_grad[6:])
        token_R = order_R // weight_NK.shape[1]
        weight_R1 = weight_NK.flatten().index_select(0, order_R).to(x_ND.dtype)[:, None]
        dx_ND = torch.zeros_like(x_ND) if want_x else None
        dweight_R = weight_NK.new_zeros(weight_NK.numel())
        ddown_EDF = torch.empty_like(down_EDF) if want_down else None
        dwide = [torch.empty_like(w) for w in wide] if want_wide else []
        for e in (e for e, count in enumerate(counts) if not count):
            for grad in (*([] if ddown_EDF is None else [ddown_EDF]), *dwide):
                grad[e].zero_()
        dy_buf, x_buf, dx_buf = (_buffer(x_ND, counts) for _ in range(3))
        for e, rows, first in _stretches(counts):
            token_n, h_nG, weight_n1 = token_R[rows], h_RG[rows], weight_R1[rows]
            count = len(token_n)
            dy_nD = torch.index_select(dy_ND, 0, token_n, out=dy_buf[:count])
            da_nF = dy_nD @ down_EDF[e]
            a_nF, dh_nG = _gated(h_nG, da_nF, weight_n1, ctx.activation)
            if want_weight:
                dweight_R[order_R[rows]] = (da_nF * a_nF).sum(1, dtype=dweight_R.dtype)
            if ddown_EDF is not None:
                _add(ddown_EDF[e], dy_nD.T, a_nF.mul_(weight_n1), first)
            if want_wide:
                x_nD = torch.index_select(x_ND, 0, token_n, out=x_buf[:count])
                for part_nF, grad_FD in _halves(dh_nG, dwide, e):
                    _add(grad_FD, part_nF.T, x_nD, first)
            if dx_ND is not None:
                dx_nD = dx_buf[:count]
                for i, (part_nF, matrix_FD) in enumerate(_halves(dh_nG, wide, e)):
                    _add(dx_nD, part_nF, matrix_FD, first=i == 0)
                dx_ND.index_add_(0, token_n, dx_nD)
        dweight_NK = dweight_R.view_as(weight_NK) if want_weight else None
        return dx_ND, dweight_NK, None, None, None, ddown_EDF, *(dwide or [None] * len(wide))


def _gated(h_nG: Tensor, da_nF: Tensor, weight_n1: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """activation(gate) * up, and the gradient of both pre-activations, given the gradient of
    weight * activation(gate) * up."""
    inner = da_nF.shape[1]
    gate_nF, up_nF = h_nG[:, :inner], h_nG[:, inner:]
    dh_nG = torch.empty_like(h_nG)
    dact_nF = da_nF * weight_n1
    if activation is F.silu:
        act_nF = F.silu(gate_nF)
        torch.mul(dact_nF, act_nF, out=dh_nG[:, inner:])
        torch.ops.aten.silu_backward.grad_input(dact_nF.mul_(up_nF), gate_nF, grad_input=dh_nG[:, :inner])
    else:
        with torch.enable_grad():
            leaf_nF = gate_nF.detach().requires_grad_()
            act_nF = activation(leaf_nF)
        torch.mul(dact_nF, act_nF.detach(), out=dh_nG[:, inner:])
        (dh_nG[:, :inner],) = torch.autograd.grad(act_nF, leaf_nF, dact_nF.mul_(up_nF))
        act_nF = act_nF.detach()
    return act_nF.mul(up_nF), dh_nG


def _add(to: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """to += a b in place; the first time `to` holds nothing yet."""
    torch.addmm(to, a, b, beta=0 if first else 1, out=to)


def _halves(h_nG: Tensor, wide: Any, e: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The columns of h that belong to each of the matrices, and the matrix of expert e."""
    start = 0
    for tensor in wide:
        matrix_FD = tensor[e]
        yield h_nG[:, start : start + matrix_FD.shape[0]], matrix_FD
        start += matrix_FD.shape[0]


def _stretches(counts: list[int]) -> Iterator[tuple[int, slice, bool]]:
    """The experts that have rows, where these lie in the sorted order, at most ROWS at a time, and whether
    they are the expert's first."""
    start = 0
    for e, count in enumerate(counts):
        for at in range(0, count, ROWS):
            yield e, slice(start + at, start + min(at + ROWS, count)), at == 0
        start += count


def _buffer(like_ND: Tensor, counts: list[int]) -> Tensor:
    """Room for one stretch of rows."""
    return like_ND.new_empty(min(ROWS, max(counts, default=0)), like_ND.shape[1])
