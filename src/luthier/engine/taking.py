"""What a merge will take, for the plan; `benchmarks/plan.py` holds it to what merges take."""

from __future__ import annotations

from importlib.util import find_spec

from luthier.engine.pieces import Inputs
from luthier.kit.compiled import many
from luthier.kit.select import RANKED
from luthier.shapes import Transform

HELD, FLOOR, KERNELS = 20, 250 << 20, 120 << 20
"""Bytes of an entry of one model that a thread has in hand: as it was read, in fp32, and what a method makes of it and
leaves to whoever asked; bytes of Python and torch, and of compiled kernels."""
ONE_PASS, LOOKS, UNITS, CUBIC = 2.0, 6.0, 20.0, 0.25
"""Rough ns of an entry of one model on one core, all passes together: of a method without a survey, with one, of one
that takes units; and of one of the rows times columns times the lesser of both of `Transform.cubic`."""


def seconds(method: Transform, inputs: Inputs) -> float:
    """Rough seconds of one core, reading and writing included, without what it does with data."""
    matrices = sum(i.numel * min(i.shape[-2:]) for i in inputs.tensors.values() if len(i.shape) > 1)
    each = UNITS if method.granularity == "group" else LOOKS if _looks(method) else ONE_PASS
    return (inputs.count * _models(inputs) * each + matrices * method.cubic(len(inputs.experts)) * CUBIC) / 1e9


def peak(method: Transform, inputs: Inputs) -> int:
    """Bytes held at once, without what it does with data; order statistics have room of their own."""
    kernels = find_spec("numba") and many(inputs.count * _models(inputs), len(inputs.tensors), inputs.device)
    return FLOOR + KERNELS * bool(kernels) + _working(method, inputs)


def beyond(method: Transform, inputs: Inputs, memory: int) -> tuple[str, ...]:
    """What to know where more is held than the user gave: a tensor or unit that a method needs whole."""
    held = _working(method, inputs)
    if held <= memory:
        return ()
    whole = {"group": "the largest unit", "tensor": "the largest tensor"}.get(method.granularity, "one piece")
    need, given = -(-held >> 20), memory >> 20
    return (f"needs {need} MiB to work in, and is given {given}: {method.id} takes {whole} of every model whole",)


def _working(method: Transform, inputs: Inputs) -> int:
    held = max(inputs.held, min(inputs.threads * inputs.held, inputs.most)) * HELD
    ranks = _looks(method) and method.granularity in ("element", "row") and "data*" not in method.roles
    return int(held) + inputs.room * RANKED * ranks


def _looks(method: Transform) -> bool:
    return type(method).survey is not Transform.survey


def _models(inputs: Inputs) -> int:
    return len(inputs.experts) + (inputs.base is not None)
