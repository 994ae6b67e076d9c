"""Checks of Optims: a quadratic descends, a resumed run is the same run, state is shaped so that it can move."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luthier.catalogue import Card, find
from luthier.testing import Check, must
from luthier.testing.reduction import same
from luthier.testing.variants import variants

STEPS = 20
SHAPES = ((3, 4), (5,), (7, 2))
Values = dict[str, Tensor]


def checks(entry: Card) -> list[Check]:
    return [Check(name, partial(f, entry)) for name, f in CHECKS.items()]


class Quadratic:
    """Leaves under a bowl of uneven curvature, gradients with keyed noise; stepped by an Optim."""

    def __init__(self, method: Any, lr: float = 0.05, per_entry: bool = False, dtype: torch.dtype = torch.float32):
        gen = torch.Generator().manual_seed(3)
        self.leaves = [torch.randn(s, generator=gen).to(dtype).requires_grad_(True) for s in SHAPES]
        self.curve = [torch.rand(s, generator=gen) + 0.2 for s in SHAPES]
        self.done = 0
        parts = ((self.leaves[:2], lr), (self.leaves[2:], lr / 2))
        groups = [{"params": leaves, "lr": rate, "per_entry": per_entry} for leaves, rate in parts]
        self.optimizer = method.make(self.leaves, groups)

    def loss(self) -> float:
        with torch.no_grad():
            return sum(float((c * x.float() ** 2).sum()) for c, x in zip(self.curve, self.leaves, strict=True))

    def steps(self, count: int, noise: float = 0.1) -> Quadratic:
        for _ in range(count):
            gen = torch.Generator().manual_seed(100 + self.done)
            for c, x in zip(self.curve, self.leaves, strict=True):
                grad = 2 * c * x.detach().float() + noise * torch.randn(x.shape, generator=gen)
                x.grad = grad.to(x.dtype)
            self.optimizer.step()
            self.done += 1
        return self

    def values(self) -> Values:
        return {str(i): x.detach().clone() for i, x in enumerate(self.leaves)}


def outcome(method: Any, given: Mapping[str, Any]) -> Values:
    """The leaves after twenty noisy steps."""
    return Quadratic(method).steps(STEPS).values()


class _Adam:
    """torch's Adam with the method's betas and eps, as an Optim."""

    def __init__(self, method: Any, adam: type[torch.optim.Optimizer]):
        self.method, self.adam = method, adam

    def make(self, leaves: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        owned = [dict(g) for g in groups]
        return self.adam(owned, betas=self.method.betas, eps=self.method.eps, foreach=False)  # type: ignore[call-arg]


PEERS: dict[str, Callable[..., Values]] = {
    "torch.optim.Adam": lambda method, given: outcome(_Adam(method, torch.optim.Adam), given),
}


def descends(entry: Card) -> None:
    """The quadratic goes down, whatever the fields."""
    for method in variants(find(entry.id)):
        run = Quadratic(method)
        before = run.loss()
        after = run.steps(60).loss()
        must(after < 0.6 * before, f"{method}: from {before:.3f} to {after:.3f}")


def resumes(entry: Card) -> None:
    """State taken as a dict of plain tensors between two steps and loaded anew: the same bytes."""
    for method in variants(find(entry.id)):
        for per_entry in (False, True):
            through = Quadratic(method, per_entry=per_entry).steps(STEPS).values()
            first = Quadratic(method, per_entry=per_entry).steps(STEPS // 2)
            again = Quadratic(method, per_entry=per_entry)
            with torch.no_grad():
                for mine, kept in zip(again.leaves, first.leaves, strict=True):
                    mine.copy_(kept)
            again.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
            again.done = first.done
            same(again.steps(STEPS - first.done).values(), through, 0.0, f"{method} resumed")


def same_bytes(entry: Card) -> None:
    """Twice the same, whatever the global generator has been through."""
    for method in variants(find(entry.id)):
        first = outcome(method, {})
        torch.rand(3)
        same(outcome(method, {}), first, 0.0, f"{method} run twice")


def learning_rates_count(entry: Card) -> None:
    """Each group has its own rate, a rate of zero moves nothing, and a leaf without a gradient stays."""
    for method in variants(find(entry.id)):
        still = Quadratic(method, lr=0.0)
        before = still.values()
        same(still.steps(3).values(), before, 0.0, f"{method} at rate 0")
        run = Quadratic(method)
        run.leaves[0].grad = torch.ones(SHAPES[0])
        run.optimizer.step()
        after = run.values()
        must(not torch.equal(after["0"], before["0"]), f"{method}: a leaf with a gradient does not move")
        same({k: after[k] for k in ("1", "2")}, {k: before[k] for k in ("1", "2")}, 0.0, f"{method} without gradients")
        fast, slow = Quadratic(method).steps(1), Quadratic(method, lr=0.025).steps(1)
        for key, value in fast.values().items():
            ratio = (value - before[key]).norm() / (slow.values()[key] - before[key]).norm()
            must(abs(ratio - 2) < 1e-2, f"{method}: twice the rate moves leaf {key} {ratio:.3f} times as far")


def state_can_move(entry: Card) -> None:
    """Every state tensor is a scalar or has its leaf's shape, so that entries can be remapped."""
    for method in variants(find(entry.id)):
        for per_entry in (False, True):
            run = Quadratic(method, per_entry=per_entry).steps(2)
            for leaf in run.leaves:
                for key, value in run.optimizer.state[leaf].items():
                    fits = not isinstance(value, Tensor) or value.dim() == 0 or value.shape == leaf.shape
                    must(fits, f"{method}: state {key!r} is {tuple(getattr(value, 'shape', ()))}")


