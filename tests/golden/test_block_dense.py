"""block.dense against the formulas of arXiv 2002.05202 written out, in fp64."""

import math

import pytest
import torch

from luthier.block.dense import Dense
from luthier.errors import LuthierError
from luthier.model import LuthierConfig, Spec, build_model
from luthier.testing.decoders import refill

FORMULAS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "relu": lambda v: max(v, 0.0),
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "none": lambda v: v,
}


def built(**fields):
    config = LuthierConfig(vocab_size=11, hidden_size=3, num_attention_heads=1, head_dim=2, intermediate_size=5)
    return refill(Dense(**fields).build(Spec(config, "ffn", 0))).double()


def slow(module, x, activation):
    """One number at a time."""
    up = [sum(w * v for w, v in zip(row, x, strict=True)) for row in module.up_proj.weight.tolist()]
    if module.gate_proj is None:
        inner = [activation(u) for u in up]
    else:
        gate = [sum(w * v for w, v in zip(row, x, strict=True)) for row in module.gate_proj.weight.tolist()]
        inner = [activation(g) * u for g, u in zip(gate, up, strict=True)]
    return [sum(w * v for w, v in zip(row, inner, strict=True)) for row in module.down_proj.weight.tolist()]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", list(FORMULAS))
def test_formula(activation, gated):
    module = built(activation=activation, gated=gated)
    x = torch.tensor([[[0.5, -1.25, 2.0], [-3.0, 0.25, 1.0]]], dtype=torch.float64)
    y, aux = module(x)
    want = [[slow(module, row, FORMULAS[activation]) for row in x[0].tolist()]]
    assert aux == {}
    assert torch.allclose(y, torch.tensor(want, dtype=torch.float64), atol=1e-12)


def test_width():
    assert built().up_proj.weight.shape == (5, 3)
    narrow = built(width=2)
    assert [p.shape for p in narrow.parameters()] == [(2, 3), (2, 3), (3, 2)]
    assert len(list(built(gated=False).parameters())) == 2


def test_refuses_activations_it_does_not_know():
    with pytest.raises(LuthierError, match="silu"):
        Dense(activation="sillu")


def test_layers_may_differ():
    model = build_model(
        {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6,
         "slots": {"ffn@1": {"use": "block.dense", "set": {"width": 9, "gated": False}}}},
    )  # fmt: skip
    first, second = (layer.mlp for layer in model.model.layers)
    assert first.up_proj.weight.shape == (6, 8) and first.gate_proj is not None
    assert second.up_proj.weight.shape == (9, 8) and second.gate_proj is None
