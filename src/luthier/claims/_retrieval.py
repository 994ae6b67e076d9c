"""The experiment that claims about retrieval share: small decoders learn to look up values by their keys.

A row is a haystack of filler words with needles strewn in, then questions. A needle is one word that has a key and a
value; a question is a word that names a key, and the row's needle with that key follows. Which value a key has is
drawn for every row, so only the haystack tells it. (With key and value in words of their own, plain training does
not get beyond guessing among the row's values in the minutes that a claim has here.) Fillers follow a fixed random
chain, so there is a language to learn besides. Everything is labelled, as in pre-training. `found`: the share of
questions in fresh rows whose needle is the likeliest word; `loss`: nats a word of those rows, filler and all. All
arms of a seed see the same rows in the same order and start from the same weights.
B: rows.  T: positions.  P: needles.  Q: questions.  F: fillers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.kit.context import Context
from luthier.model import build_model

MASK, KEYS, VALUES, FILLERS = 0, 8, 16, 15
NEEDLES, QUESTIONS, FILLER = 6, 6, 30
FIRST_ASK, FIRST_NEEDLE, FIRST_FILLER = 1, 1 + KEYS, 1 + KEYS + KEYS * VALUES
WORDS = FIRST_FILLER + FILLERS
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.08, "mask_token_id": MASK,
}  # fmt: skip
STEPS, BATCH, RATE, TESTED = 300, 32, 3e-3, 200
LONG, LONGEST = 3, 6
Loss = Callable[[nn.Module, Mapping[str, Tensor], Context], Tensor]


@cache
def chain() -> Tensor:
    """What follows a filler, (F, 4): one of four others, the same language in every run."""
    return torch.rand(FILLERS, FILLERS, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :4]


def rows(count: int, generator: torch.Generator, filler: int = FILLER) -> dict[str, Tensor]:
    """`count` rows as a batch with every word labelled; the last 2·Q are questions and needles in turn."""
    key_BP = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :NEEDLES]
    value_BP = torch.randint(VALUES, (count, NEEDLES), generator=generator)
    needle_BP = FIRST_NEEDLE + key_BP * VALUES + value_BP
    text_BT = torch.zeros(count, NEEDLES + filler, dtype=torch.long)
    here_BT = torch.rand(text_BT.shape, generator=generator).argsort(1) < NEEDLES
    text_BT[here_BT], text_BT[~here_BT] = needle_BP.flatten(), _fillers(count, filler, generator).flatten()
    asked_BQ = torch.rand(count, NEEDLES, generator=generator).argsort(1)[:, :QUESTIONS]
    told_BQ2 = torch.stack([FIRST_ASK + key_BP.gather(1, asked_BQ), needle_BP.gather(1, asked_BQ)], 2)
    ids_BT = torch.cat([text_BT, told_BQ2.flatten(1)], 1)
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT}


def _fillers(count: int, filler: int, generator: torch.Generator) -> Tensor:
    """Walks along the chain, (B, F)."""
    now_B, walk = torch.randint(FILLERS, (count,), generator=generator), []
    for turn_B in torch.randint(4, (filler, count), generator=generator):
        now_B = chain()[now_B, turn_B]
        walk.append(FIRST_FILLER + now_B)
    return torch.stack(walk, 1)


def trained(seed: int, ctx: Context, loss: Loss) -> dict[str, float]:
    """Train one arm by this loss: what it finds in haystacks `as trained`, `long` and `longest`, and its `loss`."""
    ctx = ctx.with_(seed=seed)
    model = build_model(SIZES, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        loss(model, rows(BATCH, ctx.rng("train", step)), ctx.with_(seed=ctx.key("noise", step))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    short, long, longest = (tested(model.eval(), ctx, times * FILLER) for times in (1, LONG, LONGEST))
    found = {"as trained": short["found"], "long": long["found"], "longest": longest["found"]}
    return {**found, "loss": short["loss"]}


@torch.no_grad()
def tested(model: Any, ctx: Context, filler: int = FILLER) -> dict[str, float]:
    """On TESTED fresh rows with so many fillers."""
    ids_BT = rows(TESTED, ctx.rng("test"), filler)["input_ids"]
    logits_BTV = model(ids_BT, use_cache=False).logits[:, :-1]
    right_BT = logits_BTV.argmax(2) == ids_BT[:, 1:]
    return {
        "found": right_BT[:, -2 * QUESTIONS :][:, 1::2].float().mean().item(),
        "loss": F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()).item(),
    }
