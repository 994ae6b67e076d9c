"""The experiment that claims about Parts share: small decoders trained from scratch on bytes.

The text is the running Python's own library source, split by file; a token is a byte. All arms of a
seed see the same windows in the same order, start from weights keyed by the same seed and names, and
take the same steps of AdamW (warm-up, then a cosine to a tenth), so differences are paired. The loss
is the mean over the same 96 test windows, in nats per byte.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from luthier.engine.sources import find
from luthier.kit.context import Context
from luthier.kit.parts import aux_loss
from luthier.model import build_model

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 8,
    "initializer_range": 0.05,
}  # fmt: skip
STEPS, BATCH, LENGTH, RATE = 160, 16, 96, 4e-3
TEST_WINDOWS = 96


@cache
def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on and to test on: every tenth file by the hash of its name is for testing."""
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    source = find("text", "stdlib", {})
    for path in source.files:
        name = path.relative_to(source.root).as_posix()
        sides[hashlib.sha256(name.encode()).digest()[0] % 10 == 0].append(path.read_bytes())
    train, test = (torch.frombuffer(bytearray(b"\n".join(side)), dtype=torch.uint8) for side in sides)
    return train, test


def windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` stretches of LENGTH + 1 bytes from anywhere in the text."""
    starts = torch.randint(len(text) - LENGTH - 1, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(LENGTH + 1)].long()


def trained(
    seed: int,
    ctx: Context,
    slots: Mapping[str, Any],
    prepare: Callable[[nn.Module], None] | None = None,
    **sizes: Any,
) -> dict[str, float]:
    """Train one arm; `loss` on the test windows, `violation` (mean over layers and the last 50 steps of
    the fullest expert's excess, nan without experts), `parameters`, `tokens`.

    prepare: changes the fresh model, such as freezing what a control must not learn.
    """
    ctx = ctx.with_(seed=seed)
    model = build_model({**SIZES, **sizes, "slots": dict(slots)}, seed)
    if prepare:
        prepare(model)
    leaves = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    violations: list[float] = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * _share(step)
        aux = _step(model, optimizer, windows(corpus()[0], BATCH, ctx.rng("train", step)))
        if step >= STEPS - 50:
            violations += [v.item() for k, v in aux.items() if k.startswith("metric/max_violation")]
    return {
        "loss": _tested(model, ctx), "violation": sum(violations) / len(violations) if violations else math.nan,
        "parameters": sum(p.numel() for p in model.parameters()), "tokens": STEPS * BATCH * LENGTH,
    }  # fmt: skip


def _share(step: int) -> float:
    """Of the peak learning rate: up over a tenth of the steps, then a cosine to a tenth."""
    warm = STEPS // 10
    return min(1.0, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / (STEPS - warm)))


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: Tensor) -> Mapping[str, Tensor]:
    body = model.model(batch[:, :-1], use_cache=False)
    logits = model.lm_head(body.last_hidden_state)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) + aux_loss(body.aux)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for module in model.modules():
        after: Any = getattr(module, "after_step", None)
        if after:
            after()
    return body.aux


@torch.no_grad()
def _tested(model: Any, ctx: Context) -> float:
    model.eval()
    batch = windows(corpus()[1], TEST_WINDOWS, ctx.rng("test"))
    logits = model(batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()
