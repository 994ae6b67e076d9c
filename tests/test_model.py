"""The decoder against Llama, and what transformers expects of a model."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from luthier.checkpoint.anatomy import role_of
from luthier.errors import LuthierError
from luthier.kit.parts import aux_loss
from luthier.model import LuthierConfig, LuthierForCausalLM, LuthierModel, build_model
from luthier.model.export import to_stock
from luthier.testing import tiny
from luthier.testing.part import after_step, at_home

SIZES = {
    "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1,
}  # fmt: skip
MOE = {"use": "block.moe", "set": {"experts": 4, "bias_rate": 0.01, "shared": 1, "z_weight": 0.001}}


def ids(*shape, seed=0):
    return torch.randint(2, tiny.VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair():
    """The same weights as a Llama and as ours."""
    llama = tiny.llama(0)
    ours = build_model(SIZES).eval()
    ours.load_state_dict(llama.state_dict())
    return ours, llama


@pytest.fixture
def sparse():
    return build_model(SIZES | {"slots": {"ffn": MOE}, "tie_word_embeddings": True})


def test_logits_are_llamas(pair):
    ours, llama = pair
    assert torch.equal(ours(ids(2, 9)).logits, llama(ids(2, 9)).logits)


def test_padded_logits_are_llamas(pair):
    ours, llama = pair
    row = ids(2, 9)
    row[0, :4] = 0
    mask = row.ne(0).long()
    one, two = (m(row, attention_mask=mask).logits for m in pair)
    assert torch.allclose(one[mask.bool()], two[mask.bool()], atol=1e-6)
    assert torch.isfinite(one).all()


def test_loss_and_gradients_are_llamas(pair):
    row = ids(2, 9)
    labels = row.clone()
    labels[:, :3] = -100
    losses, grads = [], []
    for model in (copy.deepcopy(m).train() for m in pair):
        loss = model(row, labels=labels, num_items_in_batch=7).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    assert all(torch.allclose(grads[0][name], grad, atol=1e-6) for name, grad in grads[1].items())


def test_hidden_states_are_llamas(pair):
    one, two = (m(ids(2, 5), output_hidden_states=True).hidden_states for m in pair)
    assert len(one) == len(two) == 3
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generation_is_llamas(pair, how):
    row = ids(2, 6)
    row[0, :3] = 0
    out = []
    for model in pair:
        torch.manual_seed(0)
        out.append(model.generate(row, attention_mask=row.ne(0).long(), max_new_tokens=6, **how))
    assert torch.equal(out[0], out[1])


def test_generation_without_cache_and_with_is_one(sparse):
    sparse.eval()
    one, two = (sparse.generate(ids(2, 5), max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(one, two)


def test_logits_to_keep(pair):
    ours, _ = pair
    whole = ours(ids(2, 7)).logits
    assert torch.allclose(ours(ids(2, 7), logits_to_keep=2).logits, whole[:, -2:], atol=1e-6)
    picked = torch.tensor([1, 4])
    assert torch.allclose(ours(ids(2, 7), logits_to_keep=picked).logits, whole[:, picked], atol=1e-6)


def test_embeddings_in_and_tuples_out(pair):
    ours, _ = pair
    row = ids(1, 5)
    out = ours(inputs_embeds=ours.get_input_embeddings()(row), return_dict=False)
    assert isinstance(out, tuple) and torch.equal(out[0], ours(row).logits)
    assert torch.equal(ours.model(row, return_dict=False)[0], ours.model(row).last_hidden_state)


def test_body_gives_aux_and_the_loss_has_it_once(sparse):
    row = ids(2, 9)
    body, out = sparse.model(row), sparse(row, labels=row)
    logits = sparse.lm_head(body.last_hidden_state)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), row[:, 1:].flatten())
    extra = aux_loss(body.aux)
    assert set(body.aux) == {"loss/balance", "loss/z"} | {
        f"metric/{m}.{i}" for m in ("load", "max_violation") for i in (0, 1)
    }
    assert extra > 0.01
    assert torch.allclose(out.loss, nll + extra, atol=1e-6)
    assert torch.allclose(sparse.eval()(row, labels=row).loss, nll, atol=1e-6)


def test_padding_is_no_load(sparse):
    row = ids(2, 9)
    mask = torch.ones_like(row)
    mask[0, :4] = 0
    loads = sparse(row, attention_mask=mask).aux["metric/load.1"]
    assert loads.sum() == 2 * (18 - 4)


def test_bias_balancing_follows_training_passes_only(sparse):
    bias = sparse.model.layers[1].mlp.gate.e_score_correction_bias
    sparse.eval()(ids(2, 9))
    after_step(sparse)
    assert bias.abs().sum() == 0
    load = sparse.train()(ids(2, 9)).aux["metric/load.1"]
    after_step(sparse)
    assert torch.allclose(bias, 0.01 * torch.sign(load.mean() - load))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(sparse, reentrant):
    """Same loss, gradients and balancing; aux losses carry their gradient also when reentrant."""
    other = copy.deepcopy(sparse)
    other.activation_checkpointing_enable({"use_reentrant": reentrant})
    other.enable_input_require_grads()
    for model in (sparse, other):
        model(ids(2, 9), labels=ids(2, 9)).loss.backward()
        after_step(model)
    for (name, p), q in zip(sparse.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-7), name
    assert all(torch.equal(a, b) for a, b in zip(sparse.buffers(), other.buffers(), strict=True))
    assert other(ids(1, 4), use_cache=True).past_key_values is None


def test_compiled_is_eager():
    """What dynamo captures computes the same; which compiler runs it is torch's matter."""
    sparse = build_model(SIZES | {"slots": {"ffn": MOE}, "num_hidden_layers": 1})
    compiled = torch.compile(copy.deepcopy(sparse), backend="eager")
    one, two = sparse(ids(2, 9), labels=ids(2, 9)), compiled(ids(2, 9), labels=ids(2, 9))
    assert torch.allclose(one.loss, two.loss, atol=1e-6)
    two.loss.backward()
    assert all(p.grad is not None for p in compiled.parameters())