def entries_count_for_themselves(entry: Card) -> None:
    """With `per_entry` the state `step` has a count for each entry, and an entry whose state is zeroed steps like
    a new one beside the same others; without a reset nothing differs."""
    for method in variants(find(entry.id)):
        shared, own = Quadratic(method).steps(STEPS), Quadratic(method, per_entry=True).steps(STEPS)
        same(own.values(), shared.values(), 2e-5, f"{method} counting per entry")
        state = own.optimizer.state[own.leaves[1]]
        must(_of_entries(state.get("step"), own.leaves[1]), f"{method}: no count of its own for each entry")
        for value in state.values():
            if _of_entries(value, own.leaves[1]):
                value[0] = 0
        fresh = Quadratic(method, per_entry=True)
        _share_what_is_the_leafs(own, fresh)
        fresh.done = own.done
        for _ in range(3):
            with torch.no_grad():
                kept = fresh.leaves[1][:1].clone()
                fresh.leaves[1].copy_(own.leaves[1])
                if fresh.done > STEPS:
                    fresh.leaves[1][:1] = kept
            own.steps(1)
            fresh.steps(1)
        gap = (own.leaves[1][0] - fresh.leaves[1][0]).abs().item()
        must(gap < 1e-6, f"{method}: a reset entry is {gap:g} from a new one")


def _share_what_is_the_leafs(own: Quadratic, fresh: Quadratic) -> None:
    """Give leaf 1 of a new run what another one's state holds of the leaf as a whole, none of its entries."""
    told = {k: v for k, v in own.optimizer.state[own.leaves[1]].items() if not _of_entries(v, own.leaves[1])}
    if told:
        state = {k: torch.zeros_like(v) for k, v in own.optimizer.state[own.leaves[1]].items() if k not in told}
        fresh.optimizer.state[fresh.leaves[1]].update(copy.deepcopy({**state, **told}))


def _of_entries(value: Any, leaf: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == leaf.shape


def half_precision(entry: Card) -> None:
    """Leaves in bfloat16 stay in bfloat16 and finite."""
    for method in variants(find(entry.id)):
        for leaf in Quadratic(method, dtype=torch.bfloat16).steps(5).leaves:
            must(leaf.dtype == torch.bfloat16 and bool(leaf.isfinite().all()), f"{method} in bfloat16")


CHECKS: dict[str, Callable[[Card], None]] = {
    f.__name__.replace("_", " "): f
    for f in (
        descends, resumes, same_bytes, learning_rates_count, state_can_move, entries_count_for_themselves,
        half_precision,
    )
}  # fmt: skip
"""Each check by name, a callable of the method's card."""
