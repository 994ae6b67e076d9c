"""Anatomy: what families call the parts of a decoder, and how their heads and rotary halves lie.

Data, one row a family; no method names a model class. Names are those on disk: `role_of` tells what
a tensor is, `places` where a tensor on disk lies inside a live model, which for mixtures of experts
is another name and a stretch of a fused tensor.

Roles: embed, embed.position, head, norm; attn.q, attn.k, attn.v, attn.o (fused: attn.qkv), attn.q_norm,
attn.k_norm, attn.q_a, attn.q_b, attn.kv_a, attn.kv_b (DeepSeek's low-rank projections); mlp.gate,
mlp.up, mlp.down (fused: mlp.gate_up, gates first); moe.router, moe.gate, moe.up, moe.down,
moe.shared.gate and so on; a bias has its weight's role with ".bias"; what no rule knows is "other".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, Literal, NamedTuple

from luthier.errors import LuthierError, said

ROTARY = Literal["half", "interleaved", "none"]
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.", re.ASCII)
_BESIDE = re.compile(r"\bvision_|\bmulti_modal_projector\b")  # towers of other senses have layers of their own
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.", re.ASCII)
OUTER = ("model.", "transformer.", "gpt_neox.")
"""outermost prefixes, with and without which some families are saved"""
_WORDS = 4
"""words of a module's name that tell its role, from the end; a hostile name has a million"""

