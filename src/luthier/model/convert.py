"""From a mixture of experts to a chain of experts, equal to it until trained further.

    from luthier.model.convert import to_coe
    chain = to_coe(AutoModelForCausalLM.from_pretrained("a-mixtral"))

The released conversion (ZihanWang314/CoE d2af562, a script, not in arXiv 2506.18945): every iteration's
router starts as the trained one, and what earlier iterations add is multiplied by a gain that starts at
zero. Logits are those of the model before, bit for bit in fp32 and below the rounding of its router in
bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from luthier.errors import LuthierError
from luthier.model.config import LuthierConfig
from luthier.model.decoder import LuthierForCausalLM
from luthier.model.export import SIZES

ALIKE = ("experts", "top_k", "shared", "width", "renormalise", "balance", "balance_weight")


def to_coe(model: nn.Module, iterations: int = 2) -> LuthierForCausalLM:
    """A decoder whose layers with `block.moe` have become `block.coe` with gated steps; other layers stay.

    model: a LuthierForCausalLM or a MixtralForCausalLM.  The weights are copies, in the same dtype and mode.
    Raises LuthierError where there are no experts, or the chain cannot express them.
    """
    old, weights = _ours(model)
    slots: dict[str, Any] = {}
    for layer in range(old.num_hidden_layers):
        ffn = old.part("ffn", layer)
        if ffn is not None and ffn.id == "block.moe":
            slots[f"layer@{layer}"] = _chain(old, ffn.to_dict()["set"], layer, iterations)
            gate = f"model.layers.{layer}.mlp.gate.weight"
            weights[gate] = weights[gate].expand(iterations, -1, -1)
            bank = weights[f"model.layers.{layer}.mlp.experts.down_proj"]
            weights[f"model.layers.{layer}.mlp.step_scale"] = bank.new_zeros(iterations - 1, bank.shape[1])
    if not slots:
        raise LuthierError("no layer has experts", where="to_coe", do="give a model with block.moe, or a Mixtral")
    values = {**old.to_dict(), "slots": {**(old.slots or {}), **slots}}
    config = LuthierConfig(**{k: v for k, v in values.items() if k != "dtype"})
    return _filled(config, weights, model)


def _chain(config: LuthierConfig, ffn: Mapping[str, Any], layer: int, iterations: int) -> dict[str, Any]:
    part = config.part("layer", layer)
    odd = {"sigmoid scores": ffn["scores"] != "softmax", "bias balancing": ffn["bias_rate"] > 0,
           "a z-loss": ffn["z_weight"] > 0, "a layer of its own": part is not None}  # fmt: skip
    if any(odd.values()):
        raise LuthierError(
            f"layer {layer} has {', '.join(k for k, v in odd.items() if v)}, which block.coe has not", where="to_coe"
        )
    width = ffn["width"] or config.intermediate_size // (ffn["top_k"] + ffn["shared"])
    alike = {name: ffn[name] for name in ALIKE} | {"width": width, "iterations": iterations, "residual": "gated"}
    return {"use": "block.coe", "set": alike}


def _ours(model: nn.Module) -> tuple[LuthierConfig, dict[str, Tensor]]:
    """The configuration and weights of the model in our names."""
    source: Any = model
    if isinstance(model, LuthierForCausalLM):
        return model.config, dict(model.state_dict())
    if source.config.model_type != "mixtral":
        raise LuthierError(f"a {source.config.model_type} cannot be converted", where="to_coe", do="give a Mixtral")
    stock = source.config
    if stock.sliding_window is not None:
        raise LuthierError("a sliding window of attention is not expressed here", where="to_coe")
    moe = {
        "experts": stock.num_local_experts, "top_k": stock.num_experts_per_tok, "width": stock.intermediate_size,
        "balance_weight": stock.router_aux_loss_coef,
    }  # fmt: skip
    values = {name: getattr(stock, name) for name in SIZES} | {
        "num_key_value_heads": stock.num_key_value_heads, "intermediate_size": stock.intermediate_size,
        "rope_theta": stock.rope_parameters["rope_theta"], "rms_norm_eps": stock.rms_norm_eps,
        "slots": {"ffn": {"use": "block.moe", "set": moe}},
    }  # fmt: skip
    weights = dict(model.state_dict())
    for name in [n for n in weights if n.endswith("experts.gate_up_proj")]:
        both_EGD = weights.pop(name)
        for part, half in zip(("gate_proj", "up_proj"), both_EGD.chunk(2, dim=1), strict=True):
            weights[name.replace("gate_up_proj", part)] = half
    return LuthierConfig(**values), weights


def _filled(config: LuthierConfig, weights: Mapping[str, Tensor], like: nn.Module) -> LuthierForCausalLM:
    """A decoder of this configuration with copies of the weights, in the dtype, place and mode of `like`."""
    source: Any = like
    weight = next(like.parameters())
    with no_init_weights(), torch.device(weight.device):
        made: Any = LuthierForCausalLM(config)
    made.to(weight.dtype)
    made.load_state_dict(weights)
    made.tie_weights()
    made.generation_config = source.generation_config
    return made.train(like.training)
