"""Logits of a causal language model at chosen places only, and what its routers cost.

B: sequences.  T: positions.  D: channels.  N: places that have a label.  V: words.
At a vocabulary of 49k the head is a large share of a step: only the N labelled places pay for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.kit.encode import IGNORE
from luthier.kit.parts import aux_loss

AT_ONCE = 2**26
"""Logits alive at once by default: 256 MiB in fp32."""

_PLAIN = frozenset({
    "deepseek_v2", "deepseek_v3", "gemma", "gpt2", "gpt_neox", "llama", "luthier", "mistral", "mixtral", "olmo",
    "olmo2", "olmoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
})  # fmt: skip
_SOFTCAPPED = frozenset({"gemma2", "gemma3_text"})


class Labelled(NamedTuple):
    """h_ND: hidden states at the places before a label; y_N: the labels; head: h_ND → logits (N, V);
    router: the model's own auxiliary loss, coefficients included, or None if it has none."""

    h_ND: Tensor
    y_N: Tensor
    head: Callable[[Tensor], Tensor]
    router: Tensor | None


def labelled(model: Any, batch: Mapping[str, Tensor], router: bool = False) -> Labelled:
    """One pass of the model over a batch (input_ids, attention_mask, labels; position_ids if there), with
    what is needed to compute logits at labelled places.

    Families outside the tables above may treat logits in ways of their own: there the whole model runs
    and `head` is the identity on logits already chosen; slower, never different.
    """
    states_BTD, head, aux = states(model, batch, router)
    target_BT = batch["labels"][:, 1:]
    keep_BT = target_BT != IGNORE
    if "attention_mask" in batch:  # nothing is predicted from padding, whichever side it is on
        keep_BT = keep_BT & batch["attention_mask"][:, :-1].bool()
    return Labelled(states_BTD[:, :-1][keep_BT], target_BT[keep_BT], head, aux)


def states(
    model: Any, batch: Mapping[str, Tensor], router: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor | None]:
    """One pass of the model: what its head takes at every place, the head, and the model's auxiliary loss."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    weigh = router and bool(getattr(model.config, "router_aux_loss_coef", 0.0))
    extra = {"output_router_logits": True} if weigh else {}
    head = head_of(model)
    body = (model.base_model if head else model)(**inputs, **extra, use_cache=False, return_dict=True)
    states_BTD = body.last_hidden_state if head else body.logits
    aux = _router_loss(model, body, batch.get("attention_mask"), weigh) if router else None
    return states_BTD, head or nn.Identity(), aux


def summed(part: Callable[..., Tensor], size: int, *rows: Tensor) -> Tensor:
    """`part` over all rows, summed; beyond `size` of them in stretches, which the backward pass recomputes."""
    if len(rows[0]) <= size:
        return part(*rows)
    pieces = zip(*(r.split(size) for r in rows), strict=True)
    parts: list[Any] = [checkpoint(part, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(parts).sum()


def head_of(model: Any) -> Callable[[Tensor], Tensor] | None:
    """Hidden states → logits as the model's own forward has them, or None for families not known here."""
    family = getattr(model.config, "model_type", "")
    if family in _PLAIN:
        return model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if family in _SOFTCAPPED:
        return _softcapped(model.get_output_embeddings(), cap) if cap else model.get_output_embeddings()
    return None


def _softcapped(linear: nn.Module, cap: float) -> Callable[[Tensor], Tensor]:
    return lambda h_ND: torch.tanh(linear(h_ND) / cap) * cap


def _router_loss(model: Any, body: Any, attention_mask: Tensor | None, weigh: bool) -> Tensor | None:
    """The sum of our decoder's aux losses, or the balance loss of the model's family times its coefficient."""
    own = aux_loss(getattr(body, "aux", None))
    if isinstance(own, Tensor):
        return own
    balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if not weigh or balance is None:
        return None
    config = model.config
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    loss = balance(body.router_logits, experts, config.num_experts_per_tok, attention_mask)
    return config.router_aux_loss_coef * loss
