"""How fast a machine works on a recipe's methods, for the minutes of a plan."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import torch

from luthier.errors import LuthierError
from luthier.kit.precision import has_half
from luthier.ledger import Ledger, machine

CPU_RATE = {"fp32": 0.7e11, "bf16": 2e11}
"""floating-point operations a second and core, where nothing was measured: those of a recent server core"""
WIDE = 256
"""width from which on a model's matrices keep a core busy"""
ACCELERATOR_RATE = 2e13


def rate(runs: Path, use: str, device: torch.device, threads: int | None, item: int, width: int = WIDE) -> float:
    """Floating-point operations a second of the method `use`: what it showed beside `runs`, else a round number.

    item: bytes of a number.  width: of the model.
    """
    seen = measured_rate(runs, use, str(device))
    if seen is not None or str(device) != "cpu":
        return seen or ACCELERATOR_RATE
    half = item == 2 and has_half(torch.device("cpu"))
    return CPU_RATE["bf16" if half else "fp32"] * (threads or os.cpu_count() or 1) * min(1.0, width / WIDE)


def measured_rate(runs: Path, use: str, device: str) -> float | None:
    """The median speed of this method in the runs beside this one, on this machine; None if there is none."""
    here, rates = machine(device), []
    for path in sorted(runs.glob("*/ledger.sqlite")):
        try:
            records = Ledger(path.parent).records()
        except LuthierError:
            continue
        rates += [
            r.metrics["flops"] / r.seconds for r in records
            if r.status == "done" and r.use == use and r.metrics.get("flops", 0) > 1e12  # less tells nothing of speed
            and all(r.machine.get(k) == here[k] for k in ("processor", "cores", "device"))
        ]  # fmt: skip
    return statistics.median(rates[-9:]) if rates else None
