"""Chain of experts: each token goes through its experts several times, routed anew on what came out.

Paper: arXiv 2506.18945.  x_t = x_{t-1} + Σ_i g_{t,i} E_i(x_{t-1}), t = 1..C: the same experts in every
iteration, a router for each. Fills the slot `layer`, since where the residual goes is half the method:
    inner_normed   what the released layer does: z_0 = norm(h), z_t = z_{t-1} + MoE_t(z_{t-1}), gives z_C;
                   the residual stream h itself is thrown away in every layer
    prenorm        r_0 = h, r_t = r_{t-1} + MoE_t(norm(r_{t-1})), gives r_C: a pre-norm transformer
    outer          z_t = MoE_t(z_{t-1}), gives h + z_C
    init           z_t = z_0 + MoE_t(z_{t-1}), gives z_C
    gated          z_{t+1} = z_t + w_t ⊙ MoE_t(z_t), w_t from 0, gives h + MoE_C(z_C): with equal routers the
                   plain layer of `block.moe`, so that a trained model can be converted (`model.convert`)
Scores are a softmax over all experts in fp32. The balance loss is taken in each iteration on its own.
Footguns: one iteration of `inner_normed` is no normal MoE layer either, and the paper's MoE baseline is
that; compare with `prenorm` too. top_k counts an iteration: C times as many experts run. Shared experts run in
every iteration. Equal routed compute is not equal time.
aux: loss/balance (with its weight, summed over iterations); metric/load.LAYER.ITERATION and
metric/max_violation.LAYER.ITERATION, as in `block.moe`, an iteration that reuses a choice left out.
Shapes: B sequences, T positions, D channels, E experts, K chosen, C iterations.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.fields import Count, Natural, Range
from luthier.kit import routing
from luthier.kit.experts import Experts, Router, Shared, check_choice, expert_width, load_metrics
from luthier.kit.parts import Aux, Pass, add_aux
from luthier.shapes import Part, Reduces


class Coe(Part):
    """See the head of this file."""

    iterations: Count = 2
    """how often a token goes through experts"""
    experts: Count = 8
    """routed experts, the same in every iteration"""
    top_k: Count = 2
    """routed experts each token goes through in one iteration"""
    shared: Natural = 0
    """experts every token goes through besides, in every iteration"""
    width: Count | None = None
    """inner width of one expert; null takes the model's `intermediate_size`, divided by the number of
    experts a token goes through in all iterations, so that a token costs what the dense layer costs"""
    router: Literal["per_iteration", "tied", "frozen"] = "per_iteration"
    """a router for each iteration; one for all, applied to each iteration's state (the released code
    without `use_igate`); or the first iteration's experts and weights kept (the paper's shared gating)"""
    residual: Literal["inner_normed", "prenorm", "outer", "init", "gated"] = "inner_normed"
    """where the residual goes, see the head"""
    renormalise: bool = False
    """divide the chosen experts' scores by their sum"""
    balance: Literal["sequence", "batch"] = "sequence"
    """what the balance loss is taken over"""
    balance_weight: Annotated[float, Range(0.0)] = 0.001
    """coefficient of the balance loss of each iteration; 0 switches it off"""

    slots = ("layer",)
    reduces_to = (
        Reduces(
            {"iterations": 1, "residual": "prenorm", "renormalise": True}, "block.moe", given={"slot": "layer"},
            tolerance=1e-6,
        ),
        Reduces(
            {"iterations": 1, "residual": "gated", "renormalise": True}, "block.moe", given={"slot": "layer"},
            tolerance=1e-6,
        ),
    )  # fmt: skip
    departures = (
        "ZihanWang314/CoE d2af562 (README.MD): the printed number of expert combinations, 823 times, is not the value "
        "of the printed formula C(64,4)²/C(64,8), which is 91; shown by "
        "tests/golden/test_block_coe.py::test_the_number_of_combinations",
        "ZihanWang314/CoE d2af562 (config/models/coe_deepseekv2): the paper's ablation `shared gating` keeps the first "
        "iteration's gate values, `use_igate: false` applies one router to every iteration's state: two methods, here "
        "`frozen` and `tied`; shown by tests/golden/test_block_coe.py::test_tied_is_not_frozen",
    )

    def check(self) -> None:
        check_choice(self.experts, self.top_k, self.renormalise, self.id)
        if self.residual == "gated" and self.router == "frozen":
            raise LuthierError(
                "a gated chain needs a choice in its last iteration", where=self.id, do="use router: tied"
            )

    def build(self, spec: Any) -> nn.Module:
        runs = self.iterations * (self.top_k + self.shared)
        width = expert_width(self.width, spec.config.intermediate_size, runs, self.id)
        return ChainLayer(self, spec, width)


