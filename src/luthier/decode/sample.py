"""Sample: greedy decoding or sampling, batched, with a cache, one step a token.

Paper: none (textbook; top-p is arXiv 1904.09751, min-p arXiv 2407.01082).

At temperature 0, the default, the most likely token is taken. Otherwise logits are divided by the
temperature and cut by top-k, then top-p, then min-p, in transformers' order, and a token is drawn by the
inverse of the cumulative distribution.

Notable. What a row draws depends on (seed, step, its prompt's tokens, how many equal prompts stand before
it) and on nothing else: not on the batch around it. Prompts may be of any lengths (padding is on the
left and masked). The beginning that all prompts of a batch share is computed once. Finished rows leave
the batch when half of it is done. Iterating gives a `Step` a token, with each row's new token and text, so
a user may watch and stop; text that may turn out to begin a stop string is held back.

Footguns. A prompt is continued as it stands: put chat turns through `kit.encode.prompt_ids` first. Batches
are equal to single prompts up to rounding, so in bf16 a near tie can fall the other way.

B rows still running, T positions, V words, K the likeliest of them, N rows in all.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Generator, Tensor, nn

from luthier.errors import LuthierError
from luthier.fields import Count, Range, Share
from luthier.flows import Ctx, Trace
from luthier.kit.decoding import draw, end_ids, rows_of
from luthier.shapes import Decode, Decoding, Reduces

SHARED = 16
"""From how many common first tokens on a batch computes them once."""


class Sample(Decode):
    """Greedy decoding or sampling."""

    temperature: Annotated[float, Range(0.0)] = 0.0
    """0 is greedy; 1 draws from the model's own distribution"""
    top_k: Count | None = None
    """draw among the k most likely tokens only"""
    top_p: Share = 1.0
    """draw among the fewest tokens that hold this much probability"""
    min_p: Annotated[float, Range(0.0, 1.0)] = 0.0
    """draw among tokens at least this likely relative to the likeliest"""
    max_new_tokens: Count = 128
    """most tokens a row gets; fewer where the model's context ends"""
    stop: tuple[str, ...] = ()
    """texts that end a row; they and what follows are cut from its text, not from its tokens"""

    reduces_to = Reduces({"temperature": 0.0}, "transformers.greedy")

    def steps(self, models: Sequence[tuple[nn.Module, Any]], prompts: Sequence[Any], ctx: Ctx) -> Sampling:
        """Continue every prompt with the one model; iterate for `Step`s."""
        if len(models) != 1:
            raise LuthierError(f"expected one model, got {len(models)}", where=self.id)
        model, tokenizer = models[0]
        return Sampling(self, model, tokenizer, rows_of(prompts, tokenizer, self.id), ctx)


@dataclass(frozen=True)
class Step:
    """What one forward pass decided: for every row its token and the text that is now sure, or None and ""."""

    tokens: tuple[int | None, ...]
    texts: tuple[str, ...]


