"""A new decoder with keyed initial weights: each tensor's values depend on the seed and its name alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from luthier.kit.context import Context
from luthier.model.config import LuthierConfig, config_from
from luthier.model.decoder import LuthierForCausalLM, initial_value, own_tensors


def build_model(config: Mapping[str, Any] | LuthierConfig, seed: int = 0) -> LuthierForCausalLM:
    """A decoder in fp32 on the CPU, in training mode.

    config: a LuthierConfig or a map of its fields.  Raises LuthierError for what does not fit.
    """
    config = config if isinstance(config, LuthierConfig) else config_from(config)
    with no_init_weights():
        model = LuthierForCausalLM(config)
    init_weights(model, seed, config.initializer_range)
    return model.train()


@torch.no_grad()
def init_weights(module: nn.Module, seed: int, std: float = 0.02) -> None:
    """Fill every parameter and buffer: the constants that modules name, elsewhere N(0, std^2), keyed by
    (seed, name). Adding or dropping a layer leaves the others' values as they were."""
    ctx = Context(seed=seed, step="init")
    done: set[int] = set()
    for path, part in module.named_modules():
        for name, tensor in own_tensors(part):
            if id(tensor) in done or not tensor.is_floating_point():
                continue
            done.add(id(tensor))
            value = initial_value(part, name)
            if value is None:
                draw = torch.empty(tensor.shape).normal_(0.0, std, generator=ctx.rng(f"{path}.{name}"))
                tensor.copy_(draw)
            else:
                tensor.fill_(value)
