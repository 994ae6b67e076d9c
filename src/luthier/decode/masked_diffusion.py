"""Masked diffusion: a canvas of masked tokens is filled over a number of passes, the surest places first.

Paper: arXiv 2502.09992 (LLaDA; margin and entropy are Dream's, 2508.15487, the threshold is Fast-dLLM's, 2505.22618).

Each pass predicts every masked place; some of the predictions stay, the others are masked again. How many is fixed
by `budget` (spread evenly over the blocks and their passes, as LLaDA's code does) or decided by `threshold`. With
blocks the canvas is filled from left to right, block by block, and in any order within a block.

Notable. Prompts may be of any lengths. A row leaves the batch as soon as all before its first end token is filled,
which changes nothing that is kept. What a row draws depends on (seed, step, its prompt, how many equal prompts
stand before it). The mask token itself is never predicted. Iterating gives a `kit.canvas.Draft` a pass, which a
user may look at, or fill to end its rows there (decode.prophet).

Footguns. The model has to be a mask predictor that looks both ways: `block.attention` with `causal: false`, or a
masked language model of transformers. LLaDA's and Dream's own checkpoints come as code from the Hub, which is not
run here. Many tokens in one pass are drawn as if they did not depend on each other.
B: rows still running.  L: places of the canvas.  V: words.  M: open places of the blocks in work.  N: rows in all.
P: places of the longest prompt.  T: of prompt and canvas.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Generator, Tensor, nn

from luthier.errors import LuthierError
from luthier.fields import Count, Natural, Range, Share
from luthier.flows import Ctx, Trace
from luthier.kit.canvas import Draft, mask_token, must_see_ahead, stretches
from luthier.kit.decoding import draw, end_ids, rows_of
from luthier.shapes import Decode, Decoding, Reduces


class MaskedDiffusion(Decode):
    """See the head of this file."""

    max_new_tokens: Count = 128
    """places of the canvas; fewer where the model's context ends"""
    budget: Count | None = None
    """forward passes for the whole canvas; null: one a place"""
    block: Count | None = None
    """places that are filled before the next ones are begun; null: the whole canvas"""
    order: Literal["confidence", "random", "margin", "entropy"] = "confidence"
    """what is filled first: the likeliest token, any, the widest margin of the two likeliest, the least entropy"""
    threshold: Share | None = None
    """in the place of a budget: a pass keeps every token at least this likely, and always the surest one"""
    temperature: Annotated[float, Range(0.0)] = 0.0
    """0 takes the likeliest token; 1 draws from the model's own distribution"""
    anchor: str = ""
    """text that stands in the canvas from the start, such as "The answer is" """
    anchor_at: Natural = 0
    """the place of the anchor's first token in the canvas"""
    mask_token: Natural | None = None
    """id of the mask token; null takes the model's `mask_token_id`, else the tokenizer's"""

    needs = ("mask_token", "bidirectional")
    reduces_to = Reduces({"budget": 1}, "transformers.fill_mask")

    def check(self) -> None:
        if self.threshold is not None and self.budget is not None:
            raise LuthierError("a threshold leaves no fixed budget", where=self.id, do="set one of them")
        if self.threshold is not None and self.order != "confidence":
            raise LuthierError("a threshold is of confidence", where=self.id, do="leave order as it is")

    def steps(self, models: Sequence[tuple[nn.Module, Any]], prompts: Sequence[Any], ctx: Ctx) -> Filling:
        """Fill a canvas after every prompt with the one model; iterate for `Draft`s."""
        if len(models) != 1:
            raise LuthierError(f"expected one model, got {len(models)}", where=self.id)
        model, tokenizer = models[0]
        return Filling(self, model, tokenizer, rows_of(prompts, tokenizer, self.id), ctx)


