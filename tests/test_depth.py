"""Layers found, skipped and watched in every family: against models whose layer is really deleted."""

import copy

import pytest
import torch
from torch import nn

from luthier.checkpoint.roles import live_layers
from luthier.errors import LuthierError
from luthier.kit.depth import angular, skipping, watching
from luthier.kit.encode import Row
from luthier.kit.likelihood import by_length
from luthier.model import build_model
from luthier.testing import tiny
from luthier.testing.measure import untouched
from test_checkpoint_anatomy import STOCK, build

IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
OURS = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
MOE = {"slots": {"ffn": {"use": "block.moe", "set": {"experts": 4}}}}


def model_of(family):
    if family.startswith("luthier"):
        return build_model(OURS | (MOE if family.endswith("moe") else {})).eval()
    model = build(family).eval()
    model.config._experts_implementation = "eager"
    for p in model.parameters():
        p.data *= 0.3
    return model


def without(model, *places):
    """A copy whose layers at these places are gone, the others renumbered, as the caches need it."""
    other = copy.deepcopy(model)
    layers = live_layers(other)
    kept = [layer for i, layer in enumerate(layers) if i not in places]
    holder = next(m for m in other.modules() if isinstance(m, nn.ModuleList) and len(m) and m[0] is layers[0])
    for i in reversed(places):
        del holder[i]
    for i, layer in enumerate(kept):
        for module in layer.modules():
            for name in ("layer_idx", "layer"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, i)
    for name in ("num_hidden_layers", "n_layer"):
        if name in other.config.to_dict():
            setattr(other.config, name, len(kept))
    kinds = getattr(other.config, "layer_types", None)
    if kinds:
        other.config.layer_types = [kind for i, kind in enumerate(kinds) if i not in places]
    return other


@pytest.mark.parametrize("family", [*STOCK, "luthier", "luthier moe"])
@torch.no_grad()
def test_a_skipped_layer_is_a_deleted_layer(family):
    """In one pass, and token by token with a cache, whose length stays right; afterwards nothing is left."""
    model = model_of(family)
    layers = live_layers(model)
    assert len(layers) == 3 and all(isinstance(layer, nn.Module) for layer in layers)
    for places in ((0,), (1,), (1, 2)):
        want = without(model, *places)(IDS, use_cache=False).logits
        with untouched(model), skipping(layers, places):
            whole = model(IDS, use_cache=False).logits
            cache, parts = None, []
            for piece in IDS.split([4, 1, 2], dim=1):
                out = model(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
        assert torch.allclose(whole, want, atol=1e-5)
        assert torch.allclose(torch.cat(parts, 1), want, atol=1e-4)
        assert cache.get_seq_length() == 7
        assert not torch.allclose(model(IDS).logits, want, atol=1e-3)


def test_a_skipped_layer_adds_no_auxiliary_loss():
    model = model_of("luthier moe")
    model.train()
    with skipping(live_layers(model), (0, 1, 2)):
        assert not [k for k in model(IDS).aux if k.startswith("loss/")]
    assert [k for k in model(IDS).aux if k.startswith("loss/")]


def test_hooks_go_when_something_fails():
    model = tiny.llama()
    with untouched(model), pytest.raises(ZeroDivisionError), skipping(live_layers(model), (0,)):
        raise ZeroDivisionError
    with untouched(model), pytest.raises(TypeError), watching(live_layers(model), None, leaves=True):
        model(IDS)


@torch.no_grad()
def test_watching_sees_inputs_and_outputs_in_order():
    model, seen = tiny.llama(num_hidden_layers=3), []
    with watching(live_layers(model), lambda i, x, y: seen.append((i, x, y))):
        states = model(IDS, output_hidden_states=True).hidden_states
    assert [i for i, _, _ in seen] == [0, 1, 2]
    for i, x, y in seen:
        assert torch.equal(x, states[i])
        assert torch.equal(model.model.norm(y) if i == 2 else y, states[i + 1])


class Recurrent(nn.Module):
    """One layer, called three times."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4, bias=False)
        self.layers = nn.ModuleList([self.one] * 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_layer_used_thrice_is_told_apart_by_its_calls():
    model, x, seen = Recurrent(), torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0)), []
    layers = live_layers(model)
    assert layers == [model.one] * 3
    with skipping(layers, (1,)):
        for _ in range(2):
            assert torch.equal(model(x), model.one.forward(model.one.forward(x)))
    with watching(layers, lambda i, a, b: seen.append(i)):
        model(x), model(x)
    assert seen == [0, 1, 2] * 2


def test_leaves_cut_the_graph_between_layers():
    model, found = tiny.llama(), []

    def look(i, x, y):
        assert x.is_leaf and x.requires_grad
        found.append(torch.autograd.grad(y.sum(), x)[0])

    with untouched(model), watching(live_layers(model), look, leaves=True):
        model(IDS)
    assert len(found) == 2 and all(g.shape == (2, 7, 32) and g.abs().sum() > 0 for g in found)


def test_models_without_a_list_of_layers_are_refused():
    with pytest.raises(LuthierError, match="no list of layers"):
        live_layers(nn.Sequential(nn.Linear(2, 2)))


def test_layers_of_the_language_model_are_found_beside_a_vision_tower():
    model = nn.Module()
    for name in ("vision_tower", "language_model"):
        part = nn.Module()
        part.layers = nn.ModuleList([nn.Linear(2, 2)])
        setattr(model, name, part)
    assert live_layers(model) == [model.language_model.layers[0]]


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 30.0, 90.0, 180.0])
def test_angles_by_hand(degrees):
    """Small ones too, for which the arc cosine of a cosine in fp64 would give 0."""
    turn = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    y = torch.stack([turn.cos(), turn.sin()])[None] * 7
    assert angular(torch.tensor([[2.0, 0.0]], dtype=torch.float64), y).item() == pytest.approx(degrees / 180, rel=1e-9)


def test_rows_of_like_lengths_go_together():
    rows = [Row((1,) * n, (1,) * n) for n in (5, 2, 9, 2, 7)]
    assert by_length(rows, 2) == [[1, 3], [0, 4], [2]]
