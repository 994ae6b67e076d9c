"""Perplexity: batches, padding and logits at labelled places only must not move a likelihood.

Here: the 135M model on windows of Python source, in batches of 16. The control is transformers' own loss,
one item at a time, without padding.
"""

import torch

from luthier.claims import Claim
from luthier.claims._bundled import Host, data, host
from luthier.eval.perplexity import Perplexity
from luthier.kit.context import Context
from luthier.kit.encode import collate, encode

ITEMS = 16


def run(seed: int, ctx: Context) -> dict[str, float]:
    code = data("code", seed, "text:stdlib", ITEMS, chars=300, glob="[a-d]*.py")
    model, tokenizer = host()
    rows = Perplexity(batch=16).measure([Host()], [code], ctx).dicts()
    tokens = sum(row["tokens"] for row in rows)
    alone = 0.0
    for item in code.test:
        row = encode(item, tokenizer)
        with torch.no_grad():
            alone += model(**collate([row], 0, multiple=1)).loss.item() * row.count
    return {
        "method": sum(row["value"] * row["tokens"] for row in rows) / tokens, "control": alone / tokens,
        "cost/tokens": float(tokens),
    }  # fmt: skip


CLAIM = Claim(
    id="eval.perplexity",
    sentence="In padded batches of 16 the likelihood is within 0.0001 nats a token of transformers' loss item by item.",
    relation="within", effect=1e-4, unit="nats per token", control="transformers' loss, one item at a time",
    seeds=5, minutes=1.5, run=run,
)  # fmt: skip