def test_auto_classes(sparse, tmp_path):
    sparse.eval().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LuthierConfig)
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, LuthierModel)
    assert torch.equal(at_home(body)(ids(1, 5)).last_hidden_state, sparse.model(ids(1, 5)).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(half, LuthierForCausalLM) and half.dtype == torch.bfloat16
    assert half.model.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_tied_head_is_saved_once(sparse, tmp_path):
    from safetensors import safe_open

    sparse.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys())
    again = LuthierForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    free = build_model(SIZES)
    assert free.lm_head.weight is not free.model.embed_tokens.weight


def test_weights_are_keyed_by_seed_and_name():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    small, large = build_model(SIZES, 3), build_model(SIZES | {"num_hidden_layers": 3}, 3)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in small.state_dict().items():
        assert torch.equal(value, large.state_dict()[name]), name
    assert not torch.equal(small.lm_head.weight, build_model(SIZES, 4).lm_head.weight)
    assert not torch.equal(small.model.layers[0].mlp.up_proj.weight, small.model.layers[1].mlp.up_proj.weight)
    assert small.lm_head.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.all(small.model.norm.weight == 1)


def test_missing_weights_start_as_they_should(tmp_path):
    """from_pretrained draws what a file lacks by the same rules: gains one, biases zero, the rest normal."""
    from safetensors.torch import load_file, save_file

    model = build_model(SIZES | {"slots": {"ffn": MOE}})
    model.save_pretrained(tmp_path)
    kept = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if ".1." not in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    layer = LuthierForCausalLM.from_pretrained(tmp_path).model.layers[1]
    assert torch.all(layer.input_layernorm.weight == 1)
    assert torch.all(layer.mlp.gate.e_score_correction_bias == 0)
    assert layer.mlp.experts.up_proj.std().item() == pytest.approx(0.1, rel=0.1)
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_every_tensor_has_a_role(sparse):
    mixed = build_model(SIZES | {"slots": {"ffn@1": MOE}})
    roles = {role_of("luthier", name)[0] for name in mixed.state_dict()}
    assert "other" not in roles
    assert {"moe.router", "moe.router.bias", "moe.gate", "moe.shared.down", "mlp.up", "attn.q", "norm"} <= roles


def test_a_sparse_decoder_learns():
    """A copy task: the second half repeats the first."""
    model = build_model(SIZES | {"slots": {"ffn": MOE}, "initializer_range": 0.05})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(60):
        half = torch.randint(2, 12, (16, 6), generator=torch.Generator().manual_seed(step))
        row = torch.cat((half, half), 1)
        loss = model(row, labels=row.where(torch.arange(12) >= 6, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(model)
        losses.append(loss.item())
    assert losses[0] > 5 and sum(losses[-5:]) / 5 < 2.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_to_llama(dtype, tmp_path):
    model = build_model(SIZES | {"tie_word_embeddings": True, "rope_theta": 77.0}).to(dtype).eval()
    stock = to_stock(model)
    assert type(stock).__name__ == "LlamaForCausalLM" and stock.dtype == dtype
    assert torch.equal(stock(ids(2, 9)).logits, model(ids(2, 9)).logits)
    stock.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids(2, 9)).logits, model(ids(2, 9)).logits)
    stock.model.norm.weight.data.zero_()
    assert model.model.norm.weight.abs().sum() > 0


def test_export_to_mixtral():
    slots = {
        "ffn": {"use": "block.moe", "set": {"experts": 4}},
        "mixer": {"use": "block.attention", "set": {"theta": 500.0, "kv_heads": 1}},
        "norm": {"use": "norm.rms", "set": {"eps": 0.01}},
    }
    model = build_model(SIZES | {"slots": slots}).eval()
    stock = to_stock(model)
    assert type(stock).__name__ == "MixtralForCausalLM"
    assert torch.allclose(stock(ids(2, 9)).logits, model(ids(2, 9)).logits, atol=1e-6)


@pytest.mark.parametrize(
    "slots, says",
    [
        ({"ffn": MOE}, "shared experts"),
        ({"ffn@0": {"use": "block.dense", "set": {"width": 5}}}, "layers differ in the slot 'ffn'"),
        ({"norm": {"use": "norm.rms", "set": {"center": True}}}, "centres"),
        ({"ffn": {"use": "block.dense", "set": {"gated": False}}}, "not gated"),
        ({"ffn": {"use": "block.dense", "set": {"activation": "sigmoid"}}}, "gated by sigmoid"),
    ],
)
def test_export_says_what_stock_cannot_express(slots, says):
    with pytest.raises(LuthierError, match=says):
        to_stock(build_model(SIZES | {"slots": slots}))


def test_export_of_other_activations():
    model = build_model(SIZES | {"slots": {"ffn": {"use": "block.dense", "set": {"activation": "gelu"}}}}).eval()
    assert torch.allclose(to_stock(model)(ids(1, 5)).logits, model(ids(1, 5)).logits, atol=1e-6)
