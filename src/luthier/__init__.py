"""Luthier: published ways to shape a language model's weights, one file each, checked against their papers."""

from __future__ import annotations

from typing import Any

from luthier.errors import LuthierError

__version__ = "0.1.0"
__all__ = ["LuthierError", "__version__", "certify", "load", "lower_bound", "run"]


def load(id: str, **fields: Any) -> Any:
    """The method with this id and these fields: `luthier.load("merge.ties", density=0.2)`."""
    from luthier.catalogue import load as _load

    return _load(id, **fields)


def run(recipe: Any, **options: Any) -> Any:
    """Run a recipe: the name of a shipped one, a path, or a map in the recipe grammar."""
    from luthier.recipe_run import run as _run

    return _run(recipe, **options)


def certify(p: Any, nonneg: Any = (), zero: Any = (), **fields: Any) -> Any:
    """A certificate that p >= 0 where all `nonneg` are >= 0 and all `zero` are 0, or why there is none.

    p and the constraints: text such as "x^4 - x*y + 1/3", SymPy, {(2, 0): 1}, a NumPy array of coefficients, or a
    pair (exponents, coefficients). fields: those of `sos.certify`.
    """
    from luthier.engine.certify import certify as _certify

    return _certify(p, nonneg, zero, **fields)


def lower_bound(p: Any, nonneg: Any = (), zero: Any = (), **fields: Any) -> Any:
    """The certificate of the largest lower bound of p that is found: its `bound`, a fraction as text."""
    from luthier.engine.certify import lower_bound as _lower_bound

    return _lower_bound(p, nonneg, zero, **fields)
