"""block.attention against a twin that works head by head and pair by pair with complex numbers, and Llama."""

import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from luthier.block.attention import Attention
from luthier.errors import LuthierError
from luthier.kit.parts import Pass
from luthier.kit.rotary import angles, rotate
from luthier.model import LuthierConfig, Spec
from luthier.testing.decoders import refill

HEADS, WIDTH = 4, 6
SIZES = {"vocab_size": 11, "hidden_size": 12, "num_attention_heads": HEADS, "head_dim": WIDTH, "intermediate_size": 8}


def built(dtype=torch.float64, **fields):
    config = LuthierConfig(**SIZES, num_key_value_heads=2, rope_theta=50.0)
    return refill(Attention(**fields).build(Spec(config, "mixer", 0))).to(dtype)


def states(batch=2, length=7, dtype=torch.float64):
    return torch.randn(batch, length, SIZES["hidden_size"], generator=torch.Generator().manual_seed(5)).to(dtype)


def turned(vector, position, theta):
    """Entry i and entry i + half are one complex number, which turns by position / theta^(2i/width)."""
    half = len(vector) // 2
    out = [0.0] * len(vector)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(vector))
        z = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = z.real, z.imag
    return out


def slow(module, x_TD, kv_heads, theta, positions, visible):
    """One sequence: softmax over the visible positions, query head h reads key-value head h // group."""

    def heads(proj, n):
        return proj(x_TD).view(len(x_TD), n, WIDTH).tolist()

    q, k, v = heads(module.q_proj, HEADS), heads(module.k_proj, kv_heads), heads(module.v_proj, kv_heads)
    rows = []
    for t in range(len(x_TD)):
        row = []
        for h in range(HEADS):
            g = h // (HEADS // kv_heads)
            query = turned(q[t][h], positions[t], theta)
            seen = [s for s in range(len(x_TD)) if visible(t, s)]
            scores = [
                sum(a * b for a, b in zip(query, turned(k[s][g], positions[s], theta), strict=True)) / math.sqrt(WIDTH)
                for s in seen
            ]
            top = max(scores, default=0.0)
            weights = [math.exp(score - top) for score in scores]
            for i in range(WIDTH):
                total = sum(w * v[s][g][i] for w, s in zip(weights, seen, strict=True))
                row.append(total / sum(weights) if weights else 0.0)
        rows.append(row)
    return module.o_proj(torch.tensor(rows, dtype=x_TD.dtype))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("theta", [None, 7.0])
def test_twin(kv_heads, theta):
    module = built(kv_heads=kv_heads, theta=theta)
    x = states()
    y, aux = module(x, Pass(positions_BT=torch.arange(7)[None]))
    want = [slow(module, row, kv_heads, theta or 50.0, range(7), lambda t, s: s <= t) for row in x]
    assert aux == {}
    assert torch.allclose(y, torch.stack(want), atol=1e-6)  # angles are fp32


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_passes_are_causal(length):
    module, x = built(), states(length=length)
    y, _ = module(x, Pass(positions_BT=torch.arange(length)[None]))
    want = [slow(module, row, 2, 50.0, range(length), lambda t, s: s <= t) for row in x]
    assert torch.allclose(y, torch.stack(want), atol=1e-6)


def test_sizes_come_from_the_model():
    module = built()
    assert module.q_proj.weight.shape == (HEADS * WIDTH, 12) and module.k_proj.weight.shape == (2 * WIDTH, 12)
    assert module.v_proj.weight.shape == (2 * WIDTH, 12) and module.o_proj.weight.shape == (12, HEADS * WIDTH)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_masks_and_positions(kv_heads):
    """Two pads on the left of the second row; positions start at its first real token."""
    module = built(kv_heads=kv_heads)
    x = states()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]])
    pads = [0, 2]
    seen = torch.stack([torch.tril(torch.ones(7, 7, dtype=torch.bool)) & (torch.arange(7) >= n) for n in pads])
    y, _ = module(x, Pass(positions_BT=positions, mask=seen[:, None]))
    for row, n in enumerate(pads):
        want = slow(module, x[row], kv_heads, 50.0, positions[row].tolist(), lambda t, s, n=n: n <= s <= t)
        assert torch.allclose(y[row], want, atol=1e-6)


