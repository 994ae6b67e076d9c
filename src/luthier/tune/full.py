"""Full tuning: every chosen parameter moves, itself, in its own precision.

Paper: none (the plain baseline).
Footguns: a copy of the chosen parameters as they were is kept in host memory, so that `delta` can be
told and reverted; a model in bfloat16 is stepped in bfloat16, where steps below 1/256 of a weight are
lost: train in fp32 or mixed precision if the learning rate is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from luthier.checkpoint.anatomy import disk_views, places
from luthier.checkpoint.delta import Delta
from luthier.checkpoint.roles import live_roles
from luthier.errors import LuthierError
from luthier.flows import Ctx, Remap
from luthier.kit.sparse import matching
from luthier.shapes import Reduces, Tune, Tuned


class Whole(Tuned):
    """A model whose parameters `weights` train as they are; the others are frozen until `bake`."""

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter]):
        self.model, self.weights = model, weights
        self._required = {p: p.requires_grad for p in model.parameters()}
        self._before = {name: p.to("cpu", copy=True) for name, p in self._on_disk().items()}
        chosen = set(weights.values())
        for p in model.parameters():
            p.requires_grad_(p in chosen)

    def leaves(self) -> list[Tensor]:
        return list(self.weights.values())

    def after_step(self, step: int) -> Sequence[Remap]:
        return ()

    def _on_disk(self) -> dict[str, Tensor]:
        """The chosen parameters' memory under the names they have on disk."""
        spots = places(self.model)
        return {name: view for name, view in disk_views(self.model).items() if spots[name].live in self.weights}

    def delta(self) -> Delta:
        now = self._on_disk()  # in the dtype of the result, which a training in a wider one started from
        return Delta.between({name: t.to(now[name].dtype) for name, t in self._before.items()}, now)

    def bake(self) -> nn.Module:
        for p, required in self._required.items():
            p.requires_grad_(required)
            p.grad = None
        return self.model

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.weights.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != set(self.weights):
            raise LuthierError("the saved weights are not of this model and these targets", where="tune.full")
        for name, p in self.weights.items():
            p.copy_(state[name])


class Full(Tune):
    targets: tuple[str, ...] = ("*",)
    """what moves: globs of parameter names or of roles, or the word linear (every matrix inside the blocks)"""
    reduces_to = Reduces({}, "plain training")

    def bind(self, model: nn.Module, ctx: Ctx) -> Whole:
        return Whole(model, matching(model, self.targets, live_roles(model), axes=1))
