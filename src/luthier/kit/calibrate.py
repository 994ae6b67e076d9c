"""Looking at a model with a few items: which ones, and how gradients and inputs are met without being kept.

N: labelled places, V: words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

    Which ones depends on the seed, the step and the source, so that experts that share data see the same items. None
    comes twice.
    """
    order = torch.randperm(len(source.train), generator=ctx.rng("items", source.name)).tolist()
    found: dict[str, Row] = {}
    for item in (source.train[i] for i in order):
        if len(found) == count:
            break
        if item.id not in found and (item.prompt is None or item.answer is not None):
            row = encode(item, tokenizer, max_length)
            found |= {item.id: row} if row.count else {}
    if not found:
        raise LuthierError(f"{source.name} has no training item with anything to predict", where="data")
    return list(found.items())


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


def linears(model: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Live name of a weight → (its linear layer, whether it lies as (in, out)), tied weights once.

    A head that is tied to the embedding is left out: what the embedding looks up is no input to multiply.
    """
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[int, tuple[str, nn.Module, bool]] = {}
    for name, module in model.named_modules():
        turned = type(module).__name__ == "Conv1D"  # GPT-2's linear layer
        if (turned or isinstance(module, nn.Linear)) and id(module.weight) not in tied:
            found.setdefault(id(module.weight), (f"{name}.weight", module, turned))
    return {name: (module, turned) for name, module, turned in found.values()}


@contextmanager
def each_input(layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the block every call of one of these layers hands its input to take(name, x)."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs: take(name, inputs[0])

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def sharing(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, str]:
    """Name → the first layer that is given the very same inputs, itself where there is none, as `run` shows."""
    last: list[Tensor] = []
    seen: dict[str, list[int]] = {name: [] for name in layers}
    serial = 0

    def take(name: str, x: Tensor) -> None:
        nonlocal serial
        if not last or last[0] is not x:
            serial += 1
            last[:] = [x]
        seen[name].append(serial)

    with each_input(layers, take):
        run()
    first: dict[tuple[int, ...], str] = {}
    return {name: first.setdefault(tuple(calls), name) for name, calls in seen.items() if calls}
