"""Masked diffusion: a drawn share t of the labelled tokens is masked and found again, weighted by 1/t.

Paper: arXiv 2502.09992 (LLaDA; times spread evenly over a batch are from MDLM, 2406.07524).

For each row t is drawn uniformly, p = (1 - floor) t + floor, each labelled token is masked with probability p, and
the loss is the sum of -log(probability of the masked tokens) / p over the number of labelled tokens. Its
expectation bounds the negative log-likelihood from above; without the weight it bounds nothing (MaskGIT's loss).

Notable. Places without a label (a prompt) are never masked, which is LLaDA's fine-tuning; with labels everywhere it
is its pre-training. A label is of the token at its own place: nothing is shifted. A row's noise depends on (seed,
step, its tokens) alone, so padding, batch and accumulation do not change it; `antithetic` times depend on the batch.

Footguns. The model has to look both ways (`block.attention` with `causal: false`). Length is learnt only from
labelled end tokens: LLaDA fills short answers with them up to the batch's longest; here data decides. A loss of a
single batch is noisy, since p may be near `floor`: compare models over many draws.
B: rows.  T: positions.  D: channels.  N: masked places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.fields import Natural, Range, Share
from luthier.flows import Ctx, Loss
from luthier.kit.canvas import mask_token, must_see_ahead
from luthier.kit.encode import IGNORE
from luthier.kit.logits import AT_ONCE, states, summed
from luthier.shapes import Objective, Reduces


class MaskedDiffusion(Objective):
    """See the head of this file."""

    mask_token: Natural | None = None
    """id of the token that stands for a masked one; null takes the model's `mask_token_id`"""
    times: Literal["independent", "antithetic"] = "independent"
    """how the rows' t are drawn: each by itself, or one in each of as many equal parts of [0, 1] as there are rows"""
    rate: Share | None = None
    """a fixed probability of masking in the place of drawn ones, as BERT has it"""
    weight: Literal["inverse", "none"] = "inverse"
    """1/p, so that the loss bounds the likelihood, or every masked token alike"""
    average: Literal["token", "row"] = "token"
    """the mean over all labelled tokens, or over rows of each row's mean, as LLaDA's fine-tuning has it"""
    floor: Annotated[float, Range(0.0, 1.0, above=True)] = 1e-3
    """the least probability of masking"""
    aux: Annotated[float, Range(0.0)] = 1.0
    """factor on the model's own auxiliary losses (expert balance), whose coefficients are in its config"""

    needs = ("mask_token", "bidirectional")
    reduces_to = Reduces({"rate": 1.0}, "transformers.masked_lm", tolerance=2e-6)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], ctx: Ctx) -> Loss:
        must_see_ahead(model, self.id)
        token = mask_token(self.mask_token, model, self.id)
        ids_BT = batch["input_ids"]
        real_BT = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids_BT).bool()
        asked_BT = (batch["labels"] != IGNORE) & real_BT
        hidden_BT, p_B = self._noise(ids_BT, real_BT, asked_BT, ctx)
        noisy = {**batch, "input_ids": ids_BT.masked_fill(hidden_BT, token)}
        states_BTD, head, router = states(model, noisy, router=self.aux > 0)
        weight_BT, count = self._weights(asked_BT, p_B)

        def part(h_ND: Tensor, y_N: Tensor, weight_N: Tensor) -> Tensor:
            return (F.cross_entropy(head(h_ND).float(), y_N, reduction="none") * weight_N).sum()

        size: Any = max(1, AT_ONCE // model.config.vocab_size)  # type: ignore[union-attr]
        rows = states_BTD[hidden_BT], batch["labels"][hidden_BT], weight_BT[hidden_BT]
        nll = summed(part, size, *rows) / max(count, 1)
        if router is None:
            return Loss(nll, {"nll": nll.detach()}, count)
        return Loss(nll + self.aux * router, {"nll": nll.detach(), "aux": router.detach()}, count)

    def _noise(self, ids_BT: Tensor, real_BT: Tensor, asked_BT: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """Which places are masked, and with what probability they were."""
        seen: Counter[tuple[int, ...]] = Counter()
        strata = torch.randperm(len(ids_BT), generator=ctx.rng("strata", len(ids_BT))).tolist()
        hidden_BT, times = torch.zeros_like(asked_BT, device="cpu"), []
        for row, (ids_T, real_T, asked_T) in enumerate(zip(ids_BT.cpu(), real_BT.cpu(), asked_BT.cpu(), strict=True)):
            content = tuple(ids_T[real_T].tolist())
            u_N = torch.rand(1 + int(asked_T.sum()), generator=ctx.rng("noise", content, seen[content]))
            seen[content] += 1
            t = float(u_N[0])
            if self.times == "antithetic":
                t = (strata[row] + t) / len(strata)
            times.append((1 - self.floor) * t + self.floor if self.rate is None else self.rate)
            hidden_BT[row, asked_T] = u_N[1:] < times[-1]
        return hidden_BT.to(ids_BT.device), torch.tensor(times, device=ids_BT.device)

    def _weights(self, asked_BT: Tensor, p_B: Tensor) -> tuple[Tensor, int]:
        """The weight of each place, and how many units the mean is over."""
        weight_BT = asked_BT.float()
        if self.weight == "inverse":
            weight_BT = weight_BT / p_B[:, None]
        if self.average == "token":
            return weight_BT, int(asked_BT.sum())
        return weight_BT / asked_BT.sum(1, keepdim=True).clamp(min=1), int(asked_BT.any(1).sum())
