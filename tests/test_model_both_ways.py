"""Decoders in which layers look both ways: masks, the cache they refuse, saving, and export."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from luthier.errors import LuthierError
from luthier.model import build_model
from luthier.model.export import to_stock

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "mask_token_id": 39, "pad_token_id": 0,
}  # fmt: skip
OPEN = {"use": "block.attention", "set": {"causal": False}}


def ids(*shape, seed=0):
    return torch.randint(1, 39, shape, generator=torch.Generator().manual_seed(seed))


def built(slots=None):
    return build_model(SIZES | {"slots": slots or {"mixer": OPEN}}).eval()


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_is_not_seen(side):
    model, row, width = built(), ids(1, 6), 4
    pads = torch.zeros(1, width, dtype=torch.long)
    parts = {"left": (pads, row), "right": (row, pads), "middle": (row[:, :3], pads, row[:, 3:])}[side]
    whole = torch.cat(parts, 1)
    mask = whole.ne(0).long()
    place = mask.cumsum(1).sub(1).clamp_min(0)
    logits = model(whole, attention_mask=mask, position_ids=place).logits[mask.bool()]
    torch.testing.assert_close(logits, model(row).logits[0], atol=2e-6, rtol=1e-5)


def test_layers_may_differ():
    """One layer that looks both ways is enough to see ahead; the others stay causal."""
    model = built({"mixer@1": OPEN})
    assert [layer.self_attn.causal for layer in model.model.layers] == [True, False] and model.model.looks_ahead
    one = ids(1, 6)
    two = one.clone()
    two[0, 5] = 38 if one[0, 5] != 38 else 37
    first, second = (model(x, output_hidden_states=True).hidden_states for x in (one, two))
    assert torch.equal(first[1][0, :5], second[1][0, :5])
    assert (first[2][0, :5] - second[2][0, :5]).abs().amax(-1).min() > 1e-4
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), one], 1)
    mask = padded.ne(0).long()
    logits = model(padded, attention_mask=mask, position_ids=mask.cumsum(1).sub(1).clamp_min(0)).logits
    torch.testing.assert_close(logits[:, 2:], model(one).logits, atol=2e-6, rtol=1e-5)


def test_the_cache_is_refused_in_one_line():
    model = built()
    assert model(ids(1, 5)).past_key_values is None
    with pytest.raises(LuthierError, match="keeps no cache; decode it by decode.masked_diffusion"):
        model(ids(1, 5), use_cache=True)
    with pytest.raises(LuthierError, match="keeps no cache"):
        model.generate(ids(1, 5), generation_config=GenerationConfig(max_new_tokens=2))
    assert not build_model(SIZES).model.looks_ahead


def test_saved_and_reloaded(tmp_path):
    model = built()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.looks_ahead and again.config.mask_token_id == 39
    assert torch.equal(again(ids(2, 7)).logits, model(ids(2, 7)).logits)


def test_exported_to_a_llama_that_looks_both_ways(tmp_path):
    model = built()
    stock = to_stock(model)
    assert stock.config.is_causal is False and stock.config.mask_token_id == 39
    row = ids(2, 7)
    row[0, :3] = 0
    mask = row.ne(0).long()
    stock.save_pretrained(tmp_path)
    for llama in (stock, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert torch.equal(llama(ids(2, 7)).logits, model(ids(2, 7)).logits)
        one, two = (m(row, attention_mask=mask, use_cache=False).logits[mask.bool()] for m in (llama, model))
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_checkpointing_and_compiling_mind_nothing():
    plain, saving = built().train(), built().train()
    saving.activation_checkpointing_enable({"use_reentrant": False})
    losses = [m(ids(2, 7), labels=ids(2, 7)).loss for m in (plain, saving)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    pairs = zip(plain.parameters(), saving.parameters(), strict=True)
    assert all(torch.allclose(p.grad, q.grad, atol=1e-7) for p, q in pairs)
