"""Which arithmetic a machine is good at."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)


@cache
def has_half(device: torch.device) -> bool:
    """Whether the device computes in 16 bits itself. A CPU without such units takes some 4 times longer in
    bf16 than in fp32."""
    if device.type != "cpu":
        return True
    tell: Any = getattr(torch.cpu, "get_capabilities", None)
    return tell is None or any(value is True and "bf16" in name for name, value in tell().items())


def working(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in where none is asked for: as stored, but fp32 where 16 bits are only emulated."""
    return torch.float32 if stored in HALF and not has_half(device) else stored


@torch.no_grad()
def cast_(model: nn.Module, dtype: torch.dtype) -> Any:
    """Change the floating-point parameters' dtype in place. Buffers stay: rotary frequencies in bf16 spoil logits."""
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    return model
