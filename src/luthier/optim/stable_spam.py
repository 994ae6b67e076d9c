"""Stable-SPAM: spikes capped at a running maximum, each tensor's gradient rescaled, moments emptied now and then.

Paper: arXiv 2502.17055.  For each tensor, before AdamW's own step on the gradient that comes out:

    T ← γ3·T + (1 - γ3)·max|g|;   T̂ = T / (1 - γ3^t);   entries with |g| > T̂ become g / max|g| · T̂
    n = ‖g‖;   μ ← γ1·μ + (1 - γ1)·n;   ν ← γ2·ν + (1 - γ2)·n²;   g ← g / n · μ̂ / (√ν̂ + ε)

and every `reset` steps m, v and their count start from zero. t counts the tensor's steps and is never reset:
the count of AdamW's bias correction is another one, per entry in groups that ask for `per_entry`.

Notable. At the defaults (the released class's; 4-bit training resets every 500) γ = (0.7, 0.9, 0.999); in bfloat16
the authors use (0.85, 0.99999, 0.999). State: two numbers an entry (three where entries count for themselves), and
T, μ, ν and two counts a tensor. Where a Tune moves entries, m and v go with them, T, μ and ν stay the tensor's.

Footguns. The norm of a rescaled gradient is at most about 1 however large the tensor, so ε weighs otherwise than in
AdamW. Every tensor is treated, norms and embeddings too. A reset makes the next steps as long as the very first
ones: lower the rate, or leave time for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from luthier.errors import LuthierError
from luthier.fields import Count, Positive, Range
from luthier.kit.adam import LeafByLeaf, entry_step
from luthier.shapes import Optim, Reduces

Decay = Annotated[float, Range(0.0, 1.0)]


class StableAdamW(LeafByLeaf):
    """AdamW on stabilised gradients. `how`: the fields of the method that made it."""

    def __init__(self, groups: Sequence[dict[str, Any]], how: StableSpam):
        defaults = {"betas": how.betas, "eps": how.eps, "weight_decay": how.weight_decay}
        super().__init__(groups, {"lr": 1e-3, **defaults, "per_entry": False})
        self.how = how

    def step_leaf(self, leaf: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if not leaf.numel():
            return
        state, how = self.state[leaf], self.how
        if not state:
            state.update(_fresh(leaf, group["per_entry"]))
        state["steps"] += 1
        grad = _stabilised(grad, state, how, group["eps"])
        moments = state["exp_avg"], state["exp_avg_sq"]
        due = bool(how.reset) and state["steps"] % how.reset == 0
        if due:
            state["step"].zero_()
            if how.compat == "paper":
                _empty(moments)
        beta1, beta2 = group["betas"]
        settings = {
            "beta1": beta1 * _share(state["steps"], how.anneal), "beta2": beta2, "lr": group["lr"],
            "weight_decay": group["weight_decay"], "eps": group["eps"],
        }  # fmt: skip
        if group["per_entry"]:
            entry_step(leaf, grad, *moments, state["step"], **settings)
        else:
            lists = [[leaf], [grad], *([m] for m in moments), [], [state["step"]]]
            adamw(*lists, fused=True, amsgrad=False, maximize=False, **settings)
        if due and how.compat == "official":
            _empty(moments)


def _fresh(leaf: Tensor, per_entry: bool) -> dict[str, Any]:
    zero = torch.zeros((), dtype=torch.promote_types(leaf.dtype, torch.float32), device=leaf.device)
    return {
        "step": torch.zeros(leaf.shape if per_entry else (), dtype=torch.float32, device=leaf.device),
        "exp_avg": torch.zeros_like(leaf), "exp_avg_sq": torch.zeros_like(leaf),
        "steps": 0, "peak": zero, "norm": zero.clone(), "square": zero.clone(),
    }  # fmt: skip


def _empty(moments: tuple[Tensor, Tensor]) -> None:
    for moment in moments:
        moment.zero_()


def _share(steps: int, anneal: int | None) -> float:
    """The factor on β1 and γ1: 1, or along a cosine down to a half."""
    if anneal is None:
        return 1.0
    return 0.75 + 0.25 * math.cos(math.pi * min(1.0, steps / (anneal + 1)))


def _counted(steps: int, how: StableSpam) -> int:
    """The t of T̂, μ̂ and ν̂. The released code shares Adam's count, which the last reset has set to 1."""
    if how.compat == "paper" or how.reset is None or steps <= how.reset:
        return steps
    return 2 + (steps - 1) % how.reset