class Filling(Decoding):
    """A batch of canvases being filled. The trace may be asked for at any time, also after an early stop."""

    def __init__(self, method: MaskedDiffusion, model: nn.Module, tokenizer: Any, prompts: list[list[int]], ctx: Ctx):
        must_see_ahead(model, method.id)
        self.method, self.tokenizer = method, tokenizer
        self.host = _Host(model, prompts)
        self.mask, self.ends = mask_token(method.mask_token, model, method.id, tokenizer), end_ids(model, tokenizer)
        self.length = min(method.max_new_tokens, self.host.room)
        if self.length < 1:
            raise LuthierError("the prompts leave no room in the model's context", where=method.id)
        canvas_L = self._blank()
        self.canvas_NL = canvas_L.repeat(len(prompts), 1).to(self.host.device)
        self.places = int((canvas_L == self.mask).sum())
        self.plan = self._planned(canvas_L)
        self.draws = self._draws(prompts, ctx) if method.temperature or method.order == "random" else []
        self.last: Draft | None = None

    def __iter__(self) -> Iterator[Draft]:
        while rows := self._running():
            logits_BLV = self.host.forward(rows, self.canvas_NL[rows])
            logits_BLV[..., self.mask] = -torch.inf
            self.last = self._draft(rows, logits_BLV)
            yield self.last

    def trace(self) -> Trace:
        self._settle()
        kept = [self._kept(row) for row in self.canvas_NL.tolist()]
        why = ["eos" if r and r[-1] in self.ends else "length" if len(r) == self.length else "" for r in kept]
        return Trace(tuple(kept), tuple(map(self._text, kept)), self.host.forwards, 0, tuple(why))

    def _blank(self) -> Tensor:
        """The canvas before the first pass: masks and the anchor."""
        canvas_L = torch.full((self.length,), self.mask)
        if self.method.anchor:
            ids = self.tokenizer(self.method.anchor, add_special_tokens=False)["input_ids"]
            start, stop = self.method.anchor_at, self.method.anchor_at + len(ids)
            if stop > self.length:
                raise LuthierError(
                    f"the anchor ends at place {stop}, the canvas at {self.length}", where=f"{self.method.id}.anchor_at"
                )
            canvas_L[start:stop] = torch.tensor(ids)
        return canvas_L

    def _planned(self, canvas_L: Tensor) -> list[int]:
        """How many tokens each pass keeps, in every row alike."""
        sizes = [int((b == self.mask).sum()) for b in canvas_L.split(self.method.block or self.length)]
        sizes = [size for size in sizes if size]
        budget = self.places if self.method.budget is None else self.method.budget
        if budget < len(sizes):
            raise LuthierError(f"a budget of {budget} is below one pass a block", where=f"{self.method.id}.budget",
                               do=f"set at least {len(sizes)}")  # fmt: skip
        pairs = zip(sizes, shared_out(budget, sizes), strict=True)
        return [n for size, passes in pairs for n in stretches(size, passes)]

    def _draws(self, prompts: list[list[int]], ctx: Ctx) -> list[Generator]:
        seen: Counter[tuple[int, ...]] = Counter()
        made = []
        for prompt in map(tuple, prompts):
            made.append(ctx.rng("canvas", prompt, seen[prompt]))
            seen[prompt] += 1
        return made

    def _running(self) -> list[int]:
        """The rows in which a masked place stands before the first end token."""
        self._settle()
        return [i for i, row in enumerate(self.canvas_NL.tolist()) if self._open_before_end(row)]

    def _open_before_end(self, row: list[int]) -> bool:
        return next((t == self.mask for t in row if t == self.mask or t in self.ends), False)

    def _settle(self) -> None:
        """Take over what the last draft holds, also what its user has filled in."""
        if self.last is not None:
            self.canvas_NL[list(self.last.rows)] = self.last.canvas_BL
            self.last = None

    def _draft(self, rows: list[int], logits_BLV: Tensor) -> Draft:
        before_BL = self.canvas_NL[rows]
        open_BL = before_BL == self.mask
        size = self.method.block or self.length
        block_L = torch.arange(self.length, device=open_BL.device) // size
        block_BL = block_L == open_BL.int().argmax(1, keepdim=True) // size  # that of the first open place
        token_BL, score_BL = self._scored(rows, logits_BLV, open_BL & block_BL)
        rank_BL = score_BL.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        if self.method.threshold is None:
            kept_BL = rank_BL < self.plan[self.host.forwards - 1]
            progress_B = torch.full((len(rows),), (self.host.forwards - 1) / len(self.plan), dtype=torch.float64)
        else:
            kept_BL = (score_BL >= self.method.threshold) | (rank_BL == 0)
            progress_B = 1 - open_BL.sum(1).double().cpu() / self.places
        after_BL = torch.where(kept_BL & open_BL & block_BL, token_BL, before_BL)
        return Draft(tuple(rows), logits_BLV, open_BL, block_BL, progress_B, after_BL, self._said)

    def _scored(self, rows: list[int], logits_BLV: Tensor, spots_BL: Tensor) -> tuple[Tensor, Tensor]:
        """A token for every place of `spots`, and how sure it is; -inf elsewhere."""
        logits_MV = logits_BLV[spots_BL]
        p_MV = logits_MV.softmax(-1)
        token_M = logits_MV.argmax(-1)
        if self.method.temperature:
            token_M = draw((logits_MV / self.method.temperature).softmax(-1), self._uniform(rows)[spots_BL])
        if self.method.order == "random":
            score_M = self._uniform(rows)[spots_BL]
        elif self.method.order == "margin":
            top_M2 = p_MV.topk(2).values
            score_M = top_M2[:, 0] - top_M2[:, 1]
        elif self.method.order == "entropy":
            score_M = -torch.special.entr(p_MV).sum(-1)
        else:
            score_M = p_MV.gather(1, token_M[:, None])[:, 0]
        token_BL = torch.full(spots_BL.shape, self.mask, device=spots_BL.device)
        score_BL = torch.full(spots_BL.shape, -torch.inf, device=spots_BL.device)
        token_BL[spots_BL], score_BL[spots_BL] = token_M, score_M
        return token_BL, score_BL

    def _uniform(self, rows: list[int]) -> Tensor:
        """A number in [0, 1) for every place, each row's from its own generator."""
        return torch.stack([torch.rand(self.length, generator=self.draws[r]) for r in rows]).to(self.host.device)

    def _kept(self, row: list[int]) -> tuple[int, ...]:
        """Up to and with the first end token, and before the first place that is still open."""
        for i, token in enumerate(row):
            if token == self.mask:
                return tuple(row[:i])
            if token in self.ends:
                return tuple(row[: i + 1])
        return tuple(row)

    def _text(self, kept: Sequence[int]) -> str:
        return self.tokenizer.decode(list(kept), skip_special_tokens=True)

    def _said(self, draft: Draft) -> tuple[str, ...]:
        said = [""] * len(self.canvas_NL)
        for row, tokens in zip(draft.rows, draft.canvas_BL.tolist(), strict=True):
            if not self._open_before_end(tokens):
                said[row] = self._text(self._kept(tokens))
        return tuple(said)


