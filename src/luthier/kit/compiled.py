"""Whether compiled kernels are used: where Numba is installed, and for merges large enough to be worth loading it.

They change no byte of a result (tests/test_compiled.py), only its price.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST, MANY = 1 << 29, 1 << 13
"""Entries of all models together, or tensors, from which on kernels are loaded, which takes about half a second."""
_loaded: list[Any] = []


def many(entries: int, tensors: int, device: torch.device) -> bool:
    """Whether a merge of that many would load them."""
    return (entries >= LEAST or tensors >= MANY) and device.type == "cpu"


@contextmanager
def worth(entries: int, tensors: int, device: torch.device) -> Iterator[None]:
    """Kernels within the block, if there are that many entries or tensors on a CPU and Numba is there."""
    before = _loaded[:]
    if many(entries, tensors, device):
        with suppress(ImportError):  # none installed, or one that does not fit this numpy
            _loaded[:] = [importlib.import_module("luthier.kit.kernels")]
    try:
        yield
    finally:
        _loaded[:] = before


def kernels() -> Any:
    """The module of kernels, or None where torch is to do the work."""
    return _loaded[0] if _loaded else None


def flat(values: Tensor) -> np.ndarray:
    """A contiguous tensor on the CPU as a flat array that shares its memory; bfloat16 as its bits.

    RuntimeError for a tensor that is not contiguous, of which there would be a copy.
    """
    values = values if values.dim() == 1 else values.view(-1)
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def address(values: np.ndarray) -> int:
    """Where a contiguous array lies in memory. RuntimeError for one that is not contiguous."""
    if not values.flags.c_contiguous:
        raise RuntimeError("kernels read contiguous arrays")
    return values.__array_interface__["data"][0]
