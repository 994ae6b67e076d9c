"""luthier's experts under stock transformers classes."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import luthier.model
from luthier.errors import LuthierError

assert luthier.model
SIZES = {
    "vocab_size": 61, "hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DEEPSEEK = {
    "intermediate_size": 44, "moe_intermediate_size": 14, "n_routed_experts": 6, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_experts_per_tok": 2, "q_lora_rank": None, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "head_dim": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip
QWEN = {"moe_intermediate_size": 14, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 10}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=22, num_local_experts=5, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**SIZES, intermediate_size=14, num_experts=7, num_experts_per_tok=3),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, **QWEN, intermediate_size=26, shared_expert_intermediate_size=18, decoder_sparse_step=1
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **QWEN, intermediate_size=26, decoder_sparse_step=1),
    "deepseek_v2": lambda: DeepseekV2Config(**SIZES, **DEEPSEEK),
    "deepseek_v3": lambda: DeepseekV3Config(**SIZES, **DEEPSEEK),
}


def built(config, dtype=torch.float64):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def passed(model, implementation):
    """Loss and every gradient."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = torch.arange(34).view(2, 17) % 60 + 1
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_experts_equal_eager_in_float64(family):
    """Output, and the gradients of tokens, routing weights and matrices, to the last bits."""
    model = built(CONFIGS[family]())
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "act_fn"))
    g = torch.Generator().manual_seed(1)
    x_ND = torch.randn(11, 30, generator=g, dtype=torch.float64)
    index_NK = torch.rand(11, len(experts.gate_up_proj), generator=g).topk(2).indices
    index_NK[index_NK == 1] = 0
    weight_NK = torch.rand(11, 2, generator=g, dtype=torch.float64)
    found = []
    for name in ("eager", "luthier"):
        model.set_experts_implementation(name)
        leaves = [x_ND.clone().requires_grad_(), weight_NK.clone().requires_grad_()]
        y_ND = experts(leaves[0], index_NK, leaves[1])
        of = [*leaves, experts.gate_up_proj, experts.down_proj]
        found.append([y_ND, *torch.autograd.grad(y_ND.square().sum(), of)])
    for eager, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_model_equals_eager(family):
    model = built(CONFIGS[family]())
    (eager, eager_grads), (ours, our_grads) = (passed(model, name) for name in ("eager", "luthier"))
    torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-13)
    assert our_grads.keys() == eager_grads.keys() and any("experts.gate_up_proj" in name for name in our_grads)
    for name, grad in our_grads.items():
        # Mixtral's and DeepSeek's norms work in fp32 inside a float64 model: one bit of theirs may flip
        bound = 1e-6 if family in ("mixtral", "deepseek_v2", "deepseek_v3") else 1e-13
        assert (grad - eager_grads[name]).norm() <= bound * eager_grads[name].norm(), name


def test_chosen_at_loading_and_used(tmp_path, monkeypatch):
    built(CONFIGS["mixtral"](), torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="luthier")
    seen = []
    inner = luthier.model.experts.moe_apply
    monkeypatch.setattr(luthier.model.experts, "moe_apply", lambda *a: seen.append(1) or inner(*a))
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    assert len(seen) == 4, "two layers, two passes"


def test_another_activation():
    config = CONFIGS["mixtral"]()
    config.hidden_act = "gelu"
    model = built(config)
    (eager, _), (ours, _) = (passed(model, name) for name in ("eager", "luthier"))
    torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-13)


def test_experts_of_another_form_are_refused():
    config = GptOssConfig(**SIZES, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, head_dim=10)
    model = built(config, torch.float32)
    model.set_experts_implementation("luthier")
    with pytest.raises(LuthierError, match="GptOssExperts: the experts have biases.*grouped_mm"):
        model(torch.tensor([[1, 2, 3]]))
