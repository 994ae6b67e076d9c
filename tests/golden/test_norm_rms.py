"""norm.rms against hand calculation, Llama's norm and torch's."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from luthier.model import init_weights
from luthier.norm.rms import Rms


def built(width=4, eps=1e-6, **fields):
    return Rms(**fields).build(SimpleNamespace(config=SimpleNamespace(hidden_size=width, rms_norm_eps=eps)))


def test_gains_start_at_one():
    norm = built()
    norm.weight.data.fill_(7.0)
    init_weights(norm, seed=0)
    assert norm.weight.tolist() == [1.0] * 4


def test_by_hand():
    """Mean of squares (9 + 16 + 0 + 0) / 4 = 6.25, plus 2.75 under the root: 3. Gains 1, 2, 3, 4."""
    norm = built(eps=2.75)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    y, aux = norm(torch.tensor([[[3.0, -4.0, 0.0, 0.0]]]))
    assert aux == {}
    assert torch.allclose(y, torch.tensor([[[1.0, -8 / 3, 0.0, 0.0]]]), atol=1e-6)


def test_centred_by_hand():
    """Less the mean -0.25 the entries are 3.25, -3.75, 0.25, 0.25; their mean square is 6.1875."""
    y, _ = built(center=True, eps=1e-12)(torch.tensor([[[3.0, -4.0, 0.0, 0.0]]]))
    assert torch.allclose(y, torch.tensor([[[3.25, -3.75, 0.25, 0.25]]]) / math.sqrt(6.1875), atol=1e-6)


def test_own_eps_wins_over_the_models():
    x = torch.full((1, 1, 4), 1e-3)
    assert built(eps=1e-6)(x)[0][0, 0, 0].item() == pytest.approx(1e-3 / math.sqrt(2e-6), rel=1e-5)
    own = Rms(eps=3e-6).build(SimpleNamespace(config=SimpleNamespace(hidden_size=4, rms_norm_eps=1e-6)))
    assert own(x)[0][0, 0, 0].item() == pytest.approx(1e-3 / math.sqrt(4e-6), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_are_llamas(dtype):
    """Statistics in fp32, cast back, then the gain: in bf16 any other order shows in the last bit."""
    norm, llama = built(48, eps=1e-5), LlamaRMSNorm(48, eps=1e-5)
    gain = torch.randn(48, generator=torch.Generator().manual_seed(1))
    norm.weight.data, llama.weight.data = gain.to(dtype), gain.to(dtype)
    x = (5 * torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(2))).to(dtype)
    assert torch.equal(norm(x)[0], llama(x))
    assert norm(x)[0].dtype == dtype


def test_half_precision_squares_do_not_overflow():
    y, _ = built(8)(torch.full((1, 1, 8), 6e4, dtype=torch.float16))
    assert torch.allclose(y.float(), torch.ones(1, 1, 8), atol=1e-3)


def test_centred_is_layer_norm_and_plain_is_not():
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3)) + 1
    other = nn.LayerNorm(16, eps=1e-6, bias=False)(x)
    assert torch.allclose(built(16, center=True)(x)[0], other, atol=1e-6)
    assert (built(16)(x)[0] - other).abs().max() > 0.1


def test_double_precision_stays():
    x = torch.randn(1, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert (built(16).double()(x)[0] - want).abs().max() < 1e-14
