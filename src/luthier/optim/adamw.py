"""AdamW: moment-scaled steps with decoupled weight decay, step counts per tensor or per entry.

Paper: arXiv 1711.05101.  Per entry, one state entry each:

    p ← p - lr·decay·p;   m ← β1·m + (1 - β1)·g;   v ← β2·v + (1 - β2)·g²
    p ← p - lr · (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + ε)

Groups that ask for `per_entry` count t for every entry by itself: an entry that joins a selection
late then starts with its own bias correction, where a shared t would make its first step too long
(about (1 - β1)/√(1 - β2) of a normal one: 3.2 times at β2 = 0.999).
Footgun: a parameter in bfloat16 gets moments in bfloat16; selected leaves are fp32 for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.fields import Positive, Range
from luthier.kit.adam import LeafByLeaf, entry_step
from luthier.shapes import Optim, Reduces


class EntryAdamW(LeafByLeaf):
    """AdamW whose `step` state is a tensor of the leaf's shape in groups with `per_entry`, else a scalar."""

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float], eps: float, weight_decay: float):
        defaults = {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": weight_decay, "per_entry": False}
        super().__init__(groups, defaults)

    def step_leaf(self, leaf: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[leaf], group["betas"]
        if not state:
            shape = leaf.shape if group["per_entry"] else ()
            state["step"] = torch.zeros(shape, dtype=torch.float32, device=leaf.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(leaf), torch.zeros_like(leaf)
        rates = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        entry_step(leaf, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], beta1=beta1, beta2=beta2, **rates)


class AdamW(Optim):
    betas: Annotated[tuple[float, float], Range(0.0, 1.0)] = (0.9, 0.999)
    """decay of the running means of the gradient and of its square, both below 1"""
    eps: Positive = 1e-8
    """added to the root of the second moment"""
    weight_decay: Annotated[float, Range(0.0)] = 0.0
    """share of the learning rate by which every moved number shrinks a step"""
    fused: bool = True
    """torch's fused kernel; false takes its plain loop (the two differ by rounding)"""
    reduces_to = Reduces({"weight_decay": 0.0, "fused": False}, "torch.optim.Adam")

    def check(self) -> None:
        if max(self.betas) >= 1.0:
            raise LuthierError(f"{max(self.betas)} is out of range", where=f"{self.id}.betas", do="stay below 1")

    def make(self, leaves: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        """torch.optim.AdamW, or `EntryAdamW` if any group asks for counts per entry."""
        owned = [dict(group) for group in groups]
        if any(group.get("per_entry") for group in owned):
            return EntryAdamW(owned, self.betas, self.eps, self.weight_decay)
        kernel: dict[str, Any] = {"fused": True} if self.fused else {"foreach": False}
        return torch.optim.AdamW(owned, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, **kernel)
