"""Plain values as YAML text."""

from __future__ import annotations

import io
from typing import Any


def to_yaml(value: Any) -> str:
    """Maps, lists and scalars as YAML 1.2, inner maps on one line."""
    from ruamel.yaml import YAML

    yaml, out = YAML(), io.StringIO()
    yaml.default_flow_style, yaml.width = None, 110  # type: ignore[assignment]
    yaml.dump(value, out)
    return out.getvalue()
