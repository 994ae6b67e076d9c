"""To the stock architecture, exactly: what a decoder of stock parts is under transformers' own classes.

Pre-norm layers of `block.attention`, `norm.rms` or `norm.lns` (whose scale goes into the gain) and, alike
in all layers, `block.dense` give a Llama; with `block.moe` (softmax scores, renormalised, nothing shared,
no bias) a Mixtral. Logits are equal bit for bit, but for a Mixtral in bf16, whose own router works in bf16
and now and then chooses otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from luthier.errors import LuthierError
from luthier.model.config import LuthierConfig
from luthier.model.decoder import LuthierForCausalLM

SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "max_position_embeddings",
    "initializer_range", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def to_stock(model: LuthierForCausalLM) -> PreTrainedModel:
    """A LlamaForCausalLM or MixtralForCausalLM with copies of the weights, in the same dtype and mode.

    Raises LuthierError naming the slot that stock classes cannot express.
    """
    config = model.config
    for slot in ("layer", "stack", "linear", "head"):
        if any(key.split("@")[0] == slot for key in config.slots or {}):
            raise _no(f"the slot {slot!r} is filled")
    if config.hidden_size % config.num_attention_heads:
        raise _no(f"hidden_size {config.hidden_size} is no multiple of {config.num_attention_heads} heads")
    mixer, ffn = _same(config, "mixer"), _same(config, "ffn")
    sizes = {name: getattr(config, name) for name in SIZES} | {
        "num_key_value_heads": mixer["kv_heads"] or config.num_key_value_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer["theta"] or config.rope_theta},
        "rms_norm_eps": _eps(config),
        **({} if mixer["causal"] else {"is_causal": False, "mask_token_id": config.mask_token_id}),
    }
    stock = _mixtral(model, ffn, sizes) if "experts" in ffn else _llama(model, ffn, sizes)
    stock.generation_config = model.generation_config
    return stock.train(model.training)


def _same(config: LuthierConfig, slot: str) -> Mapping[str, Any]:
    """The fields of the one stock Part that fills `slot` in every layer."""
    stock = {"mixer": ("block.attention",), "ffn": ("block.dense", "block.moe")}[slot]
    parts = [config.part(slot, layer) for layer in range(config.num_hidden_layers)]
    if any(part != parts[0] for part in parts):
        raise _no(f"layers differ in the slot {slot!r}")
    if parts[0] is None or parts[0].id not in stock:
        raise _no(f"{parts[0].id if parts[0] else 'nothing'} fills the slot {slot!r}")
    return parts[0].to_dict()["set"]


def _eps(config: LuthierConfig) -> float:
    """The one eps of all norms, each of which must be an RMSNorm but for the size of its gain."""
    found = set()
    for layer in (*range(config.num_hidden_layers), None):
        part = config.part("norm", layer)
        if part is None or part.id not in ("norm.rms", "norm.lns"):
            raise _no(f"{part.id if part else 'nothing'} fills the slot 'norm'")
        fields = part.to_dict()["set"]
        if fields.get("center"):
            raise _no("norm.rms centres")
        found.add(fields["eps"] or config.rms_norm_eps)
    if len(found) > 1:
        raise _no("layers differ in the eps of their norms")
    return found.pop()


def _weights(model: LuthierForCausalLM) -> dict[str, Tensor]:
    """The state dict, with the gain of a plain RMSNorm where a norm scales beside its gain."""
    weights = dict(model.state_dict())
    for path, module in model.named_modules():
        gain: Any = getattr(module, "gain", None)
        if gain is not None:
            weights[f"{path}.weight"] = gain().detach()
    return weights


def _llama(model: LuthierForCausalLM, ffn: Mapping[str, Any], sizes: dict[str, Any]) -> PreTrainedModel:
    if not ffn["gated"] or ffn["activation"] not in ("silu", "relu", "gelu"):
        raise _no(f"block.dense is {'gated by ' + ffn['activation'] if ffn['gated'] else 'not gated'}")
    config = LlamaConfig(
        **sizes, intermediate_size=ffn["width"] or model.config.intermediate_size, hidden_act=ffn["activation"]
    )
    return _loaded(LlamaForCausalLM, config, model, _weights(model))


def _mixtral(model: LuthierForCausalLM, ffn: Mapping[str, Any], sizes: dict[str, Any]) -> PreTrainedModel:
    if ffn["scores"] != "softmax" or not ffn["renormalise"] or ffn["shared"] or ffn["bias_rate"]:
        raise _no("block.moe has sigmoid scores, shared experts, a bias, or does not renormalise")
    weights = _weights(model)
    for name in [n for n in weights if n.endswith("experts.gate_proj")]:
        gate_EFD, up_EFD = weights.pop(name), weights.pop(name.replace("gate_proj", "up_proj"))
        weights[name.replace("gate_proj", "gate_up_proj")] = torch.cat((gate_EFD, up_EFD), dim=1)
    width = ffn["width"] or model.config.intermediate_size // ffn["top_k"]
    config = MixtralConfig(
        **sizes, intermediate_size=width, num_local_experts=ffn["experts"], num_experts_per_tok=ffn["top_k"],
        router_aux_loss_coef=ffn["balance_weight"],
    )  # fmt: skip
    return _loaded(MixtralForCausalLM, config, model, weights)


def _loaded(
    kind: type[PreTrainedModel], config: Any, model: LuthierForCausalLM, weights: dict[str, Tensor]
) -> PreTrainedModel:
    """Built in the model's dtype rather than cast, since a cast would round the rotary buffers too."""
    weight = model.model.embed_tokens.weight
    config.dtype = weight.dtype
    with no_init_weights(), weight.device:
        stock = kind._from_config(config)
    stock.load_state_dict(weights)
    stock.tie_weights()
    return stock


def _no(reason: str) -> LuthierError:
    return LuthierError(f"no stock architecture expresses this model: {reason}", do="keep it as a luthier model")
