"""The roles of a live model's parameters, for methods that choose what to train by role."""

from __future__ import annotations

from typing import Any

from luthier.checkpoint.anatomy import places, role_of


def live_roles(model: Any) -> dict[str, tuple[str, ...]]:
    """Live parameter name → its roles; more than one where a family fuses tensors in memory."""
    family = getattr(model.config, "model_type", "")
    found: dict[str, tuple[str, ...]] = {}
    for disk, at in places(model).items():
        role = role_of(family, disk)[0]
        if role not in found.get(at.live, ()):
            found[at.live] = (*found.get(at.live, ()), role)
    return found
