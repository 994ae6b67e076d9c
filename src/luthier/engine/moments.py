"""The state of a torch optimizer as a plain tree: saved, put back, and moved with its leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from luthier.flows import Remap


def remap(optimizer: Optimizer, remaps: Sequence[Remap]) -> None:
    """Move the optimizer's state where entries of leaves have moved; entries that are new begin at zero."""
    for moved in remaps:
        state = optimizer.state[moved.leaf]
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == moved.leaf.shape:
                source = moved.source.to(value.device)
                state[name] = torch.where(source >= 0, value[source.clamp(min=0)], torch.zeros_like(value))


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state of every parameter in the order of the groups, and what the groups hold besides."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "state": [dict(optimizer.state.get(p, {})) for p in params],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
    }


def load_optimizer(optimizer: Optimizer, tree: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` gave. Unlike `load_state_dict` it never changes a dtype."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, state in zip(params, tree["state"], strict=True):
        if state:
            optimizer.state[param] = state
    for group, values in zip(optimizer.param_groups, tree["groups"], strict=True):
        group.update(values)
