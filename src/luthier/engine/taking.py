"""How long a merge will take, for the plan: `benchmarks/plan.py` holds these numbers to what merges take."""

from __future__ import annotations

from luthier.engine.pieces import Inputs
from luthier.shapes import Transform

ONE_PASS, LOOKS, UNITS, CUBIC = 2.0, 6.0, 20.0, 0.25
"""Rough ns of an entry of one model on one core, all passes together: of a method without a survey, with one, of one
that takes units; and of one of the rows times columns times the lesser of both of `Transform.cubic`."""


def seconds(method: Transform, inputs: Inputs, experts: int) -> float:
    """Rough seconds of one core, reading and writing included, without what it does with data."""
    matrices = sum(i.numel * min(i.shape[-2:]) for i in inputs.tensors.values() if len(i.shape) > 1)
    each = UNITS if method.granularity == "group" else ONE_PASS if type(method).survey is Transform.survey else LOOKS
    models = experts + (inputs.base is not None)
    return (inputs.count * models * each + matrices * method.cubic(experts) * CUBIC) / 1e9
