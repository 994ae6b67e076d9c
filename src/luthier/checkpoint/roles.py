"""A live model's parameters by role, for methods that choose what to train; its layers, for those that look inside;
where the tensors of a checkpoint lie in it, for those that measure what they then merge."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from luthier.checkpoint.anatomy import OUTER, Place, places, role_of, stack_of
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


def live_places(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """Name on disk → where it lies in the live model, for those of `names` that do.

    A tied tensor that is stored twice lies twice in the same place; checkpoints saved without their outermost
    prefix are understood.
    """
    live = model.state_dict(keep_vars=True)
    firsts: dict[int, str] = {}
    first = {name: firsts.setdefault(id(tensor), name) for name, tensor in live.items()}
    there = places(model)
    of_live = {place.live: place for place in there.values()}
    found = {}
    for name in names:
        for one in (name, *(prefix + name for prefix in OUTER), *(name.removeprefix(prefix) for prefix in OUTER)):
            place = there.get(one) or of_live.get(first.get(one, ""))
            if place:
                found[name] = place
                break
    return found
