"""What a model computes for one token, counted from the matrix products it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def training_flops(model: nn.Module, length: int) -> float:
    """Floating-point operations a token in training all of the model: three times those of the products in
    one forward pass over a row of `length` tokens. Experts that a token does not use are not in it; on CPUs
    attention's core is left out, which torch does not count there."""
    whole: Any = model
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    ids = torch.arange(length, device=device)[None] % whole.config.get_text_config().vocab_size
    with FlopCounterMode(display=False) as counted:
        whole(input_ids=ids, use_cache=False)
    model.train(was_training)
    return 3.0 * counted.get_total_flops() / length
