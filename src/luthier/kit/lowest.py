"""Longer descents than `kit.descent` takes, from keyed starts near and far: where p is negative in a small place.

Ends are rounded to few binary places, and p is evaluated there in fractions.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from luthier.kit.descent import Floats, Point
from luthier.kit.polynomial import Polynomial

if TYPE_CHECKING:
    import torch

STARTS, LEAST, MOST_WORK, BITS = 12, 5, 200_000_000, (0, 1, 2, 3, 5, 8, 12, 20, 30, 40)
"""How many descents, of at least how many steps, the powers they may take together, and the binary places their ends
are rounded to."""


def lowest(p: Polynomial, rng: torch.Generator) -> Point | None:
    """A rational point at which p is negative, near the end of some descent; None if none ends below 0."""
    import torch
    from scipy.optimize import minimize

    unit = max(abs(c) for _, c in p.terms)
    floats = Floats(Polynomial(p.variables, tuple((m, c / unit) for m, c in p.terms)))
    steps = min(200, MOST_WORK // (floats.powers.size * (1 + len(p.variables)) * STARTS))
    if steps < LEAST:
        return None
    spread = 2.0 ** torch.linspace(-2, 2, STARTS)[:, None]
    for start in (spread * torch.randn(STARTS, len(p.variables), generator=rng)).double().numpy():
        with np.errstate(all="ignore"):
            found = minimize(_cut, start, (floats,), method="L-BFGS-B", jac=True, options={"maxiter": steps})
        if np.isfinite(found.x).all() and found.fun < 0:
            for bits in BITS:
                place = tuple(Fraction(round(float(v) * 2**bits), 2**bits) for v in found.x)
                if p.at(place) < 0:
                    return place
    return None


def _cut(x: np.ndarray, floats: Floats) -> tuple[float, np.ndarray]:
    """p and its slope in floats; a descent without end is cut off."""
    value, slope = floats.at(x)
    return (value, slope) if abs(value) < 1e60 else (-1e60, np.zeros(len(x)))
