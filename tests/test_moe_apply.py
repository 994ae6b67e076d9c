"""The experts' autograd function against its slow twin."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from luthier.kit.moe_apply import moe_apply, moe_loop

ACTS = {"silu": F.silu, "gelu": F.gelu, "relu squared": lambda x: F.relu(x).square()}


def bank(N=13, D=5, F_=7, E=4, K=2, dtype=torch.float64, seed=0):
    """Tokens, choices (expert 2 gets none), weights and matrices."""
    g = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype)
    index_NK = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(N)])
    index_NK[index_NK == 2] = E - 1
    weight_NK = torch.rand(N, K, generator=g, dtype=torch.float64).to(dtype)
    mats = [torch.randn(E, *s, generator=g, dtype=torch.float64).to(dtype) for s in ((F_, D), (F_, D), (D, F_))]
    return x_ND, index_NK, weight_NK, mats


def grads(apply, x_ND, index_NK, weight_NK, wide, down_EDF, activation=F.silu):
    leaves = [t.clone().requires_grad_() for t in (x_ND, weight_NK, *wide, down_EDF)]
    y_ND = apply(leaves[0], index_NK, leaves[1], tuple(leaves[2:-1]), leaves[-1], activation)
    (y_ND * torch.linspace(-1, 1, y_ND.numel(), dtype=y_ND.dtype).view_as(y_ND)).sum().backward()
    return [y_ND.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("fused", [False, True])
def test_equals_the_loop_in_float64(name, fused):
    x, index, weight, (gate, up, down) = bank()
    wide = (torch.cat((gate, up), 1),) if fused else (gate, up)
    ours, twin = (grads(f, x, index, weight, wide, down, ACTS[name]) for f in (moe_apply, moe_loop))
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [{"N": 1}, {"E": 3, "K": 1}, {"N": 40, "D": 3, "F_": 1}, {"E": 9, "K": 3, "N": 2}])
def test_odd_sizes(sizes):
    x, index, weight, (gate, up, down) = bank(**sizes)
    for a, b in zip(*(grads(f, x, index, weight, (gate, up), down) for f in (moe_apply, moe_loop)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("fused", [False, True])
def test_gradcheck(name, fused):
    x, index, weight, (gate, up, down) = bank(N=5, D=3, F_=2, E=4)
    assert not (index == 2).any(), "an expert without tokens belongs to this test"
    wide = (torch.cat((gate, up), 1),) if fused else (gate, up)
    leaves = [t.clone().requires_grad_() for t in (x, weight, down, *wide)]
    assert gradcheck(
        lambda x, w, down, *wide: moe_apply(x, index, w, wide, down, ACTS[name]), leaves, eps=1e-6, atol=1e-6
    )


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    x, index, weight, (gate, up, down) = bank()
    _, _, _, dgate, dup, ddown = grads(moe_apply, x, index, weight, (gate, up), down)
    for grad in (dgate, dup, ddown):
        assert not grad[2].any() and grad[[0, 1, 3]].flatten(1).any(1).all()


def test_no_tokens_at_all():
    x, index, weight, (gate, up, down) = bank()
    y, dx, dw, dgate, _, ddown = grads(moe_apply, x[:0], index[:0], weight[:0], (gate, up), down)
    assert y.shape == (0, 5) and not dgate.any() and not ddown.any() and dx.shape == (0, 5) and dw.shape == (0, 2)


def test_an_index_past_the_experts_means_none():
    """Expert parallelism marks the slots of other ranks' experts that way."""
    x, index, weight, (gate, up, down) = bank()
    index = index.clone()
    index[::3, 0] = 4
    for a, b in zip(*(grads(f, x, index, weight, (gate, up), down) for f in (moe_apply, moe_loop)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", ["x", "weight", "wide", "down"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_stays(frozen):
    x, index, weight, (gate, up, down) = bank()
    _, *all_grads = grads(moe_apply, x, index, weight, (gate, up), down)
    full = dict(zip(("x", "weight", "gate", "up", "down"), all_grads, strict=True))
    still = {"wide": ("gate", "up")}.get(frozen, (frozen,))
    named = {"x": x, "weight": weight, "gate": gate, "up": up, "down": down}
    leaves = {n: t.clone().requires_grad_(n not in still) for n, t in named.items()}
    y = moe_apply(leaves["x"], index, leaves["weight"], (leaves["gate"], leaves["up"]), leaves["down"])
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    for name, leaf in leaves.items():
        if name in still:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, full[name], rtol=0, atol=0)


def test_under_autocast_the_products_are_bf16_and_the_result_keeps_its_dtype():
    x, index, weight, (gate, up, down) = bank(dtype=torch.float32)
    wide = [w.clone().requires_grad_() for w in (gate, up)]
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_apply(x, index, weight, tuple(wide), down)
    low = [t.bfloat16() for t in (x, gate, up, down)]
    expected = moe_apply(low[0], index, weight, (low[1], low[2]), low[3])
    assert y.dtype == torch.float32 and torch.equal(y, expected.float())
    y.sum().backward()
    assert wide[0].grad is not None and wide[0].grad.dtype == torch.float32


def test_bf16_is_near_fp32():
    x, index, weight, (gate, up, down) = bank(N=64, D=32, F_=48, dtype=torch.float32)
    exact = grads(moe_apply, x, index, weight, (gate, up), down)
    low = grads(moe_apply, x.bfloat16(), index, weight, (gate.bfloat16(), up.bfloat16()), down.bfloat16())
    for a, b in zip(exact, low, strict=True):
        assert (a - b.float()).norm() / a.norm() < 0.02


def test_recomputed_under_checkpointing():
    x, index, weight, (gate, up, down) = bank()
    leaf = x.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(
        lambda x: moe_apply(x, index, weight, (gate, up), down), leaf, use_reentrant=False
    )
    y.sum().backward()
    direct = x.clone().requires_grad_()
    moe_apply(direct, index, weight, (gate, up), down).sum().backward()
    assert torch.equal(leaf.grad, direct.grad)