def _stabilised(grad: Tensor, state: dict[str, Any], how: StableSpam, eps: float) -> Tensor:
    """The gradient with its spikes capped and its norm set to the history's, in its own dtype."""
    if how.clip is None and how.norm is None:
        return grad
    t, wide = _counted(state["steps"], how), grad.to(state["peak"].dtype)
    if how.clip is not None:
        largest = wide.abs().amax()
        cap = state["peak"].mul_(how.clip).add_(largest, alpha=1 - how.clip) / (1 - how.clip**t)
        wide = torch.where(wide.abs() > cap, wide / largest * cap, wide)
    if how.norm is not None:
        first, second = how.norm[0] * _share(state["steps"], how.anneal), how.norm[1]
        size = torch.linalg.vector_norm(wide)
        mean = state["norm"].mul_(first).add_(size, alpha=1 - first) / (1 - first**t)
        square = state["square"].mul_(second).add_(size**2, alpha=1 - second) / (1 - second**t)
        wide = torch.where(size > 0, wide / size * (mean / (square.sqrt() + eps)), wide)
    return wide.to(grad.dtype)


class StableSpam(Optim):
    betas: Annotated[tuple[float, float], Range(0.0, 1.0)] = (0.9, 0.999)
    """decay of the running means of the stabilised gradient and of its square, both below 1"""
    eps: Positive = 1e-8
    """added to the roots of the second moment and of the mean squared norm"""
    weight_decay: Annotated[float, Range(0.0)] = 0.0
    """share of the learning rate by which every moved number shrinks a step"""
    clip: Decay | None = 0.999
    """γ3, decay of the running maximum at which spikes are capped; null caps nothing"""
    norm: Annotated[tuple[float, float], Range(0.0, 1.0)] | None = (0.7, 0.9)
    """γ1 and γ2, decay of the running means of the norm and of its square; null leaves the norm alone"""
    reset: Count | None = 1000
    """steps after which the moments start anew; null never"""
    anneal: Count | None = None
    """steps over which γ1 and β1 fall to half along a cosine, 20,000 in every released script; null never"""
    compat: Literal["paper", "official"] = "paper"
    """`official` resets as the released code does: T̂, μ̂ and ν̂ are corrected with the reset count, which nearly
    disables the cap, and a reset step still uses the old moments"""
    reduces_to = Reduces({"clip": None, "norm": None, "reset": None}, "optim.adamw")
    departures = (
        "TianjinYellow/StableSPAM 6a66da1 (galore_torch/stablespam.py): a reset sets the one count that also corrects"
        " the running maximum and norms to 1 and keeps those; at a reset every 500 steps and steady gradients the cap"
        " is 197 times the largest after the first reset and 1.6 times it before the second, then more, so spikes pass"
        " (tests/golden/test_optim_stable_spam.py::test_a_released_reset_disables_the_cap)",
        "TianjinYellow/StableSPAM 6a66da1 (galore_torch/stablespam.py): the step of a reset still uses the moments it"
        " discards, corrected as a first step's: 0.4 of a normal step at the defaults, 0.74 at the next, and that"
        " gradient is in no later moment"
        " (tests/golden/test_optim_stable_spam.py::test_a_released_reset_steps_with_the_old_moments)",
        "TianjinYellow/StableSPAM 6a66da1 (utils/argparse.py, total_T): every released script multiplies γ1 and β1 by"
        " a cosine from 1 to 0.5 over 20,000 steps, which the formulas lack; here `anneal`"
        " (tests/golden/test_optim_stable_spam.py::test_released_scripts_anneal)",
    )

    def check(self) -> None:
        for name, decays in (("betas", self.betas), ("clip", (self.clip,)), ("norm", self.norm or ())):
            if 1.0 in decays:
                raise LuthierError("1.0 is out of range", where=f"{self.id}.{name}", do="stay below 1")

    def make(self, leaves: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        """A `StableAdamW`; groups may set betas, eps and weight_decay of their own."""
        return StableAdamW([dict(group) for group in groups], self)
