"""What methods share that fill in masked tokens: the mask token, attention that looks both ways, the draft.

B: rows.  L: places of the canvas.  V: words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.errors import LuthierError


def mask_token(given: int | None, model: Any, where: str, tokenizer: Any = None) -> int:
    """The id of the mask token: as given, else from the model's config, else from the tokenizer."""
    named = (given, getattr(model.config, "mask_token_id", None), getattr(tokenizer, "mask_token_id", None))
    token = next((t for t in named if t is not None), None)
    if token is None:
        raise LuthierError("the model names no mask token", where=where, do="set mask_token to the id of a spare token")
    words = model.get_input_embeddings().weight.shape[0]
    if not 0 <= token < words:
        raise LuthierError(f"the mask token {token} is not among the model's {words} words", where=where)
    return token


def must_see_ahead(model: Any, where: str) -> None:
    """Raise where the model says that its attention is causal: a mask predictor has to look both ways.

    A config with `is_causal` false makes transformers build masks for both ways, whatever its modules say.
    Models that say nothing (custom code) are trusted.
    """
    if getattr(model.config, "is_causal", True) is False:
        return
    said = [getattr(m, "causal", getattr(m, "is_causal", None)) for m in model.modules()]
    known = [way for way in said if isinstance(way, bool)]
    if known and all(known):
        raise LuthierError(
            "the model's attention is causal, a mask predictor looks both ways", where=where,
            do="use block.attention with causal: false, or a config with is_causal: false",
        )  # fmt: skip


@dataclass(frozen=True)
class Draft:
    """One forward pass over the canvases of the rows still running, and what was decided by it.

    rows: which prompts they are.  logits_BLV: of every place, fp32, -inf at the mask token.  open_BL: places
    that were masked before the pass.  block_BL: places of the block that each row is at.  progress_B: the
    share of the planned work done before the pass.  canvas_BL: the tokens after it, the mask token where a
    place is still open; the host goes on from what a user leaves there.
    """

    rows: tuple[int, ...]
    logits_BLV: Tensor
    open_BL: Tensor
    block_BL: Tensor
    progress_B: Tensor
    canvas_BL: Tensor
    _said: Callable[[Draft], tuple[str, ...]]

    @property
    def texts(self) -> tuple[str, ...]:
        """For every prompt the text that is now sure: all of it once its row is done, "" before and after."""
        return self._said(self)

    def fill(self, chosen_B: Tensor) -> None:
        """In the chosen rows, the likeliest token at every place that was open before the pass."""
        best_BL = self.logits_BLV.argmax(-1)
        self.canvas_BL.copy_(torch.where(self.open_BL & chosen_B[:, None], best_BL, self.canvas_BL))


def stretches(total: int, parts: int) -> list[int]:
    """`total` spread evenly over `parts`, the remainder over the first of them: 7 over 3 is 3, 2, 2."""
    return [total // parts + (i < total % parts) for i in range(parts)]
