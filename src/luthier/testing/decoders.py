"""Tiny decoders with one Part in one slot, the Part's outcome on fixed input, and its peers.

Shapes: B sequences, T positions, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.kit.context import Context
from luthier.kit.parts import Aux, Pass
from luthier.model import LuthierConfig, LuthierForCausalLM, Spec, build_model

SIZES: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
PLAIN_CALL = ("linear", "head")
"""slots whose module stands in for nn.Linear: called with x alone, returns no aux"""


def config(method: Any, slot: str) -> LuthierConfig:
    return LuthierConfig(**SIZES, tie_word_embeddings=slot != "head", slots={slot: method.to_dict()})


def decoder(method: Any, slot: str, seed: int = 0) -> LuthierForCausalLM:
    """A tiny decoder with the Part in `slot`, in eval mode."""
    return build_model(config(method, slot), seed).eval()


def tokens(*shape: int) -> Tensor:
    """Token ids without the padding id."""
    return torch.randint(1, SIZES["vocab_size"], shape, generator=Context().rng("tokens", shape))


def alone(method: Any, slot: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The Part's module by itself, in training mode, with weights keyed by their role."""
    own = slot if slot in type(method).slots else type(method).slots[0]
    spec = Spec(config(method, own)).at(0)
    module = spec.linear(16, 16, slot) if slot in PLAIN_CALL else spec.part(slot)
    return refill(module.train()).to(dtype)


@torch.no_grad()
def refill(module: nn.Module) -> nn.Module:
    """Draw every parameter again by a name that leaves out how modules nest: `experts.gate_proj` and
    `gate_proj.weight` of as many entries get the same numbers. Gains are around one."""
    for name, p in module.named_parameters():
        words = [w for w in name.split(".") if w not in ("experts", "weight")]
        draw = 0.4 * torch.randn(p.numel(), generator=Context().rng(".".join(words))).view(p.shape)
        p.copy_(draw + 1 if p.dim() < 2 else draw)
    return module


def call(module: nn.Module, slot: str, x_BTD: Tensor) -> tuple[Tensor, Aux]:
    """The module's output and aux for a plain causal pass over x."""
    if slot in PLAIN_CALL:
        return module(x_BTD), {}
    at = Pass(positions_BT=torch.arange(x_BTD.shape[1])[None])
    y_BTD, aux = module(x_BTD, at)
    return y_BTD, aux


def states(width: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    """Hidden states (2, 9, D), a leaf that wants its gradient."""
    return torch.randn(2, 9, width, generator=Context().rng("states")).to(dtype).requires_grad_()


def outcome(method: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Output and gradient of the input of the Part alone. given: {"slot": NAME}, its first by default; a slot it
    does not fill itself is built around it, such as the layer around an ffn."""
    slot = given.get("slot", type(method).slots[0])
    module = alone(method, slot)
    x_BTD = states()
    return _traced(x_BTD, call(module, slot, x_BTD)[0])


def _traced(x_BTD: Tensor, y_BTD: Tensor) -> dict[str, Tensor]:
    weights_BTD = torch.randn(y_BTD.shape, generator=Context().rng("weights"))
    (y_BTD * weights_BTD).sum().backward()
    return {"y": y_BTD.detach(), "gradient": x_BTD.grad}  # type: ignore[dict-item]


def _llama() -> Any:
    from transformers import LlamaConfig

    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes: dict[str, Any] = {**{k: SIZES[k] for k in keys}, "attn_implementation": "sdpa"}
    return LlamaConfig(**sizes)


def _llama_attention(method: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    x_BTD = states()
    module = refill(LlamaAttention(_llama(), 0))
    rotary = LlamaRotaryEmbedding(_llama())(x_BTD, torch.arange(x_BTD.shape[1])[None])
    return _traced(x_BTD, module(x_BTD, rotary, None)[0])


def _llama_mlp(method: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    from transformers.models.llama.modeling_llama import LlamaMLP

    x_BTD = states()
    return _traced(x_BTD, refill(LlamaMLP(_llama()))(x_BTD))


def _llama_norm(method: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x_BTD = states()
    return _traced(x_BTD, refill(LlamaRMSNorm(16))(x_BTD))


def _layer_norm(method: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    x_BTD = states()
    return _traced(x_BTD, refill(nn.LayerNorm(16, eps=1e-6, bias=False))(x_BTD))


PEERS: dict[str, Callable[[Any, Mapping[str, Any]], dict[str, Tensor]]] = {
    "llama.attention": _llama_attention,
    "llama.mlp": _llama_mlp,
    "llama.norm": _llama_norm,
    "torch.layer_norm": _layer_norm,
}


def at_home(model: Any) -> Any:
    """The model with its weights in memory that torch chose. The last bits of a product may depend on where its
    operands begin, and weights of a file lie as the file has them."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model
