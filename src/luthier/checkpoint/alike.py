"""Whether models of the same shapes mean the same by them: heads, rotary settings, activations, chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from luthier.checkpoint.anatomy import FAMILIES, text_config
from luthier.errors import LuthierError, said

DOUBTFUL = (
    "rope_scaling", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "sliding_window", "max_position_embeddings",
    "eos_token_id", "num_experts_per_tok", "final_logit_softcapping", "attn_logit_softcapping",
    "query_pre_attn_scalar", "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling",
    "logit_scale",
)  # fmt: skip
"""Settings of which the output can have one only, where models with others may still be merged."""
USUAL_THETA = 10000.0
"""rope_theta where a config.json of most families says nothing."""
MOST = 1 << 20
"""Bytes of a chat template that is looked at."""


def doubts(reference: Any, other: Any) -> tuple[str, ...]:
    """What a reader of the merge should know: settings that differ, of which the output has the reference's.

    LuthierError where the same shapes are split into other heads or pass through another function.
    """
    must_be_dense(other)
    mine, theirs = (_settings(getattr(source, "config", None) or {}) for source in (reference, other))
    if not mine or not theirs or reference is other:
        return ()
    where = str(getattr(other, "path", "expert"))
    for key in ("attention heads", "key-value heads", "entries a head", "activation", "rotary share"):
        a, b = mine[key], theirs[key]
        if a is not None and b is not None and a != b:
            raise LuthierError(f"has {key} {b}, {_name(reference)} has {a}", where=where,
                               do="merge models of one architecture")  # fmt: skip
    found = [
        f"{_name(other)}: {key} is {said(theirs[key], 60)}, the output has {said(mine[key], 60)}"
        for key in ("model_type", "rope_theta", *DOUBTFUL)
        if mine[key] != theirs[key] and not (key == "rope_theta" and {mine[key], theirs[key]} == {None, USUAL_THETA})
    ]
    ours, others = _dtype(reference), _dtype(other)
    if ours and others and torch.promote_types(ours, others) != ours:
        kinds = [str(kind).removeprefix("torch.") for kind in (others, ours)]
        found.append(f"{_name(other)}: weights are {kinds[0]}, the output's {kinds[1]} unless a dtype is given")
    first, second = _template(reference), _template(other)
    if first and second and first != second:
        found.append(f"{_name(other)}: the chat template is another one, the output has that of {_name(reference)}")
    elif second and not first:
        found.append(f"{_name(other)}: has a chat template, {_name(reference)} none, nor has the output")
    return tuple(found)


def must_be_dense(source: Any) -> None:
    """LuthierError for quantized weights, which are no numbers to compute with."""
    if "quantization_config" in (getattr(source, "config", None) or {}):
        where = str(getattr(source, "path", "the model"))
        raise LuthierError("the weights are quantized", where=where, do="use the model's dense checkpoint")


def _dtype(source: Any) -> torch.dtype | None:
    """Of its first floats."""
    every = (info.dtype for info in getattr(source, "tensors", {}).values())
    return next((kind for kind in every if kind.is_floating_point), None)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config.json decides the meaning of its weights, whatever the family calls it."""
    inner = text_config(config)
    if not inner:
        return {}
    row = FAMILIES.get(config.get("model_type", ""))
    heads = inner.get(row.heads if row else "num_attention_heads")
    width = inner.get(row.hidden if row else "hidden_size")
    whole = isinstance(heads, int) and isinstance(width, int) and heads > 0
    rotary = inner.get("rope_parameters") or {}
    rotary = rotary if isinstance(rotary, Mapping) else {}
    told = inner.get("rope_scaling") or rotary  # transformers 4 and 5
    told = told if isinstance(told, Mapping) else {"rope_type": told}
    scaling = {"rope_type" if k == "type" else k: v for k, v in told.items()
               if k not in ("rope_theta", "partial_rotary_factor")}  # fmt: skip
    scaling = scaling if scaling.get("rope_type", "default") != "default" else None
    made = {
        "model_type": config.get("model_type"),
        "attention heads": heads,
        "key-value heads": inner.get(row.kv_heads if row else "num_key_value_heads", heads),
        "entries a head": inner.get("head_dim") or (width // heads if whole else None),  # type: ignore[operator]
        "activation": inner.get("hidden_act") or inner.get("hidden_activation") or inner.get("activation_function"),
        "rotary share": inner.get("partial_rotary_factor", rotary.get("partial_rotary_factor")),
        "rope_theta": inner.get("rope_theta", rotary.get("rope_theta")),
    }
    return made | {key: inner.get(key) for key in DOUBTFUL} | {"rope_scaling": scaling}


def _template(source: Any) -> str | None:
    """The chat template in a model's folder."""
    folder = Path(getattr(source, "path", ""))
    try:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")[:MOST]
        file = folder / "tokenizer_config.json"
        if not file.is_file() or file.stat().st_size > 64 * MOST:
            return None
        found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    return found if isinstance(found, str) else json.dumps(found) if found else None


def _name(source: Any) -> str:
    return Path(getattr(source, "path", "expert")).name
