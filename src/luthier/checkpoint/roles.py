"""A live model's parameters by role, for methods that choose what to train; its layers, for those that look inside."""

from __future__ import annotations

from typing import Any

from torch import nn

from luthier.checkpoint.anatomy import places, role_of, stack_of
from luthier.errors import LuthierError


def live_roles(model: Any) -> dict[str, tuple[str, ...]]:
    """Live parameter name → its roles; more than one where a family fuses tensors in memory."""
    family = getattr(model.config, "model_type", "")
    found: dict[str, tuple[str, ...]] = {}
    for disk, at in places(model).items():
        role = role_of(family, disk)[0]
        if role not in found.get(at.live, ()):
            found[at.live] = (*found.get(at.live, ()), role)
    return found


def live_layers(model: Any) -> list[nn.Module]:
    """The decoder's layers in order, whatever the family calls them; a layer used twice stands there twice.

    Raises LuthierError for a model whose layers are no list.
    """
    for name, _ in model.named_parameters(remove_duplicate=False):
        path = stack_of(name)
        stack = model.get_submodule(path) if path else None
        if isinstance(stack, nn.ModuleList):
            return list(stack)
    raise LuthierError(f"{type(model).__name__} has no list of layers", do="use a decoder made of equal layers")