def shared_out(budget: int, sizes: Sequence[int]) -> list[int]:
    """Passes for each block: one to each in turn until the budget is spent, never more than it has places."""
    passes = [0] * len(sizes)
    left = min(budget, sum(sizes))
    while left:
        for i, size in enumerate(sizes):
            if left and passes[i] < size:
                passes[i] += 1
                left -= 1
    return passes


class _Host:
    """The model behind its prompts, padded on the left; counts its passes."""

    def __init__(self, model: nn.Module, prompts: list[list[int]]):
        self.model, self.forwards = model, 0
        self.device = next(model.parameters()).device
        self.accepts = inspect.signature(model.forward).parameters
        widest = max(map(len, prompts), default=0)
        self.room = (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - widest  # type: ignore[union-attr]
        self.ids_NP = torch.tensor([[0] * (widest - len(p)) + p for p in prompts], device=self.device)
        self.real_NP = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts], device=self.device)

    @torch.no_grad()
    def forward(self, rows: list[int], canvas_BL: Tensor) -> Tensor:
        """Logits at every place of the canvases, in fp32."""
        mask_BT = torch.cat([self.real_NP[rows], torch.ones_like(canvas_BL)], 1)
        length = canvas_BL.shape[1]
        extra = {"position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0), "logits_to_keep": length}
        inputs = {"input_ids": torch.cat([self.ids_NP[rows], canvas_BL], 1), "attention_mask": mask_BT}
        inputs |= {name: value for name, value in extra.items() if name in self.accepts}
        self.forwards += 1
        return self.model(**inputs, use_cache=False).logits[:, -length:].float()
