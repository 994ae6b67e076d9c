"""What optimizers of Adam's kind share: the walk over the leaves, and AdamW's step with a count for each entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LeafByLeaf(torch.optim.Optimizer):
    """An optimizer that steps every leaf by itself: `step_leaf` says how."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over every leaf that has a gradient, which is left as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for leaf in group["params"]:
                if leaf.grad is not None:
                    self.step_leaf(leaf, leaf.grad, group)
        return loss

    def step_leaf(self, leaf: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Move one leaf in place; `group` is its parameter group."""
        raise NotImplementedError


def entry_step(
    leaf: Tensor, grad: Tensor, m: Tensor, v: Tensor, count: Tensor, *,
    beta1: float, beta2: float, lr: float, weight_decay: float, eps: float,
) -> None:  # fmt: skip
    """AdamW's step in place (arXiv 1711.05101); `count` is a scalar or has the leaf's shape."""
    count += 1
    leaf.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (v / (1 - beta2**count)).sqrt_().add_(eps)
    leaf.addcdiv_(m / (1 - beta1**count), root, value=-lr)
