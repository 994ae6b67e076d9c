"""Brings a model into the state a training needs: precision, device, equal weights on every process, checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from luthier.engine.ddp import Ranks
from luthier.engine.spec import TrainSpec
from luthier.kit.precision import cast_, working

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.float32}


def ready(model: nn.Module, spec: TrainSpec, ranks: Ranks) -> None:
    """Precision, device and checkpointing; the same weights on every process."""
    cast_(model, DTYPES.get(spec.dtype) or working(next(model.parameters()).dtype, ranks.device))
    model.to(ranks.device)
    ranks.share_(model)
    if spec.checkpointing:
        recompute(model, True)


def recompute(model: Any, on: bool) -> None:
    """Activation checkpointing of a transformers model, under its name before 5.23 or its name since."""
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{word}_checkpointing_disable")()
        model.disable_input_require_grads()  # a hook on the embeddings, which transformers leaves behind
