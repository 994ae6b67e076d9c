"""Prophet: a masked-diffusion decode ends as soon as its answer is sure, by filling all that is open at once.

Paper: arXiv 2508.19982.

Before each step of the host the gap between the two largest logits is averaged over the answer's places; where it
reaches a threshold, which falls as decoding goes on (by thirds, at 0.33 and 0.67), the row takes the likeliest token
at every open place and is done. Otherwise the host goes on as it would. With `thresholds: null` it never fires.

Notable. The host is a field: any decode whose steps are `kit.canvas.Draft`s. Rows decide for themselves, and those
that are done leave the batch. Progress starts from 0, as in the paper.

Footguns. Thresholds are in units of raw logits and do not carry over to models of another scale; the published ones
were chosen for two 8B models. The mean hides one unsure place among many sure ones, and places already filled count
as sure, so where all tokens must be right take `reduce: min`. A smaller budget or a threshold of the host is the
comparison to make first: on the model of the claim they do as well or better.
B: rows.  L: places of the canvas.  V: words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.fields import Count, Natural
from luthier.flows import Ctx, Trace
from luthier.kit.canvas import Draft
from luthier.shapes import Decode, Decoding, Reduces

TABLE: Mapping[str, tuple[float, float, float]] = {
    "general": (7.5, 5.0, 2.5), "math": (8.0, 5.0, 3.5), "code": (7.5, 5.0, 4.5),
}  # fmt: skip
"""The paper's table 6: multiple choice, sudoku and countdown; GSM8K and GPQA; HumanEval and MBPP."""
EARLY, LATE = 0.33, 0.67
"""Progress at which the second and the third threshold begin."""


class Prophet(Decode):
    """See the head of this file."""

    host: Decode = "decode.masked_diffusion"  # type: ignore[assignment]
    """the decode that may be ended early"""
    thresholds: Literal["general", "math", "code"] | tuple[float, float, float] | None = "general"
    """gaps that suffice early, in the middle and late: the paper's for a kind of task, or three; null never"""
    reduce: Literal["mean", "min"] = "mean"
    """over the places looked at: the mean gap, as published, or the least"""
    over: Literal["region", "masked", "block"] = "region"
    """the places looked at: the answer's, those of them still open, or the answer's in the block at work"""
    region: tuple[Natural, Count] | None = None
    """the answer's first place in the canvas and how many; null: the whole canvas"""

    needs = ("mask_token", "bidirectional")
    reduces_to = Reduces({"thresholds": None}, "decode.masked_diffusion")
    departures = (
        "pixeli99/Prophet 460afe4: progress is (step + 1) / steps where the paper has step / steps, so each lower"
        " threshold applies one step early (tests/golden/test_decode_prophet.py::test_progress_starts_from_zero)",
        "pixeli99/Prophet 460afe4: the answer region is always five places, `answer_length` is read and never used, so"
        " longer answers are judged by their beginning"
        " (tests/golden/test_decode_prophet.py::test_five_places_are_not_a_longer_answer)",
        "pixeli99/Prophet 460afe4: what is filled in is the sampled prediction, in the paper the likeliest token; they"
        " differ above temperature 0 (tests/golden/test_decode_prophet.py::test_the_likeliest_tokens_are_filled_in)",
    )

    def steps(self, models: Sequence[tuple[nn.Module, Any]], prompts: Sequence[Any], ctx: Ctx) -> Early:
        """The host's steps; each row is ended where its gap suffices."""
        return Early(self, self.host.steps(models, prompts, ctx))


class Early(Decoding):
    """The host's decoding, filled in row by row as answers become sure."""

    def __init__(self, method: Prophet, host: Decoding):
        self.method, self.host = method, host

    def __iter__(self) -> Iterator[Draft]:
        for draft in self.host:
            if not isinstance(draft, Draft):
                raise LuthierError(f"{self.method.host.id} shows no drafts to fill", where=f"{self.method.id}.host",
                                   do="use decode.masked_diffusion")  # fmt: skip
            if self.method.thresholds is not None:
                draft.fill(gap(draft, self.method) >= self._needed(draft.progress_B).to(draft.canvas_BL.device))
            yield draft

    def trace(self) -> Trace:
        return self.host.trace()

    def _needed(self, progress_B: Tensor) -> Tensor:
        named = self.method.thresholds
        levels = torch.tensor(TABLE[named] if isinstance(named, str) else named)
        return levels[(progress_B >= EARLY).long() + (progress_B >= LATE).long()]


def gap(draft: Draft, method: Prophet) -> Tensor:
    """For each row the gap between the two largest logits over the places looked at; infinite if there are none."""
    length = draft.open_BL.shape[1]
    start, count = method.region or (0, length)
    if start >= length:
        raise LuthierError(f"the answer begins at place {start} of a canvas of {length}", where=f"{method.id}.region")
    seen_BL = torch.zeros_like(draft.open_BL)
    seen_BL[:, start : start + count] = True
    if method.over != "region":
        seen_BL &= draft.open_BL if method.over == "masked" else draft.block_BL
    top_BL2 = draft.logits_BLV.topk(2).values
    gap_BL = top_BL2[..., 0] - top_BL2[..., 1]
    if method.reduce == "min":
        return gap_BL.masked_fill(~seen_BL, torch.inf).amin(1)
    sum_B, count_B = gap_BL.masked_fill(~seen_BL, 0.0).sum(1), seen_BL.sum(1)
    return torch.where(count_B > 0, sum_B / count_B, torch.inf)
