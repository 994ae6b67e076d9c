"""What decides the numbers of a training, so that a save is resumed by its own run and by no other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.engine.spec import TrainSpec
from luthier.errors import LuthierError
from luthier.flows import Data
from luthier.kit.context import Context

FREE = ("batch", "accumulate", "save_every", "keep", "log_every", "checkpointing", "workers")
"""fields that may differ between a save and the run that resumes it (the sequences of a step may not)"""


def described(data: Sequence[Data]) -> list[Any]:
    """What tells data from others: a sample of the items."""
    return [[d.name, len(d.train), *(d.train[i].id for i in (0, -1) if len(d.train))] for d in data]


def settings(
    model: nn.Module, data: Any, methods: Mapping[str, Any], spec: TrainSpec, ctx: Context, world: int
) -> dict[str, Any]:
    """Every setting by name, in plain values. The model enters by a sample of its content.  data: plain values."""
    values = {name: value for name, value in spec.to_dict().items() if name not in FREE}
    values |= {"sequences of a step": spec.sequences(world), "seed": ctx.seed, "step": ctx.step}
    values |= {name: method.to_dict() for name, method in methods.items()}
    values["data"] = data
    values["model"] = sample(model)
    return values


def must_match(then: Mapping[str, Any], now: Mapping[str, Any], place: Path) -> None:
    """LuthierError naming the first setting in which the save at `place` differs."""
    for name, value in now.items():
        if then.get(name) != value:
            raise LuthierError(
                f"saved by a run with another {name} ({then.get(name)!r}, now {value!r})",
                where=str(place),
                do="use another folder, or remove this one",
            )


def sample(model: nn.Module) -> str:
    """A hash over names, shapes and about 64 entries of each parameter: told in an instant."""
    hashed = hashlib.sha256()
    for name, p in model.named_parameters():
        some = p.detach().reshape(-1)[:: max(1, p.numel() // 64)].cpu().contiguous()
        hashed.update(f"{name}{tuple(p.shape)}".encode())
        hashed.update(some.view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]
