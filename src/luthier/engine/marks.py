"""What config.json says of a model's weights, once something else than its author has changed them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from luthier.protect.mergelock import ENTRY


def still_true(config: Mapping[str, Any], sources: Iterable[Any], by: str) -> dict[str, Any]:
    """The config that `by` makes of its sources. A lock's entry that it took over says that its key no longer fits:
    secrets follow the places of layers, and what is mixed or cut is undone by no key."""
    entry = config.get(ENTRY)
    if not entry or all(getattr(s, "config", {}).get(ENTRY) != entry for s in sources):
        return dict(config)
    return {**config, ENTRY: {**entry, "key": f"{entry['key']}, and {by} has changed its weights since"}}