@pytest.mark.parametrize("cuts", [(3, 4), (1, 1, 1, 1, 1, 1, 1), (6, 1)])
def test_cache(cuts):
    """In pieces: keys are turned once, at their own positions, and kept."""
    module = built(kv_heads=2)
    x = states()
    whole, _ = module(x, Pass(positions_BT=torch.arange(7)[None]))
    cache, done, parts = DynamicCache(), 0, []
    for n in cuts:
        seen = torch.arange(done + n)[None] <= torch.arange(done, done + n)[:, None]
        at = Pass(
            positions_BT=torch.arange(done, done + n)[None], mask=seen[None, None] if n > 1 else None, cache=cache
        )
        parts.append(module(x[:, done : done + n], at)[0])
        done += n
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)
    assert cache.get_seq_length() == 7 and cache.layers[0].keys.shape == (2, 2, 7, WIDTH)


@pytest.mark.parametrize("masked", [False, True])
def test_llama(masked):
    config = LlamaConfig(
        **SIZES, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        attn_implementation="eager",
    )  # fmt: skip
    x = states(dtype=torch.float32)
    peer = refill(LlamaAttention(config, 0))
    rotary = LlamaRotaryEmbedding(config)(x, torch.arange(7)[None])
    seen = torch.tril(torch.ones(7, 7, dtype=torch.bool)) & (torch.arange(7) != 3)
    seen = seen | torch.eye(7, dtype=torch.bool) if masked else torch.tril(torch.ones(7, 7, dtype=torch.bool))
    want, _ = peer(x, rotary, torch.zeros(7, 7).masked_fill(~seen, float("-inf"))[None, None])
    at = Pass(positions_BT=torch.arange(7)[None], mask=seen[None, None] if masked else None)
    assert torch.allclose(built(torch.float32)(x, at)[0], want, atol=2e-6)


def test_rotation_is_relative_and_keeps_length():
    x = torch.randn(1, 1, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    here, far = torch.arange(5)[None], torch.arange(5)[None] + 100
    one, two = (rotate(x, *(a.double() for a in angles(p, WIDTH, 10000.0))) for p in (here, far))
    assert torch.allclose(one.norm(dim=-1), x.norm(dim=-1))
    assert torch.allclose(one @ one.mT, two @ two.mT, atol=1e-4)
    assert (one - two).abs().max() > 0.1


def test_angles_are_fp32_in_a_bf16_model():
    """Angles of late positions need more bits than bf16 has."""
    cos, _ = angles(torch.tensor([[4001]]), 2, 10000.0)
    assert cos.dtype == torch.float32
    assert cos[0, 0, 0].item() == pytest.approx(math.cos(4001), abs=1e-4)


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(LuthierError, match="3 key-value heads do not divide 4"):
        built(kv_heads=3)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_both_ways(length, kv_heads):
    module, x = built(kv_heads=kv_heads, causal=False), states(length=length)
    y, _ = module(x, Pass(positions_BT=torch.arange(length)[None]))
    want = [slow(module, row, kv_heads, 50.0, range(length), lambda t, s: True) for row in x]
    assert torch.allclose(y, torch.stack(want), atol=1e-6)


def test_both_ways_heeds_its_own_mask():
    """`both` hides the second row's two pads; the causal mask of the same pass is for other layers."""
    module, x = built(causal=False), states()
    seen = torch.arange(7) >= torch.tensor([[0], [2]])
    causal = torch.tril(torch.ones(7, 7, dtype=torch.bool))[None, None]
    y, _ = module(x, Pass(positions_BT=torch.arange(7)[None], mask=causal, both=seen[:, None, None]))
    for row, n in enumerate((0, 2)):
        want = slow(module, x[row], 2, 50.0, range(7), lambda t, s, n=n: s >= n)
        assert torch.allclose(y[row], want, atol=1e-6)
