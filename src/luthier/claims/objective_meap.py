"""MEAP: the paper (arXiv 2502.07490) finds that pre-training on inputs with a few masks makes a model better at
finding key information in its context, at no cost and without harm to its likelihood.

Here: small decoders from scratch on needles in haystacks (`_retrieval.py`), asked in haystacks three times as long
as those they were trained on. Against plain next-token prediction on the same rows, and against the dumb control:
as many inputs replaced by random words, so that there is noise, but no mask to be told from a word. Reported and not
judged: as many labels left out of the loss, haystacks as in training and six times as long, and the plain loss.
The length of training and of the haystacks was settled on the plain arm alone.
"""

from collections.abc import Mapping
from typing import Any

import torch

from luthier.catalogue import load
from luthier.claims import Claim
from luthier.claims._retrieval import BATCH, FIRST_ASK, LONG, STEPS, WORDS, trained
from luthier.kit.context import Context
from luthier.kit.encode import IGNORE

SHARE = 0.15


def run(seed: int, ctx: Context) -> dict[str, float]:
    meap, plain = load("objective.meap", share=SHARE), load("objective.next_token")

    def objective(model: Any, batch: Mapping[str, Any], ctx: Context) -> Any:
        return meap.loss(model, batch, ctx).total

    def next_token(model: Any, batch: Mapping[str, Any], ctx: Context) -> Any:
        return plain.loss(model, batch, ctx).total

    def random_words(model: Any, batch: Mapping[str, Any], ctx: Context) -> Any:
        words = torch.randint(FIRST_ASK, WORDS, batch["input_ids"].shape, generator=ctx.rng("words"))
        ids = torch.where(_drawn(batch, ctx), words, batch["input_ids"])
        return plain.loss(model, {**batch, "input_ids": ids}, ctx).total

    def fewer_labels(model: Any, batch: Mapping[str, Any], ctx: Context) -> Any:
        return plain.loss(
            model, {**batch, "labels": batch["labels"].masked_fill(_drawn(batch, ctx), IGNORE)}, ctx
        ).total

    arms = {
        "method": objective, "control/next token": next_token, "control/random words": random_words,
        "fewer labels": fewer_labels,
    }  # fmt: skip
    done = {name: trained(seed, ctx, loss) for name, loss in arms.items()}
    found = {name: arm["long"] for name, arm in done.items()}
    more = {
        f"{word}, {name}": arm[word] for name, arm in done.items() for word in ("as trained", "longest", "loss")
    }  # fmt: skip
    return {**found, **more, "cost/steps": STEPS * len(arms), "cost/rows": STEPS * len(arms) * BATCH}


def _drawn(batch: Mapping[str, Any], ctx: Context) -> torch.Tensor:
    return torch.rand(batch["input_ids"].shape, generator=ctx.rng("drawn")) < SHARE


CLAIM = Claim(
    id="objective.meap",
    sentence=f"MEAP's pre-training form raises the share of needles found in haystacks {LONG} times as long by 0.05.",
    relation="above", effect=0.05, unit="share of questions", control="next token; random words for the masks",
    seeds=5, minutes=5, run=run, source="section 4, needle in a haystack and multi-document questions",
)  # fmt: skip
