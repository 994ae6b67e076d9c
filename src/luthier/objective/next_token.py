"""Next token: mean cross-entropy of the labelled tokens, logits computed at those places only.

Paper: none (maximum likelihood).  Label -100 is no label; labels are shifted here, as in transformers.

Notable: logits exist for labelled places alone, in stretches that are recomputed in the backward pass,
so a long answer or a large vocabulary never holds them all; the cross-entropy is in fp32. A mixture of
experts adds its own balance loss (transformers leaves it out unless `output_router_logits` is set).
Footgun: `total` is a mean over `count` labelled tokens; batches are joined by weighting with `count`.
B: sequences.  T: positions.  D: channels.  N: labelled places.  V: words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor, nn

from luthier.fields import Count, Range
from luthier.flows import Ctx, Loss
from luthier.kit.logits import AT_ONCE, labelled, summed
from luthier.shapes import Objective, Reduces


class NextToken(Objective):
    aux: Annotated[float, Range(0.0)] = 1.0
    """factor on the model's own auxiliary losses (expert balance), whose coefficients are in its config"""
    chunk: Count | None = None
    """labelled places whose logits exist at once; null fits them into 256 MiB"""
    reduces_to = Reduces({}, "transformers.loss", tolerance=2e-6)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], ctx: Ctx) -> Loss:
        seen = labelled(model, batch, router=self.aux > 0)
        count = seen.y_N.numel()
        nll = self._summed(seen.head, seen.h_ND, seen.y_N, model) / max(count, 1)
        if seen.router is None:
            return Loss(nll, {"nll": nll.detach()}, count)
        total = nll + self.aux * seen.router
        return Loss(total, {"nll": nll.detach(), "aux": seen.router.detach()}, count)

    def _summed(self, head: Callable[[Tensor], Tensor], h_ND: Tensor, y_N: Tensor, model: nn.Module) -> Tensor:
        """The sum of the negative log-likelihoods, a scalar in fp32."""

        def part(h_ND: Tensor, y_N: Tensor) -> Tensor:
            return F.cross_entropy(head(h_ND).float(), y_N, reduction="sum")

        size: Any = self.chunk or max(1, AT_ONCE // model.config.vocab_size)  # type: ignore[union-attr]
        return summed(part, size, h_ND, y_N)
