"""Trains small networks of our own, whose batches are drawn anew for every step, by the trainer of language models.

A stream that is a function of the step alone, and the network's own loss, stand in the places of rows of tokens and an
objective; the rest is `engine.trainer`: clipping, saving, resuming exact to the byte. One process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from luthier import catalogue
from luthier.engine.spec import TrainSpec
from luthier.engine.trainer import train_on
from luthier.flows import Ctx, Loss, Remap
from luthier.kit.context import Context
from luthier.shapes import Tuned

SAVE_EVERY, LOG_EVERY = 200, 100
"""steps"""
BETAS = (0.9, 0.98)


class Training(Protocol):
    """What is trained. fit: steps, lr, warmup (a share of them), decay."""

    @property
    def fit(self) -> Any: ...

    def network(self) -> nn.Module:
        """With initial weights."""
        ...

    def batch(self, step: int) -> dict[str, Tensor]:
        """Of a step, from 0; `attention_mask` says what is no padding."""
        ...

    def loss(self, network: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """A scalar."""
        ...


def fitted(training: Training, about: Mapping[str, Any], ctx: Context, folder: Path | None) -> dict[str, Tensor]:
    """Trained weights by name, on the CPU. about: plain values that tell this training from others.

    folder: for saves, from the newest of which a killed training goes on; None keeps none.
    Raises and reports what `engine.trainer.train` does.
    """
    fit, network = training.fit, training.network()
    spec = TrainSpec(steps=fit.steps, lr=fit.lr, schedule="cosine", warmup=fit.warmup, dtype="fp32", batch=1,
                     log_every=LOG_EVERY, save_every=SAVE_EVERY if folder else None)  # fmt: skip
    tune: Any = _All()
    objective: Any = _Objective(training)
    optim: Any = catalogue.load("optim.adamw", betas=BETAS, weight_decay=fit.decay)
    with tempfile.TemporaryDirectory() as spare:
        place = folder or Path(spare)
        train_on(network, lambda ranks: _Drawn(training), dict(about), tune, objective, optim, spec, ctx, place)
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


@dataclass
class _Drawn:
    training: Training
    items: int = 0

    def stream(self, start: int) -> Generator[list[dict[str, Tensor]], None, None]:
        yield from ([self.training.batch(step)] for step in count(start))


@dataclass
class _Objective:
    training: Training

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], ctx: Ctx) -> Loss:
        return Loss(self.training.loss(model, batch))

    def to_dict(self) -> dict[str, Any]:
        return {}


class _All:
    """All parameters move; no architecture of a language model is asked for, as `tune.full` does."""

    def bind(self, model: nn.Module, ctx: Ctx) -> _Parameters:
        return _Parameters(model)

    def to_dict(self) -> dict[str, Any]:
        return {}


class _Parameters(Tuned):
    def __init__(self, model: nn.Module):
        self.model = model

    def leaves(self) -> list[Tensor]:
        return list(self.model.parameters())

    def after_step(self, step: int) -> Sequence[Remap]:
        return ()

    def delta(self) -> None:
        return None

    def bake(self) -> nn.Module:
        return self.model

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(state[name])
