"""The door through which a Transform looks at models with data: the experts as Subjects, a source for each.

A method asks for it with the role `data*`; its `survey` then finds `ctx.role("subjects")`, the experts in order,
`ctx.role("base")`, a Subject or None, and `ctx.role("data")`, one source for each expert. A subject's model is
loaded when it is opened and freed when it is closed; it computes in fp32, as merges do, since gradients in 16 bits
vanish. A delta or an adapter is put onto its base in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.checkpoint.expert import Expert
from luthier.engine.subject import Subject_
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.pairing import one_for_each
from luthier.shapes import Transform

ROLE = "data*"


def asks(method: Transform) -> bool:
    """Whether the method looks at models with data."""
    return ROLE in type(method).roles


def opened(method: Transform, base: Any, experts: Sequence[Any], ctx: Context) -> Context:
    """The context with the door open, for checkpoints; unchanged for a method that does not ask.

    ctx: its role `data` holds the sources.
    """
    if not asks(method):
        return ctx
    data = one_for_each(ctx.role("data") or (), len(experts), method.id)
    threads = torch.get_num_threads()
    subjects = [_subject(model, ctx, threads) for model in experts]
    below = None if base is None else _subject(base, ctx, threads)
    return ctx.with_(roles={**ctx.roles, "subjects": subjects, "base": below, "data": data})


def given(method: Transform, experts: int, ctx: Context) -> Context:
    """The context of a transform in memory, whose caller has set the roles `subjects` and `data`."""
    if not asks(method):
        return ctx
    subjects = ctx.role("subjects") or ()
    if len(subjects) != experts:
        what = f"{len(subjects)} subjects for {experts} expert{'s' * (experts != 1)}"
        raise LuthierError(what, where=method.id, do="set the context's role subjects, a Subject for each expert")
    return ctx.with_(roles={**ctx.roles, "data": one_for_each(ctx.role("data") or (), experts, method.id)})


@dataclass(frozen=True)
class _Alone:
    """A Subject that has torch's threads for itself while it is open, and leaves no memory behind."""

    inner: Subject_
    threads: int

    @property
    def name(self) -> str:
        return self.inner.name

    @contextmanager
    def open(self) -> Iterator[Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with self.inner.open() as pair:
                yield pair
        finally:
            torch.set_num_threads(before)
            gc.collect()


def _subject(model: Any, ctx: Context, threads: int) -> _Alone:
    name, options = Path(model.path).name, {"device": ctx.device, "dtype": torch.float32}
    if isinstance(model, Expert):
        return _Alone(Subject_(name, model.delta, base=model.base, **options), threads)
    return _Alone(Subject_(name, model, **options), threads)