_NORMS = {
    f"{name}_layernorm": "norm"
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward", "q_a", "kv_a")
} | {"norm": "norm"}
_GATED = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_LLAMA = (
    {"embed_tokens": "embed", "lm_head": "head"}
    | _NORMS
    | {f"self_attn.{p}_proj": f"attn.{p}" for p in "qkvo"}
    | {f"self_attn.{p}_norm": f"attn.{p}_norm" for p in "qk"}
    | {f"mlp.{name}": f"mlp.{part}" for name, part in _GATED.items()}
)
_EXPERTS = {"mlp.gate": "moe.router"} | {f"mlp.experts.{name}": f"moe.{part}" for name, part in _GATED.items()}
_SHARED = {f"mlp.shared_experts.{name}": f"moe.shared.{part}" for name, part in _GATED.items()}
_ONE_SHARED = {f"mlp.shared_expert.{name}": f"moe.shared.{part}" for name, part in _GATED.items()} | {
    "mlp.shared_expert_gate": "moe.shared.router"
}
_LOW_RANK = {
    f"self_attn.{name}": f"attn.{part}"
    for name, part in {"q_a_proj": "q_a", "q_b_proj": "q_b", "kv_a_proj_with_mqa": "kv_a", "kv_b_proj": "kv_b"}.items()
} | {"self_attn.q_a_layernorm": "norm", "self_attn.kv_a_layernorm": "norm"}
_MIXTRAL = {"block_sparse_moe.gate": "moe.router"} | {
    f"block_sparse_moe.experts.{name}": f"moe.{part}" for name, part in {"w1": "gate", "w3": "up", "w2": "down"}.items()
}
_GPT2 = {
    "wte": "embed", "wpe": "embed.position", "lm_head": "head", "ln_1": "norm", "ln_2": "norm", "ln_f": "norm",
    "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
}  # fmt: skip
_NEOX = {
    "embed_in": "embed", "embed_out": "head", "input_layernorm": "norm", "post_attention_layernorm": "norm",
    "final_layer_norm": "norm", "attention.query_key_value": "attn.qkv", "attention.dense": "attn.o",
    "mlp.dense_h_to_4h": "mlp.up", "mlp.dense_4h_to_h": "mlp.down",
}  # fmt: skip
_LUTHIER = {
    "embed_tokens": "embed", "embed": "embed", "lm_head": "head", "head": "head", "router": "moe.router",
    "mlp.gate": "moe.router", **{f"shared_experts.{name}": f"moe.shared.{part}" for name, part in _GATED.items()},
    **{f"{p}_proj": f"attn.{p}" for p in "qkvo"}, **{f"{p}_norm": f"attn.{p}_norm" for p in "qk"},
    **{name: f"mlp.{part}" for name, part in _GATED.items()},
    **{f"experts.{name}": f"moe.{part}" for name, part in _GATED.items()},
    **{f"shared.{name}": f"moe.shared.{part}" for name, part in _GATED.items()},
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One row: how a family names and lays out its parts.

    parts: the end of a module's name → role; the longest end that fits wins.
    transposed: roles whose weight is (in, out) instead of (out, in).
    qkv: how a fused projection's rows lie, "stacked" (all q, all k, all v; of the last two there may be fewer) or
    "by_head" (q, k, v of head 0, then of head 1).  rotary: which entries of a head turn together.  turning: the
    share of a head's entries that turn, where config.json does not say.  partial: the key of config.json, beside that
    of rope_parameters, by which the family heeds what is said of it (`heads.turning_share`); the others heed neither.
    live: live module name ← name on disk, where they differ outside the experts.
    experts: the module that holds fused experts in memory, and (gate, up, down) on disk.
    after: norms that a branch's output passes before it is added.  shifted: norms multiply by 1 + weight.
    heads, kv_heads, layers, hidden: the keys of config.json.
    """

    name: str
    parts: Mapping[str, str]
    rotary: ROTARY = "half"
    turning: float = 1.0
    partial: str | None = None
    transposed: tuple[str, ...] = ()
    qkv: Literal["stacked", "by_head"] = "stacked"
    live: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, str, str] | None = None
    after: tuple[str, ...] = ()
    shifted: bool = False
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    aliases: tuple[str, ...] = field(default=())


_GATED_NAMES = ("gate_proj", "up_proj", "down_proj")
_FUSED = {"mlp.gate_up_proj": "mlp.gate_up"}
_GLM_AFTER = ("post_self_attn_layernorm", "post_mlp_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_FAMILIES = (
    Family("llama", _LLAMA),
    Family("mistral", _LLAMA),
    Family("qwen2", _LLAMA),
    Family("qwen3", _LLAMA),
    Family("qwen2_moe", _LLAMA | _EXPERTS | _ONE_SHARED, experts=_GATED_NAMES),
    Family("qwen3_moe", _LLAMA | _EXPERTS, experts=_GATED_NAMES),
    Family("smollm3", _LLAMA),
    Family("granite", _LLAMA),
    Family("seed_oss", _LLAMA),
    Family("phi3", _LLAMA | {"self_attn.qkv_proj": "attn.qkv", **_FUSED}, partial="partial_rotary_factor"),
    Family("glm", _LLAMA | _FUSED, rotary="interleaved", turning=0.5, partial="partial_rotary_factor"),
    Family(
        "glm4",
        _LLAMA | _FUSED | dict.fromkeys(_GLM_AFTER, "norm"),
        rotary="interleaved",
        turning=0.5,
        partial="partial_rotary_factor",
        after=_GLM_AFTER,
    ),  # fmt: skip
    Family("gemma", _LLAMA, shifted=True),
    Family("gemma2", _LLAMA, after=_AFTER, shifted=True),
    Family("gemma3", _LLAMA, after=_AFTER, shifted=True, aliases=("gemma3_text",)),
    Family("olmo", _LLAMA),
    Family("olmo2", _LLAMA, after=_AFTER),
    Family("olmo3", _LLAMA, after=_AFTER),
    Family("olmoe", _LLAMA | _EXPERTS, experts=_GATED_NAMES),
    Family("mixtral", _LLAMA | _MIXTRAL, experts=("w1", "w3", "w2"), live=((".mlp.", ".block_sparse_moe."),)),
    Family("deepseek_v2", _LLAMA | _EXPERTS | _SHARED | _LOW_RANK, rotary="interleaved", experts=_GATED_NAMES),
    Family("deepseek_v3", _LLAMA | _EXPERTS | _SHARED | _LOW_RANK, rotary="interleaved", experts=_GATED_NAMES),
    Family(
        "gpt2",
        _GPT2,
        rotary="none",
        transposed=("attn.qkv", "attn.o", "mlp.up", "mlp.down"),
        heads="n_head",
        kv_heads="n_head",
        layers="n_layer",
        hidden="n_embd",
    ),  # fmt: skip
    Family(
        "gpt_neox",
        _NEOX,
        turning=0.25,
        partial="rotary_pct",
        qkv="by_head",
        kv_heads="num_attention_heads",
        live=(("lm_head.", "embed_out."),),
    ),  # fmt: skip
    Family("luthier", _NORMS | _LUTHIER),
)
FAMILIES: Mapping[str, Family] = {alias: row for row in _FAMILIES for alias in (row.name, *row.aliases)}


UNITS: Mapping[str, tuple[str, ...]] = {"attention": ("attn",), "mlp": ("mlp", "moe"), "layer": ()}
"""Anatomical units a method may be shown whole: the beginnings of their tensors' roles, all for a layer."""


def belongs(role: str, layer: int | None, unit: str) -> bool:
    """Whether a tensor is part of its layer's `unit`. What lies outside the layers is part of none."""
    return layer is not None and (not UNITS[unit] or role.partition(".")[0] in UNITS[unit])


def family(name: str, where: str | None = None) -> Family:
    """The row of a family (config.json's `model_type`); LuthierError with all that are known. None is near another:
    a model of one family is not meant to be of the next."""
    if name not in FAMILIES:
        known = f"known: {', '.join(sorted(FAMILIES))}"
        raise LuthierError(f"unknown model family {said(name)}", where=where, do=known)
    return FAMILIES[name]


@cache
def role_of(family_name: str, name: str) -> tuple[str, int | None]:
    """The role of the tensor `name` (as on disk) and its layer, None outside the layers.

    A family without a row here gives "other" with the layer read from the name.
    """
    if _BESIDE.search(name):
        return "other", None
    found = _LAYER.search(name)
    layer = int(found[1]) if found else None
    module, _, kind = _EXPERT.sub(".experts.", name).rpartition(".")
    if kind not in ("weight", "bias"):
        if name.endswith("e_score_correction_bias"):
            return "moe.router.bias", layer
        module, kind = f"{module}.{kind}", "weight"  # a bare parameter, such as fused experts
    parts = FAMILIES[family_name].parts if family_name in FAMILIES else {}
    words = module.split(".")[-_WORDS:]
    for start in range(len(words)):
        role = parts.get(".".join(words[start:]))
        if role:
            return (role if kind == "weight" else f"{role}.bias"), layer
    return "other", layer


def stack_of(name: str) -> str | None:
    """The path of the list of layers that the tensor `name` belongs to, None outside the layers."""
    found = None if _BESIDE.search(name) else _LAYER.search(name)
    return name[: found.start(1) - 1] if found else None


def expert_of(name: str) -> int | None:
    """The index of the expert a tensor on disk belongs to."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the decoder."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def layers_said(config: Mapping[str, Any]) -> Any:
    """What config.json gives for the number of layers, whatever it is."""
    row = FAMILIES.get(config.get("model_type", ""))
    return text_config(config).get(row.layers if row else "num_hidden_layers")


def layers_of(config: Mapping[str, Any]) -> int | None:
    """Number of layers by config.json, None when it does not say."""
    count = layers_said(config)
    return count if isinstance(count, int) and count > 0 else None


class Place(NamedTuple):
    """Where a tensor on disk lies in a live model: elements start … start+prod(shape) of `live`, flat."""

    live: str
    start: int
    shape: tuple[int, ...]


def places(model: Any) -> dict[str, Place]:
    """Name on disk → Place, for every parameter and saved buffer of a live model, tied ones once.

    Where the family fuses experts in memory, gate and up of expert e lie in
    gate_up_proj[e], down in down_proj[e]: contiguous stretches, so nothing is moved.
    """
    row = FAMILIES.get(getattr(model.config, "model_type", ""))
    found: dict[str, Place] = {}
    for live, tensor in _once(model).items():
        stem, _, leaf = live.rpartition(".")
        if row and row.experts and leaf in ("gate_up_proj", "down_proj") and tensor.dim() == 3:
            found.update(_unfuse(_renamed(stem + ".", row), live, tuple(tensor.shape), row.experts))
        else:
            found[_renamed(live, row)] = Place(live, 0, tuple(tensor.shape))
    return found


def _once(model: Any) -> dict[str, Any]:
    """The live state dict without tied doubles, under the first name of each tensor."""
    tied, kept = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in tied:
            tied.add(id(tensor))
            kept[name] = tensor
    return kept


def _renamed(live: str, row: Family | None) -> str:
    for inside, disk in row.live if row else ():
        if live.startswith(inside) or inside.startswith("."):
            live = live.replace(inside, disk)
    return live


def _unfuse(stem: str, live: str, shape: tuple[int, ...], names: tuple[str, str, str]) -> dict[str, Place]:
    gate, up, down = names
    count, rows, columns = shape
    parts = (gate, up) if live.endswith("gate_up_proj") else (down,)
    each = (rows // len(parts), columns)
    return {
        f"{stem}{expert}.{part}.weight": Place(live, (expert * len(parts) + i) * prod(each), each)
        for expert in range(count)
        for i, part in enumerate(parts)
    }


def disk_views(model: Any) -> dict[str, Any]:
    """Name on disk → view into the live model's own memory: writing into it changes the model."""
    live = model.state_dict(keep_vars=True)
    return {
        name: live[at.live].detach().view(-1)[at.start : at.start + prod(at.shape)].view(at.shape)
        for name, at in places(model).items()
    }
