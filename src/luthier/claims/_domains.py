"""The experiment that claims about merges share: specialists of one small decoder, merged.

The base reads Python source, byte by byte (`_scratch`). Three specialists go on from it, each with all
weights, on the same source retold: in capitals, with every line backwards, without blanks. A merge is
judged by its mean loss over the three, in nats per byte, on files that nobody trained on. A scale is
chosen on windows of the training files that are used for nothing else; methods have equally many to
choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from luthier.claims._scratch import BATCH, LENGTH, RATE, SIZES, _share, _step, corpus, windows
from luthier.engine.stream import transform_tensors
from luthier.kit.context import Context
from luthier.model import build_model
from luthier.shapes import Transform

BASE_STEPS, STEPS, TEST_WINDOWS, CHOICE_WINDOWS = 250, 80, 64, 24
DOMAINS: dict[str, Callable[[bytes], bytes]] = {
    "capitals": bytes.upper,
    "backwards": lambda text: b"\n".join(line[::-1] for line in text.split(b"\n")),
    "without blanks": lambda text: text.replace(b" ", b""),
}
Weights = dict[str, Tensor]


@cache
def told(domain: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of a domain (None: as they are) to train on, to choose by and to test on."""
    train, test = (bytes(side.numpy()) for side in corpus())
    cut = len(train) * 19 // 20
    retell = DOMAINS[domain] if domain else bytes
    return tuple(torch.frombuffer(bytearray(retell(t)), dtype=torch.uint8) for t in (train[:cut], train[cut:], test))  # type: ignore[return-value]


def base(seed: int, ctx: Context) -> Weights:
    """The base of this seed, trained once for all claims that ask."""
    make = lambda: _trained(seed, ctx.with_(seed=seed), None, None, BASE_STEPS, RATE)  # noqa: E731
    return ctx.cached("merge-claims-base", {"seed": seed, "steps": BASE_STEPS, "sizes": SIZES}, make)


def specialist(seed: int, ctx: Context, domain: str, run: int = 0, rate: float = RATE / 2) -> Weights:
    """The base trained on in one domain. run: numbers the data order."""
    start = base(seed, ctx)
    make = lambda: _trained(seed, ctx.with_(seed=seed), start, domain, STEPS, rate, run)  # noqa: E731
    key = {"seed": seed, "domain": domain, "run": run, "rate": rate, "steps": [BASE_STEPS, STEPS], "sizes": SIZES}
    return ctx.cached("merge-claims", key, make)


def specialists(seed: int, ctx: Context) -> list[Weights]:
    """One of each domain."""
    return [specialist(seed, ctx, domain) for domain in DOMAINS]


def merged(method: Transform, start: Weights, experts: Sequence[Weights], ctx: Context) -> Weights:
    return transform_tensors(method, start, experts, ctx)


def chosen(
    methods: Sequence[Transform], start: Weights, experts: Sequence[Weights], seed: int, ctx: Context,
    among: Sequence[str | None] = tuple(DOMAINS),
) -> Weights:  # fmt: skip
    """The merge whose mean loss over the domains is lowest on the windows to choose by."""
    made = [merged(method, start, experts, ctx) for method in methods]
    return min(made, key=lambda weights: mean_loss(weights, seed, ctx, 1, among))


def mean_loss(
    weights: Weights, seed: int, ctx: Context, side: int = 2, among: Sequence[str | None] = tuple(DOMAINS)
) -> float:
    """Mean over the domains `among`, None for the source as it is. side: 1 to choose by, 2 to test on."""
    return sum(loss(weights, domain, seed, ctx, side) for domain in among) / len(among)


@torch.no_grad()
def loss(weights: Weights, domain: str | None, seed: int, ctx: Context, side: int = 2) -> float:
    """Mean loss in nats per byte on windows that are the same for all weights of a seed."""
    model = _model(weights, seed).eval()
    count = TEST_WINDOWS if side == 2 else CHOICE_WINDOWS
    batch = windows(told(domain)[side], count, ctx.with_(seed=seed).rng("windows", domain, side))
    logits = model(batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()


def _model(weights: Weights | None, seed: int) -> Any:
    model = build_model({**SIZES, "slots": {}}, seed)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def _trained(
    seed: int, ctx: Context, start: Weights | None, domain: str | None, steps: int, rate: float, run: int = 0
) -> Weights:
    model = _model(start, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * _share(step * 250 // steps)
        _step(model, optimizer, windows(told(domain)[0], BATCH, ctx.rng("train", domain, run, step)))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


COST = {
    "cost/tokens of the base": float(BASE_STEPS * BATCH * LENGTH),
    "cost/tokens a specialist": float(STEPS * BATCH * LENGTH),
}
