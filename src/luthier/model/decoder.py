"""The decoder: a transformers model whose slots are filled by Parts.

What it is to transformers: a PreTrainedModel with generation, cache, masks (left padding too), labels,
`logits_to_keep`, activation checkpointing, construction on the meta device, `torch.compile`. What it
adds: `aux`, the summed losses and metrics of its parts, on both outputs. Attention runs through torch's
scaled_dot_product_attention alone.
Shapes: B sequences, T positions of this pass, D channels, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from luthier.errors import LuthierError
from luthier.kit.parts import Aux, Pass, aux_loss
from luthier.model.config import LuthierConfig
from luthier.model.spec import Spec


@dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """transformers' output and the parts' aux."""

    aux: Any = None


@dataclass
class CausalOutput(CausalLMOutputWithPast):
    """transformers' output and the parts' aux; `loss` has the aux losses in it."""

    aux: Any = None


class LuthierPreTrainedModel(PreTrainedModel):
    """What the decoder with and without head share."""

    config: LuthierConfig
    config_class = LuthierConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]
    _no_split_modules = ["PlainLayer"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for name, tensor in own_tensors(module):
            value = initial_value(module, name)
            if value is None:
                init.normal_(tensor, mean=0.0, std=self.config.initializer_range)
            else:
                init.constant_(tensor, value)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Which names hold the same tensor: the head and the embedding, and modules that layers share."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return self._find_ties()

    def _find_ties(self) -> dict[str, str]:
        first: dict[int, str] = {}
        ties: dict[str, str] = {}
        for tensors in (self.named_parameters, self.named_buffers):
            for name, tensor in tensors(remove_duplicate=False):
                if first.setdefault(id(tensor), name) != name:
                    ties[name] = first[id(tensor)]
        return ties


class LuthierModel(LuthierPreTrainedModel):
    """Embedding, stack and last norm: everything but the head."""

    def __init__(self, config: LuthierConfig):
        super().__init__(config)
        spec = Spec(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = spec.part("stack")
        self.norm = spec.part("norm")
        self.looks_ahead = any(getattr(module, "causal", True) is False for module in self.modules())
        self.gradient_checkpointing = False
        self._tied_weights_keys = self._find_ties()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states after the last norm, (B, T, D), and `aux`. Arguments as in every transformers model."""
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.looks_ahead and (use_cache or past_key_values is not None):
            raise LuthierError("a model that looks both ways keeps no cache", do="decode it by decode.masked_diffusion")
        use_cache = self.config.use_cache and not self.looks_ahead if use_cache is None else use_cache
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cache = past_key_values if use_cache else None
        trail: list[Tensor] = []
        at = self._pass(x_BTD, attention_mask, position_ids, cache, trail)
        x_BTD, aux = self.layers(x_BTD, at)
        x_BTD, _ = self.norm(x_BTD, at)
        if self.training:
            for module in self.modules():
                observe: Any = getattr(module, "observe", None)
                if observe:
                    observe({name: value.detach() for name, value in aux.items()})
        states = (*trail, x_BTD) if output_hidden_states else None
        out = DecoderOutput(last_hidden_state=x_BTD, past_key_values=cache, hidden_states=states, aux=aux)
        return out.to_tuple() if return_dict is False else out

    def _pass(
        self, x_BTD: Tensor, attention_mask: Tensor | None, positions: Tensor | None, cache: Any, trail: list[Tensor]
    ) -> Pass:
        """The facts that all layers share."""
        tokens, seen = x_BTD.shape[1], cache.get_seq_length() if cache is not None else 0
        places_BT = (torch.arange(tokens, device=x_BTD.device) + seen)[None] if positions is None else positions
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x_BTD, attention_mask=attention_mask, past_key_values=cache,
            position_ids=places_BT,
        )  # fmt: skip
        both = create_bidirectional_mask(self.config, x_BTD, attention_mask) if self.looks_ahead else None
        keep_BT = None
        if attention_mask is not None and attention_mask.dim() == 2:
            keep_BT = attention_mask[:, -tokens:].bool()

        def run(layer: nn.Module, y_BTD: Tensor, at: Pass) -> tuple[Tensor, Aux]:
            trail.append(y_BTD)
            return self._checkpointed(layer, y_BTD, at)

        return Pass(positions_BT=places_BT, mask=mask, both=both, keep_BT=keep_BT, cache=cache, run=run)

    def _checkpointed(self, layer: nn.Module, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Aux]:
        if not (self.gradient_checkpointing and self.training):
            return layer(x_BTD, at)
        names: list[str] = []

        def flat(y_BTD: Tensor) -> tuple[Tensor, ...]:
            # reentrant checkpointing carries gradients only through tensors of a flat tuple
            y_BTD, aux = layer(y_BTD, at)
            names[:] = aux
            return y_BTD, *aux.values()

        y_BTD, *values = self._gradient_checkpointing_func(flat, x_BTD)
        return y_BTD, dict(zip(names, values, strict=True))


class LuthierForCausalLM(LuthierPreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    def __init__(self, config: LuthierConfig):
        super().__init__(config)
        self.model = LuthierModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Spec(config).linear(config.hidden_size, config.vocab_size, slot="head")
        if config.tie_word_embeddings:
            if not isinstance(self.lm_head, nn.Linear):
                raise LuthierError(
                    "a head of its own cannot be tied", where="slots.head", do="set tie_word_embeddings: false"
                )
            self.lm_head.weight = self.model.embed_tokens.weight
        self._tied_weights_keys = self._find_ties()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, T, V) at the last `logits_to_keep` positions (0: all) or at those it lists; with
        `labels` (shifted here, -100 is no label) also the loss, aux losses added."""
        body = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(body.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = loss + aux_loss(body.aux)
        out = CausalOutput(
            loss=loss, logits=logits_BTV, past_key_values=body.past_key_values, hidden_states=body.hidden_states,
            aux=body.aux,
        )  # fmt: skip
        return out.to_tuple() if return_dict is False else out


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The module's own parameters and buffers, without those of its children."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def initial_value(module: nn.Module, name: str) -> float | None:
    """The constant the tensor starts from, None where it is drawn from a normal distribution."""
    if name == "bias" and isinstance(module, nn.Linear):
        return 0.0
    return getattr(module, "initial", {}).get(name)
