"""Running tokens through their chosen experts: sort by expert, one matrix product an expert, add back.

One autograd function with a backward written out, since what autograd makes of a loop over experts is
slow: it keeps copies of the gathered rows, and fills a gradient of all experts for each one. Here a
stretch of rows, of one expert or of several small ones, is gathered, worked on in preallocated buffers and
added back while it is in cache; kept for the backward are the tokens, the pre-activations and the order;
each expert's gradient is written once, in place.
Nothing is padded or dropped, so the cost is that of the tokens there are. The routing weight is
multiplied into the activation, where a row is narrower. `moe_loop` is the slow, obvious twin.
Under autocast the products run in autocast's dtype. No second derivatives.
Shapes: N tokens, K experts per token, E experts, D width, F inner width, n rows of a stretch,
m rows of one expert in it, R = N*K rows, G = 2F: gate and up side by side.
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
"""rows worked on at once: few enough to stay in cache, enough to fill a matrix product"""


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
        inner, room = down_EDF.shape[2], min(ROWS, sum(counts))
        token_R = order_R // weight_NK.shape[1]
        weight_R1 = weight_NK.flatten().index_select(0, order_R).to(x_ND.dtype)[:, None]
        h_RG = x_ND.new_empty(sum(counts), 2 * inner)
        y_ND = torch.zeros_like(x_ND)
        x_buf, a_buf = x_ND.new_empty(room, x_ND.shape[1]), x_ND.new_empty(room, inner)
        for rows, parts in _stretches(counts):
            token_n, h_nG = token_R[rows], h_RG[rows]
            x_nD = torch.index_select(x_ND, 0, token_n, out=x_buf[: len(token_n)])
            for e, part, _ in parts:
                for h_mF, matrix_FD in _halves(h_nG[part], wide, e):
                    torch.mm(x_nD[part], matrix_FD.T, out=h_mF)
            a_nF = _act(h_nG[:, :inner], activation, out=a_buf[: len(token_n)])
            a_nF.mul_(h_nG[:, inner:]).mul_(weight_R1[rows])
            for e, part, _ in parts:  # into the rows of x, which are done with
                torch.mm(a_nF[part], down_EDF[e].T, out=x_nD[part])
            y_ND.index_add_(0, token_n, x_nD)
        ctx.save_for_backward(x_ND, weight_NK, order_R, h_RG, down_EDF, *wide)
        ctx.counts, ctx.activation = counts, activation
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_ND, weight_NK, order_R, h_RG, down_EDF, *wide = ctx.saved_tensors
        counts, activation = ctx.counts, ctx.activation
        inner, room = down_EDF.shape[2], min(ROWS, sum(counts))
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
        row_buf, dh_buf = x_ND.new_empty(room, x_ND.shape[1]), x_ND.new_empty(room, 2 * inner)
        da_buf, a_buf, spare = x_ND.new_empty(3, room, inner)
        for rows, parts in _stretches(counts):
            token_n, h_nG, weight_n1 = token_R[rows], h_RG[rows], weight_R1[rows]
            n = len(token_n)
            dy_nD = torch.index_select(dy_ND, 0, token_n, out=row_buf[:n])
            da_nF, a_nF, dh_nG = da_buf[:n], a_buf[:n], dh_buf[:n]
            for e, part, _ in parts:
                torch.mm(dy_nD[part], down_EDF[e], out=da_nF[part])
            _gated(h_nG, da_nF, weight_n1, activation, a_nF, dh_nG, spare[:n])
            if want_weight:
                dweight_R[order_R[rows]] = torch.mul(da_nF, a_nF, out=spare[:n]).sum(1, dtype=dweight_R.dtype)
            if ddown_EDF is not None:
                a_nF.mul_(weight_n1)
                for e, part, first in parts:
                    _add(ddown_EDF[e], dy_nD[part].T, a_nF[part], first)
            if want_wide:
                x_nD = torch.index_select(x_ND, 0, token_n, out=row_buf[:n])
                for e, part, first in parts:
                    for dh_mF, grad_FD in _halves(dh_nG[part], dwide, e):
                        _add(grad_FD, dh_mF.T, x_nD[part], first)
            if dx_ND is not None:
                dx_nD = row_buf[:n]
                for e, part, _ in parts:
                    for i, (dh_mF, matrix_FD) in enumerate(_halves(dh_nG[part], wide, e)):
                        _add(dx_nD[part], dh_mF, matrix_FD, first=i == 0)
                dx_ND.index_add_(0, token_n, dx_nD)
        dweight_NK = dweight_R.view_as(weight_NK) if want_weight else None
        return dx_ND, dweight_NK, None, None, None, ddown_EDF, *(dwide or [None] * len(wide))


def _act(gate_nF: Tensor, activation: Activation, out: Tensor) -> Tensor:
    return torch.ops.aten.silu.out(gate_nF, out=out) if activation is F.silu else out.copy_(activation(gate_nF))


def _gated(
    h_nG: Tensor, da_nF: Tensor, weight_n1: Tensor, activation: Activation, a_nF: Tensor, dh_nG: Tensor, spare: Tensor
) -> None:
    """Write a = activation(gate) * up, and dh, the gradient of both pre-activations, given da, the gradient
    of weight * a; spare: room for (n, F)."""
    inner = da_nF.shape[1]
    gate_nF, up_nF = h_nG[:, :inner], h_nG[:, inner:]
    dact_nF = torch.mul(da_nF, weight_n1, out=spare)
    if activation is F.silu:
        _act(gate_nF, activation, out=a_nF)
        torch.mul(dact_nF, a_nF, out=dh_nG[:, inner:])
        torch.ops.aten.silu_backward.grad_input(dact_nF.mul_(up_nF), gate_nF, grad_input=dh_nG[:, :inner])
    else:
        with torch.enable_grad():
            leaf_nF = gate_nF.detach().requires_grad_()
            act_nF = activation(leaf_nF)
        a_nF.copy_(act_nF.detach())
        torch.mul(dact_nF, a_nF, out=dh_nG[:, inner:])
        (dh_nG[:, :inner],) = torch.autograd.grad(act_nF, leaf_nF, dact_nF.mul_(up_nF))
    a_nF.mul_(up_nF)


def _add(to: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """to += a b in place; the first time `to` holds nothing yet."""
    torch.addmm(to, a, b, beta=0 if first else 1, out=to)


def _halves(h_mG: Tensor, wide: Any, e: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The columns of h that belong to each of the matrices, and the matrix of expert e."""
    if len(wide) == 1:
        yield h_mG, wide[0][e]
        return
    inner = h_mG.shape[1] // 2
    yield h_mG[:, :inner], wide[0][e]
    yield h_mG[:, inner:], wide[1][e]


def _stretches(counts: list[int]) -> Iterator[tuple[slice, list[tuple[int, slice, bool]]]]:
    """At most ROWS rows of the sorted order at a time: where they lie, and for each expert that has some of
    them its number, where within the stretch they lie, and whether they are its first."""
    start = size = 0
    parts: list[tuple[int, slice, bool]] = []
    for e, count in enumerate(counts):
        pieces = -(-count // ROWS)
        for i in range(pieces):  # of even size: a short last piece would cost a product for little
            piece = count * (i + 1) // pieces - count * i // pieces
            if size + piece > ROWS:
                yield slice(start, start + size), parts
                start, size, parts = start + size, 0, []
            parts.append((e, slice(size, size + piece), i == 0))
            size += piece
    if size:
        yield slice(start, start + size), parts
