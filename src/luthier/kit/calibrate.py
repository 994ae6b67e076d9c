"""Looking at a model with a few items: which, and how gradients are met without being kept.

N: labelled places, V: words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.flows import Ctx, Data
from luthier.kit.encode import Row, encode

ROWS = 64
"""Places whose probabilities exist at once in double precision."""


def drawn(source: Data, tokenizer: Any, count: int, max_length: int, ctx: Ctx) -> list[tuple[str, Row]]:
    """(id, row) of `count` training items with something to predict, or of as many as there are.

    Which ones depends on the seed and the source alone, so that experts that share data see the same items.
    """
    order = torch.randperm(len(source.train), generator=ctx.rng("items", source.name)).tolist()
    found: list[tuple[str, Row]] = []
    for item in (source.train[i] for i in order):
        if len(found) == count:
            break
        if item.prompt is None or item.answer is not None:
            row = encode(item, tokenizer, max_length)
            found += [(item.id, row)] if row.count else []
    if not found:
        raise LuthierError(f"{source.name} has no training item with anything to predict", where="data")
    return found


def sampled(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """A word for each place, drawn by the probabilities; the generator is one of the CPU."""
    chance_N1 = torch.rand(len(logits_NV), 1, generator=generator, dtype=torch.float64)
    drawn_N1 = []
    for rows_NV, at_N1 in zip(logits_NV.detach().split(ROWS), chance_N1.split(ROWS), strict=True):
        reached_NV = rows_NV.cpu().double().softmax(-1).cumsum(-1)
        drawn_N1.append(torch.searchsorted(reached_NV, at_N1 * reached_NV[:, -1:], right=True))
    return torch.cat(drawn_N1).squeeze(-1).clamp(max=logits_NV.shape[-1] - 1).to(logits_NV.device)


@contextmanager
def each_gradient(model: nn.Module, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the block a backward pass hands every parameter's gradient to take(name, gradient) as soon as it is
    complete, and keeps none: the most that exists at once is one of them. The model is left as it was."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}

    def hook(name: str) -> Callable[[Tensor], None]:
        def taken(p: Tensor) -> None:
            assert p.grad is not None
            take(name, p.grad)
            p.grad = None

        return taken

    hooks = []
    try:
        for name, p in model.named_parameters():
            if p.is_floating_point():
                p.grad = None
                p.requires_grad_(True)
                hooks.append(p.register_post_accumulate_grad_hook(hook(name)))
        with torch.enable_grad():
            yield
    finally:
        for one in hooks:
            one.remove()
        for p, (wanted, grad) in before.items():
            p.requires_grad_(wanted)
            p.grad = grad
