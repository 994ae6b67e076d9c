"""What ways of decoding share: prompts as token ids, the tokens that end a text, drawing, a limit to set.

B: rows.  V: words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.shapes import Decode


def rows_of(prompts: Sequence[Any], tokenizer: Any, where: str) -> list[list[int]]:
    """Token ids of prompts that are texts or ids."""
    ids = [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else [int(t) for t in p] for p in prompts]
    if not all(ids):
        raise LuthierError("a prompt has no tokens", where=where, do="give at least one word")
    return ids


def end_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a text, by the model's generation config and the tokenizer."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return {i for i in (*named, getattr(tokenizer, "eos_token_id", None)) if i is not None}


def draw(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """For each row the first token whose cumulative probability exceeds u times the total."""
    cumulative_BV = p_BV.double().cumsum(-1)
    total_B = cumulative_BV[:, -1]
    below_B = torch.nextafter(total_B, torch.zeros_like(total_B))  # u below 1 may round to all of it
    aim_B1 = torch.minimum(u_B.double() * total_B, below_B)[:, None]
    return torch.searchsorted(cumulative_BV, aim_B1, right=True).clamp(max=p_BV.shape[-1] - 1)[:, 0]


def limited(decode: Decode, max_new_tokens: int) -> Decode:
    """The decoder with another limit of new tokens; where a host does the decoding, its host's."""
    fields = {f.name: getattr(decode, f.name) for f in dataclasses.fields(decode)}  # type: ignore[arg-type]
    if "max_new_tokens" in fields:
        return decode.replace(max_new_tokens=max_new_tokens)
    hosts = {name: limited(value, max_new_tokens) for name, value in fields.items() if isinstance(value, Decode)}
    if not hosts:
        raise LuthierError(f"{decode.id} has no max_new_tokens", do="choose another way of decoding")
    return decode.replace(**hosts)