class Chain(nn.Module):
    """Routers, experts and shared experts of one layer. The routers' weights are one tensor (C, E, D)."""

    initial = {"step_scale": 0.0}

    def __init__(self, part: Coe, spec: Any, width: int):
        super().__init__()
        self.part, self.layer = part, spec.layer
        D = spec.config.hidden_size
        self.gate = Router(part.iterations if part.router == "per_iteration" else 1, part.experts, D)
        self.experts = Experts(part.experts, D, width)
        self.shared_experts = Shared(spec, part.shared * width) if part.shared else None
        if part.residual == "gated":
            self.step_scale = nn.Parameter(torch.zeros(part.iterations - 1, D))

    def forward(self, z_BTD: Tensor, t: int, choice: Any, keep_BT: Tensor | None) -> tuple[Tensor, Any, Aux]:
        """Iteration t on its state: what the experts give, the choice made, and aux."""
        aux: Aux = {}
        if choice is None or self.part.router != "frozen":
            choice, aux = self._choose(z_BTD, t, keep_BT)
        y_BTD = self.experts(z_BTD, *choice)
        if self.shared_experts is not None:
            y_BTD = y_BTD + self.shared_experts(z_BTD)
        return y_BTD, choice, aux

    def _choose(self, z_BTD: Tensor, t: int, keep_BT: Tensor | None) -> tuple[Any, Aux]:
        part = self.part
        weight_ED = self.gate.weight[t if part.router == "per_iteration" else 0]
        scores_BTE = routing.router_logits(z_BTD, weight_ED).softmax(-1)
        index_BTK, weight_BTK = routing.choose(scores_BTE, part.top_k, part.renormalise)
        load_BE = routing.loads(index_BTK, part.experts, keep_BT)
        aux = load_metrics(load_BE.sum(0), f"{self.layer}.{t}")
        if self.training and part.balance_weight:
            loss = routing.balance_loss(scores_BTE, load_BE, part.top_k, keep_BT, part.balance)
            aux["loss/balance"] = part.balance_weight * loss
        return (index_BTK, weight_BTK), aux


class ChainLayer(nn.Module):
    """x + mixer(norm(x)), then the chain in place of the feed-forward branch."""

    def __init__(self, part: Coe, spec: Any, width: int):
        super().__init__()
        self.part = part
        self.self_attn = spec.part("mixer")
        self.mlp = Chain(part, spec, width)
        self.input_layernorm = spec.part("norm")
        self.post_attention_layernorm = spec.part("norm")

    def forward(self, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Aux]:
        normed_BTD, aux = self.input_layernorm(x_BTD, at)
        y_BTD, from_mixer = self.self_attn(normed_BTD, at)
        h_BTD = x_BTD + y_BTD
        aux = add_aux(dict(aux), from_mixer)
        y_BTD = self._prenorm(h_BTD, at, aux) if self.part.residual == "prenorm" else self._chain(h_BTD, at, aux)
        return y_BTD, aux

    def _prenorm(self, r_BTD: Tensor, at: Pass, aux: Aux) -> Tensor:
        choice = None
        for t in range(self.part.iterations):
            z_BTD, from_norm = self.post_attention_layernorm(r_BTD, at)
            y_BTD, choice, more = self.mlp(z_BTD, t, choice, at.keep_BT)
            add_aux(add_aux(aux, from_norm), more)
            r_BTD = r_BTD + y_BTD
        return r_BTD

    def _chain(self, h_BTD: Tensor, at: Pass, aux: Aux) -> Tensor:
        """The placements that normalise once, before the first iteration."""
        start_BTD, from_norm = self.post_attention_layernorm(h_BTD, at)
        add_aux(aux, from_norm)
        z_BTD, choice, last = start_BTD, None, self.part.iterations - 1
        for t in range(self.part.iterations):
            y_BTD, choice, more = self.mlp(z_BTD, t, choice, at.keep_BT)
            add_aux(aux, more)
            match self.part.residual:
                case "inner_normed":
                    z_BTD = z_BTD + y_BTD
                case "init":
                    z_BTD = start_BTD + y_BTD
                case "outer":
                    z_BTD = h_BTD + y_BTD if t == last else y_BTD
                case _:
                    z_BTD = h_BTD + y_BTD if t == last else z_BTD + self.mlp.step_scale[t] * y_BTD
        return z_BTD
