"""Whether models of the same shapes mean the same by them: heads, rotary settings, activations, chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.checkpoint.anatomy import FAMILIES, text_config
from luthier.errors import LuthierError, said

DOUBTFUL = ("rope_scaling", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "sliding_window")
"""Settings of which the output can have one only, where models with others may still be merged."""
MOST = 1 << 20
"""Bytes of a chat template that is looked at."""


def doubts(reference: Any, other: Any) -> tuple[str, ...]:
    """What a reader of the merge should know: settings that differ, of which the output has the reference's.

    LuthierError where the same shapes are split into other heads or pass through another function.
    """
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
        for key in ("rope_theta", *DOUBTFUL)
        if mine[key] != theirs[key]
    ]
    templates = [_template(source) for source in (reference, other)]
    if all(templates) and templates[0] != templates[1]:
        found.append(f"{_name(other)}: the chat template is another one, the output has that of {_name(reference)}")
    return tuple(found)


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
    kinds = {k: v for k, v in rotary.items() if k not in ("rope_theta", "partial_rotary_factor")}
    scaling = inner.get("rope_scaling") or (kinds if kinds.get("rope_type", "default") != "default" else None)
    made = {
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
