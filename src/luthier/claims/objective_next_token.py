"""Next token: no paper's own claim. What is claimed is that computing logits at labelled places only, in
stretches, trains the same model as transformers' own loss over all places, at a fraction of the logits.

Here: tiny decoders trained for 60 steps on sums, labels on the answer alone, once with each loss. Rows of
logits are counted by a hook on the head, recomputed ones too.
"""

from typing import Any

import torch

from luthier.catalogue import load
from luthier.claims import Claim
from luthier.kit.context import Context
from luthier.kit.encode import collate, encode, pad_id
from luthier.testing import tiny

STEPS, BATCH = 60, 8


def run(seed: int, ctx: Context) -> dict[str, float]:
    ours, theirs = _trained(seed, ctx, True), _trained(seed, ctx, False)
    return {
        "method": ours[0], "control/transformers": theirs[0], "rows of logits": ours[1],
        "rows of logits, transformers": theirs[1], "cost/steps": STEPS,
    }  # fmt: skip


def _trained(seed: int, ctx: Context, ours: bool) -> tuple[float, float]:
    """The loss on held-out tasks, by transformers in both cases, and the rows of logits computed in training."""
    model, tokenizer, data = tiny.llama(seed).train(), tiny.tokenizer(), tiny.task_data(72, 28)
    rows = [encode(item, tokenizer) for item in data.train]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    objective, count = load("objective.next_token", chunk=16), [0]
    hook = model.lm_head.register_forward_hook(lambda head, args, out: _add(count, out))
    for step in range(STEPS):
        order = torch.randperm(len(rows), generator=ctx.with_(seed=seed).rng("batch", step))[:BATCH]
        batch = collate([rows[i] for i in order.tolist()], pad_id(tokenizer))
        loss: Any = objective.loss(model, batch, ctx).total if ours else model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hook.remove()
    with torch.no_grad():
        held_out = collate([encode(item, tokenizer) for item in data.test], pad_id(tokenizer))
        return model.eval()(**held_out).loss.item(), count[0]


def _add(count: list[int], logits: Any) -> None:
    count[0] += logits.numel() // logits.shape[-1]


CLAIM = Claim(
    id="objective.next_token",
    sentence="Logits at labelled places only train the model that all logits train, to 0.005 nats a token.",
    relation="within", effect=0.005, unit="nats per answer token", control="transformers' own loss, same batches",
    seeds=5, minutes=0.5, run=run,
)  # fmt: skip
