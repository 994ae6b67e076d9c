"""One polynomial from what a user writes to its certificate; without torch, which no sum of squares needs."""

from __future__ import annotations

from typing import Any

from luthier.engine.certify_scale import answered, undecided
from luthier.flows import Certificate
from luthier.kit.problem import Problem, problem
from luthier.kit.telling import Telling, Watch

METHOD = "sos.certify"


class Light(Telling):
    """A context that imports torch only for a method that asks for more than to report its progress."""

    step = "certify"

    def __init__(self, watch: Watch | None = None):
        self.watch = watch

    def __getattr__(self, name: str) -> Any:
        from luthier.kit.context import Context

        return getattr(Context(step=self.step), name)


def certify(p: Any, nonneg: Any = (), zero: Any = (), use: str = METHOD, **fields: Any) -> Certificate:
    """The certificate of p >= 0 where all `nonneg` are >= 0 and all `zero` are 0, by the method `use`.

    p, and each constraint: text, a number, a map {exponents: coefficient}, an array, or a SymPy object.
    Raises LuthierError where they cannot be read; whatever else goes wrong is a certificate that says so.
    """
    from luthier.catalogue import load

    asked, method = problem(p, nonneg, zero), load(use, **fields)
    short = _short_of_memory(asked, method) if use == METHOD else None
    if short:
        return undecided(asked, short)
    return answered(method, p if isinstance(p, str) and not asked.constrained else asked, Light())


def lower_bound(p: Any, nonneg: Any = (), zero: Any = (), use: str = METHOD, **fields: Any) -> Certificate:
    """The largest lower bound of p that is found and proven: the certificate's `bound`, exact where its status is."""
    return certify(p, nonneg, zero, use, **{"ask": "bound", **fields})


USUAL = 100
"""Blocks up to this size fit any machine."""


def _short_of_memory(asked: Problem, method: Any) -> str | None:
    """Why the problem should not be tried, where the method was allowed larger blocks than usual."""
    if method.largest <= USUAL:
        return None
    from luthier.engine.room import free_memory, size_of_proof

    needed, free = size_of_proof(asked, method)[1], free_memory()
    if free is None or needed <= free:
        return None
    return f"it needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
