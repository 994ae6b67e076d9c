"""One tiny model of each family, with weights that differ clearly, for tests of what holds across families."""

import torch
import transformers

from luthier.checkpoint.anatomy import disk_views
from luthier.testing import tiny

SIZES = {
    "vocab_size": 276, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
WIDE = {**SIZES, "head_dim": 16}
"""Heads wider than hidden size / heads."""
FAMILIES = {
    "llama": ("LlamaConfig", WIDE),
    "llama, tied, biases": (
        "LlamaConfig", {**SIZES, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, one key-value head": ("LlamaConfig", {**SIZES, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", SIZES),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", WIDE),
    "gemma": ("GemmaConfig", WIDE),
    "gemma2": ("Gemma2Config", WIDE),
    "gemma3": ("Gemma3TextConfig", WIDE),
    "olmo": ("OlmoConfig", SIZES),
    "olmo2": ("Olmo2Config", SIZES),
    "olmo3": ("Olmo3Config", SIZES),
    "smollm3": ("SmolLM3Config", {**SIZES, "no_rope_layer_interval": 2}),
    "granite": ("GraniteConfig", {**SIZES, "residual_multiplier": 0.5, "embedding_multiplier": 3.0,
                                  "attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "seed_oss": ("SeedOssConfig", WIDE),
    "phi3": ("Phi3Config", SIZES),
    "phi3, three quarters turn": ("Phi3Config", {**SIZES, "hidden_size": 64, "partial_rotary_factor": 0.75}),
    "glm": ("GlmConfig", {**WIDE, "attention_bias": True}),
    "glm4": ("Glm4Config", WIDE),
    "qwen2_moe": ("Qwen2MoeConfig", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                     "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3MoeConfig", {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "olmoe": ("OlmoeConfig", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"rotary_pct": 0.5}),
    "gpt2": ("GPT2Config", {"vocab_size": 276, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                            "bos_token_id": 1, "eos_token_id": 1}),
}  # fmt: skip
IDS = torch.randint(4, 276, (2, 40), generator=torch.Generator().manual_seed(0))


def model_of(name, **changes):
    """The tiny model, its biases as large as its other activations. changes: of its config."""
    kind, sizes = FAMILIES[name]
    config = getattr(transformers, kind)(**{**sizes, **changes})
    config._experts_implementation = "eager"  # the fused one computes in fp32 only
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tiny.redraw_(model, 1)
    generator = torch.Generator().manual_seed(2)
    for path, tensor in model.named_parameters():
        if path.endswith("bias"):
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    return model.eval()


def weights_of(model):
    """Copies of the weights, fp32, under their names on disk."""
    return {name: tensor.detach().clone().float() for name, tensor in disk_views(model).items()}


@torch.no_grad()
def logits_of(model, weights, dtype=torch.float32):
    """The logits with these weights, computed in this dtype."""
    tiny.cast_(model, dtype)
    for name, tensor in disk_views(model).items():
        tensor.copy_(weights[name])
    return model(IDS, use_cache=False).logits


def distance(first, second):
    """Between two models' weights, all tensors together."""
    return sum(float((first[n].double() - second[n].double()).square().sum()) for n in first) ** 0.5
