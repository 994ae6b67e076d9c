"""What the memory of a proof will be, before it is tried, and what is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def size_of_proof(problem: Any, method: Any) -> tuple[float, int]:
    """Operations and bytes that a certificate may take: those of the program the method would start from."""
    from luthier.kit import cones, gram, moments, putinar
    from luthier.kit.polynomial import Polynomial
    from luthier.kit.problem import problem as read

    asked = read(problem)
    p = asked.polynomial
    support = dict.fromkeys(p.support, cones.ONE)
    if asked.constrained:
        degree = putinar.degrees(asked, getattr(method, "degree", None), 0)[0]
        whole = putinar.program(asked, degree, getattr(method, "products", False))
    else:
        if support and getattr(method, "ask", None) == "bound":
            support[(0,) * len(p.variables)] = cones.ONE
        grown = Polynomial(p.variables, tuple(support.items()))
        basis = gram.consistent(grown, gram.box(grown) or []) if support else []
        whole = cones.Program((cones.cone(basis),)) if basis else None
    blocks = cones.split(whole, set(support)) if whole else cones.Program(())
    fits = blocks.largest <= getattr(method, "largest", blocks.largest)
    return moments.cost([len(c.basis) for c in blocks.cones] if fits else [])


CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes the system could give now, in a container no more than are left to it; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        most, used, told = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current", "stat"))
        cached = next(int(line.split()[1]) for line in told.splitlines() if line.startswith("inactive_file "))
        return free if most == "max" else max(0, min(free, int(most) - int(used) + cached))
    except (OSError, ValueError, StopIteration):
        return free