class Sampling(Decoding):
    """A batch being decoded. The trace may be asked for at any time, also after an early stop."""

    def __init__(self, method: Sample, model: nn.Module, tokenizer: Any, prompts: list[list[int]], ctx: Ctx):
        self.method, self.host, self.prompts = method, _Host(model), prompts
        longest = max((len(p) for p in prompts), default=0)
        self.limit = min(method.max_new_tokens, self.host.room - longest)
        if self.limit < 1:
            raise LuthierError(f"a prompt has {longest} tokens, the model's context {self.host.room}", where=method.id)
        self.ends = end_ids(model, tokenizer)
        self.texts = [_Text(tokenizer, method.stop) for _ in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.why = [""] * len(prompts)
        seen: Counter[tuple[int, ...]] = Counter()
        self.draws: list[Generator] = []
        for prompt in map(tuple, prompts if method.temperature else ()):
            self.draws.append(ctx.rng("sample", prompt, seen[prompt]))
            seen[prompt] += 1

    def __iter__(self) -> Iterator[Step]:
        rows = list(range(len(self.prompts)))  # which prompts the batch's rows are
        logits_BV = self.host.start(self.prompts) if rows else None
        while logits_BV is not None:
            ids = self._choose(logits_BV, rows)
            yield self._take(rows, ids)
            running = [place for place, row in enumerate(rows) if not self.why[row]]
            if not running:
                return
            if 2 * len(running) <= len(rows):
                self.host.keep(running)
                rows, ids = [rows[i] for i in running], [ids[i] for i in running]
            logits_BV = self.host.step(ids)

    def trace(self) -> Trace:
        return Trace(
            tokens=tuple(map(tuple, self.tokens)), texts=tuple(t.whole() for t in self.texts),
            forwards=self.host.forwards, cache_bytes=self.host.cache_bytes, stopped=tuple(self.why),
        )  # fmt: skip

    def _choose(self, logits_BV: Tensor, rows: Sequence[int]) -> list[int]:
        if not self.method.temperature:
            return logits_BV.argmax(1).tolist()
        u_B = torch.stack([torch.rand((), generator=self.draws[row]) for row in rows]).to(logits_BV.device)
        return draw(filtered(logits_BV.float(), self.method).softmax(1), u_B).tolist()

    def _take(self, rows: Sequence[int], ids: Sequence[int]) -> Step:
        new: list[int | None] = [None] * len(self.prompts)
        said = [""] * len(self.prompts)
        for row, token in zip(rows, ids, strict=True):
            if self.why[row]:
                continue
            self.tokens[row].append(token)
            new[row] = token
            if token in self.ends:
                self.why[row] = "eos"
            else:
                said[row] = self.texts[row].push(token)
            if self.texts[row].stopped:
                self.why[row] = "stop"
            elif not self.why[row] and len(self.tokens[row]) == self.limit:
                self.why[row] = "length"
            if self.why[row]:
                said[row] += self.texts[row].flush()
        return Step(tuple(new), tuple(said))


def filtered(logits_BV: Tensor, method: Sample) -> Tensor:
    """Logits after temperature, top-k, top-p and min-p; -inf where a token is out."""
    x_BV = logits_BV / method.temperature
    if method.top_k:
        best_BK = x_BV.topk(min(method.top_k, x_BV.shape[1])).values
        x_BV = x_BV.masked_fill(x_BV < best_BK[:, -1:], -torch.inf)
    if method.top_p < 1:
        sorted_BV, order_BV = x_BV.sort(descending=True)
        before_BV = sorted_BV.softmax(1).cumsum(1) - sorted_BV.softmax(1)
        x_BV = x_BV.masked_fill(torch.empty_like(x_BV).scatter(1, order_BV, before_BV) >= method.top_p, -torch.inf)
    if method.min_p:
        p_BV = x_BV.softmax(1)
        x_BV = x_BV.masked_fill(p_BV < method.min_p * p_BV.amax(1, keepdim=True), -torch.inf)
    return x_BV


class _Host:
    """The model with its cache, mask and positions; counts what it costs."""

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config
        self.device = next(model.parameters()).device
        self.accepts = inspect.signature(model.forward).parameters
        self.room = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        self.forwards = self.cache_bytes = 0
        self.cache: Any = None

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits after each prompt."""
        shared = self._shared(prompts)
        if shared:
            self.mask_BT = torch.empty(1, 0, dtype=torch.long, device=self.device)
            first_1T = torch.tensor([prompts[0][:shared]])
            self._forward(first_1T, torch.ones_like(first_1T))
            self.cache.batch_repeat_interleave(len(prompts))
        self.mask_BT = torch.ones(len(prompts), shared, dtype=torch.long, device=self.device)
        rest = [p[shared:] for p in prompts]
        width = max(map(len, rest))
        ids_BT = torch.tensor([[0] * (width - len(r)) + list(r) for r in rest])
        return self._forward(ids_BT, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rest]))

    def step(self, ids: Sequence[int]) -> Tensor:
        """Logits after one more token a row."""
        return self._forward(torch.tensor(ids)[:, None], torch.ones(len(ids), 1, dtype=torch.long))

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(places, device=self.device)
        self.cache.batch_select_indices(index)
        self.mask_BT = self.mask_BT[index]

    @torch.no_grad()
    def _forward(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        self.mask_BT = torch.cat([self.mask_BT, real_BT.to(self.device)], dim=1)
        inputs = {"input_ids": ids_BT.to(self.device), "attention_mask": self.mask_BT, "past_key_values": self.cache}
        place_BT = (self.mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        extra = {"position_ids": place_BT, "logits_to_keep": 1}
        inputs |= {name: value for name, value in extra.items() if name in self.accepts}
        out = self.model(**inputs, use_cache=True)
        self.cache = out.past_key_values
        self.forwards += 1
        self.cache_bytes = max(self.cache_bytes, _nbytes(self.cache))
        return out.logits[:, -1]

    def _shared(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many first tokens to compute once: 0 unless it pays and distances in the cache do not matter."""
        if len(prompts) < 2 or getattr(self.config, "sliding_window", None) or "position_ids" not in self.accepts:
            return 0
        least, most = min(map(list, prompts)), max(map(list, prompts))  # what the extremes share, all share
        common = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
        common = min(common, min(map(len, prompts)) - 1)  # every row needs a token of its own
        return common if common >= SHARED else 0


class _Text:
    """One row's text, made token by token; `push` gives what has become sure."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.tokenizer, self.stop, self.stopped = tokenizer, [s for s in stop if s], False
        self.ids: list[int] = []
        self.start = self.read = 0  # ids[start:read] are decoded already, and lead in what follows
        self.sure, self.held = "", ""

    def push(self, token: int) -> str:
        self.ids.append(token)
        done, now = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        if now.endswith("\ufffd") and len(self.ids) - self.read < 8:  # the middle of a character
            return ""
        self.start, self.read = self.read, len(self.ids)
        return self._say(now[len(done) :])

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        rest = self._decode(self.ids[self.start :])[len(self._decode(self.ids[self.start : self.read])) :]
        self.start = self.read = len(self.ids)
        said = "" if self.stopped else self._say(rest) + self.held
        self.sure, self.held = self.sure + ("" if self.stopped else self.held), ""
        return said

    def whole(self) -> str:
        return self.sure + self.held

    def _say(self, piece: str) -> str:
        text = self.held + piece
        found = [place for place in (text.find(s) for s in self.stop) if place >= 0]
        if found:
            self.stopped, sure, self.held = True, text[: min(found)], ""
        else:
            keep = max((n for s in self.stop for n in range(len(s)) if text.endswith(s[:n])), default=0)
            sure, self.held = text[: len(text) - keep], text[len(text) - keep :]
        self.sure += sure
        return sure

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _nbytes(cache: Any) -> int:
    layers = getattr(cache, "layers", ())
    return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values) if isinstance(t, Tensor))
