"""Luthier: published ways to shape a language model's weights, one file each, checked against their papers."""

from __future__ import annotations

from typing import Any

from luthier.errors import LuthierError

__version__ = "0.1.0"
__all__ = ["LuthierError", "__version__", "load", "run"]


def load(id: str, **fields: Any) -> Any:
    """The method with this id and these fields: `luthier.load("merge.ties", density=0.2)`."""
    from luthier.catalogue import load as _load

    return _load(id, **fields)


def run(recipe: Any, **options: Any) -> Any:
    """Run a recipe: the name of a shipped one, a path, or a map in the recipe grammar."""
    from luthier.recipe_run import run as _run

    return _run(recipe, **options)
