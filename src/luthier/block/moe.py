"""Mixture of experts: each token goes through its top-k of many SwiGLU experts, and through shared ones.

Paper: arXiv 2101.03961 (balance loss), 2202.08906 (z-loss), 2401.06066 (shared experts), 2408.15664
(bias balancing).  Nothing is dropped or padded; the router works in fp32.  Three ways to keep the load
even, all optional: a balance loss over each sequence or the batch, normalised to 1 where even; a z-loss;
a bias that takes part in the choice only and is moved after each optimizer step by `bias_rate` against
the sign of the imbalance: whoever trains calls `after_step()` on every module that has it.
Padding neither counts as load nor enters the losses.  Losses exist in training mode only.
Footguns: micro-batches balance each on its own under "batch"; under sigmoid scores set `renormalise`.
aux: loss/balance, loss/z (with their weights); metric/load.LAYER (tokens per expert),
metric/max_violation.LAYER (fullest expert over the mean, less 1).
Shapes: B sequences, T positions, N = B*T tokens, D channels, E experts, K chosen, F inner width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from luthier.fields import Count, Natural, Range
from luthier.kit import routing
from luthier.kit.experts import Experts, Router, Shared, check_choice, expert_width, load_metrics
from luthier.kit.parts import Aux, Pass
from luthier.shapes import Part, Reduces

Weight = Annotated[float, Range(0.0)]


class Moe(Part):
    """See the head of this file."""

    experts: Count = 8
    """routed experts"""
    top_k: Count = 2
    """routed experts each token goes through"""
    shared: Natural = 0
    """experts every token goes through besides, built as one layer of `shared` times the width"""
    width: Count | None = None
    """inner width of one expert; null takes the model's `intermediate_size`, divided by the number of
    experts a token goes through, so that a token costs what the dense layer costs"""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """what turns router logits into scores, over all experts"""
    renormalise: bool = True
    """divide the chosen experts' scores by their sum (Mixtral does; OLMoE and Switch, with one, do not)"""
    balance: Literal["sequence", "batch"] = "batch"
    """what the balance loss is taken over"""
    balance_weight: Weight = 0.01
    """coefficient of the balance loss; 0 switches it off"""
    z_weight: Weight = 0.0
    """coefficient of the router z-loss (ST-MoE: 1e-3); 0 switches it off"""
    bias_rate: Weight = 0.0
    """step of the bias balancing (the paper: 1e-3); 0 switches it off"""

    slots = ("ffn",)
    reduces_to = Reduces({"experts": 1, "top_k": 1, "balance_weight": 0.0}, "block.dense", tolerance=1e-6)
    departures = (
        "transformers 5.23.0 (models/mixtral/modeling_mixtral.py, load_balancing_loss_func) multiplies load and "
        "probability summed over all layers, where Switch adds a loss for each layer: layers that are uneven in "
        "opposite ways cancel, so its value can be at its best while every layer is collapsed; shown by "
        "tests/golden/test_block_moe.py::test_transformers_pools_layers",
    )

    def check(self) -> None:
        check_choice(self.experts, self.top_k, self.renormalise, self.id)

    def build(self, spec: Any) -> nn.Module:
        runs = self.top_k + self.shared
        width = expert_width(self.width, spec.config.intermediate_size, runs, self.id)
        return MixtureOfExperts(self, spec, width)


class MixtureOfExperts(nn.Module):
    """Router, experts and shared experts, named as in DeepSeek-V3."""

    def __init__(self, part: Moe, spec: Any, width: int):
        super().__init__()
        self.part, self.layer = part, spec.layer
        self.gate = Router(part.experts, spec.config.hidden_size, biased=part.bias_rate > 0)
        self.experts = Experts(part.experts, spec.config.hidden_size, width)
        self.shared_experts = Shared(spec, part.shared * width) if part.shared else None
        self._seen_E: Tensor | None = None

    def forward(self, x_BTD: Tensor, at: Pass) -> tuple[Tensor, Aux]:
        logits_BTE = routing.router_logits(x_BTD, self.gate.weight)
        scores_BTE = logits_BTE.softmax(-1) if self.part.scores == "softmax" else logits_BTE.sigmoid()
        index_BTK, weight_BTK = routing.choose(
            scores_BTE, self.part.top_k, self.part.renormalise, self.gate.e_score_correction_bias
        )
        y_BTD = self.experts(x_BTD, index_BTK, weight_BTK)
        if self.shared_experts is not None:
            y_BTD = y_BTD + self.shared_experts(x_BTD)
        return y_BTD, self._aux(logits_BTE, scores_BTE, index_BTK, at.keep_BT)

    def _aux(self, logits_BTE: Tensor, scores_BTE: Tensor, index_BTK: Tensor, keep_BT: Tensor | None) -> Aux:
        part = self.part
        load_BE = routing.loads(index_BTK, part.experts, keep_BT)
        aux = load_metrics(load_BE.sum(0), str(self.layer))
        if self.training and part.balance_weight:
            # sigmoid scores do not sum to one over the experts: the loss takes them as shares (DeepSeek-V3)
            shares_BTE = F.normalize(scores_BTE, p=1.0, dim=-1)
            loss = routing.balance_loss(shares_BTE, load_BE, part.top_k, keep_BT, part.balance)
            aux["loss/balance"] = part.balance_weight * loss
        if self.training and part.z_weight:
            aux["loss/z"] = part.z_weight * routing.z_loss(logits_BTE, keep_BT)
        return aux

    def observe(self, aux: Mapping[str, Tensor]) -> None:
        """Count the load of one training pass towards the next step of the bias. The decoder calls it
        once a pass, outside gradient checkpointing, whose recomputation would count twice."""
        load_E = aux[f"metric/load.{self.layer}"]
        self._seen_E = load_E if self._seen_E is None else self._seen_E + load_E

    def after_step(self) -> None:
        """Move the bias by the load seen since the last optimizer step, over all ranks."""
        if self.part.bias_rate and self._seen_E is not None:
            bias_E = self.gate.e_score_correction_bias
            bias_E.copy_(routing.stepped_bias(bias_E, routing.over_ranks(self._seen_E), self.part.bias_rate))
        self._seen_E = None
