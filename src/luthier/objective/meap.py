"""MEAP: next-token prediction from inputs of which a few are masked.

Paper: arXiv 2502.07490.  `pretrain`: in each row some of the inputs become the mask token; every label stays and is
predicted from what comes before it, as ever. `finetune`: every row is trained on as it is, and a long answer a
second time, with some of its tokens masked and labels at those alone. A label is predicted from the place before
it, so a masked token is predicted before its mask is read: masks take from what comes after them.

Notable. Nothing is shifted, both ways and no pass is added, the attention stays causal; fine-tuning copies double
the rows of long answers (the authors halve the epochs). The share is of the places before a row's last label, or of
an answer's tokens but its end token, rounded down, at least one place. A row's masks depend on (seed, step, its
tokens), so padding, batch and accumulation do not change them; with `rows: shared` they depend on the batch.

Footguns. The claim is retrieval, not likelihood: the loss here is of inputs with holes, so compare models by
`objective.next_token` or by a task. A vocabulary without a spare token has to grow by one first.
B: rows.  T: positions.  D: channels.  N: labelled places.  C: copied rows.  V: words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.fields import Natural, Range
from luthier.flows import Ctx, Loss
from luthier.kit.canvas import mask_token
from luthier.kit.encode import IGNORE
from luthier.kit.logits import AT_ONCE, labelled, summed
from luthier.kit.select import kept
from luthier.shapes import Objective, Reduces

SHARES = {"pretrain": 0.15, "finetune": 0.1}


class Meap(Objective):
    form: Literal["pretrain", "finetune"] = "pretrain"
    """mask inputs everywhere, or add a copy of each long answer with masks inside it"""
    share: Annotated[float, Range(0.0, 1.0)] | None = None
    """share of the places that are masked; null takes the paper's, 0.15 in pre-training and 0.1 in fine-tuning"""
    mask_token: Natural | None = None
    """id of the token that stands for a masked one; null takes the model's `mask_token_id`"""
    rows: Literal["own", "shared"] = "own"
    """pre-training: each row's masks by themselves, or the same places in all rows, as the released code has them"""
    least: Natural = 50
    """fine-tuning: answers of up to so many tokens, the end token not counted, are not copied"""
    aux: Annotated[float, Range(0.0)] = 1.0
    """factor on the model's own auxiliary losses (expert balance), whose coefficients are in its config"""

    needs = ("mask_token",)
    reduces_to = Reduces({"share": 0.0}, "objective.next_token")
    departures = (
        "scitix/MEAP 0f5e837 (MEAP-Pretain/pretrained/*.py, get_cycled_seed): masks are drawn from a seed that cycles"
        " through 51 values and are the same for every row, micro-batch and process of a step, so a whole training"
        " sees 51 sets of places (tests/golden/test_objective_meap.py::test_released_masks_repeat)",
        "scitix/MEAP 0f5e837 (MEAP-SFT/MEAP-SFT.py): masks are drawn once, when the data are prepared, so every epoch"
        " repeats them; its README has them drawn at each training step"
        " (tests/golden/test_objective_meap.py::test_every_step_draws_anew)",
    )

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], ctx: Ctx) -> Loss:
        seen = labelled(model, self._masked(model, batch, ctx), router=self.aux > 0)

        def part(h_ND: Tensor, y_N: Tensor) -> Tensor:
            return F.cross_entropy(seen.head(h_ND).float(), y_N, reduction="sum")

        size: Any = max(1, AT_ONCE // model.config.vocab_size)  # type: ignore[union-attr]
        count = seen.y_N.numel()
        nll = summed(part, size, seen.h_ND, seen.y_N) / max(count, 1)
        if seen.router is None:
            return Loss(nll, {"nll": nll.detach()}, count)
        return Loss(nll + self.aux * seen.router, {"nll": nll.detach(), "aux": seen.router.detach()}, count)

    def _masked(self, model: nn.Module, batch: Mapping[str, Tensor], ctx: Ctx) -> Mapping[str, Tensor]:
        """The batch with masks in its inputs, or with copies that have them."""
        token, ids_BT = mask_token(self.mask_token, model, self.id), batch["input_ids"]
        real_BT = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids_BT).bool()
        asked_BT = (batch["labels"] != IGNORE) & real_BT & real_BT.roll(1, 1)
        asked_BT[:, 0] = False  # nothing stands before it to predict it from
        hidden_BT = self._hidden(ids_BT.cpu(), real_BT.cpu(), asked_BT.cpu(), ctx).to(ids_BT.device)
        inputs_BT = ids_BT.masked_fill(hidden_BT, token)
        if self.form == "pretrain":
            return {**batch, "input_ids": inputs_BT}
        copied_B = hidden_BT.any(1)
        labels_BT = batch["labels"].masked_fill(~hidden_BT, IGNORE)
        copies = {**batch, "input_ids": inputs_BT, "labels": labels_BT}
        return {name: torch.cat([value_BT, copies[name][copied_B]]) for name, value_BT in batch.items()}

    def _hidden(self, ids_BT: Tensor, real_BT: Tensor, asked_BT: Tensor, ctx: Ctx) -> Tensor:
        """Which places are masked."""
        share = SHARES[self.form] if self.share is None else self.share
        longest, seen = int(real_BT.sum(1).max()), Counter()
        hidden_BT = torch.zeros_like(asked_BT)
        for row, (ids_T, real_T, asked_T) in enumerate(zip(ids_BT, real_BT, asked_BT, strict=True)):
            place_N = self._candidates(real_T, asked_T)
            if self.form == "pretrain" and self.rows == "shared":
                noise_N = torch.rand(longest, generator=ctx.rng("masks", longest))[: len(place_N)]
            else:
                content = ids_T[real_T & (asked_T.flip(0).cumsum(0).flip(0) > 0)].tolist()
                noise_N = torch.rand(len(place_N), generator=ctx.rng("masks", content, seen[tuple(content)]))
                seen[tuple(content)] += 1
            hidden_BT[row, place_N[noise_N.argsort()[: kept(share, len(place_N))]]] = True
        return hidden_BT

    def _candidates(self, real_T: Tensor, asked_T: Tensor) -> Tensor:
        """The places of a row that may be masked, in order."""
        if self.form == "finetune":
            place_N = asked_T.nonzero()[:-1, 0]  # the last one is the end token
            return place_N if len(place_N) > self.least else place_N[:0]
        after_T = asked_T.flip(0).cumsum(0).flip(0) - asked_T.long()
        return (real_T & (after_T > 0)).nonzero()[:, 0]
