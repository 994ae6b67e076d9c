"""Checks of Parts, each in a tiny decoder that has the Part in one of its slots.

Shapes: B sequences, T positions, D channels.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.catalogue import Card, find
from luthier.errors import LuthierError
from luthier.kit.parts import Aux, aux_loss
from luthier.model import LuthierForCausalLM, Spec
from luthier.testing import Check, must
from luthier.testing.decoders import (
    PEERS,
    PLAIN_CALL,
    SIZES,
    alone,
    at_home,
    call,
    config,
    decoder,
    outcome,
    states,
    tokens,
)  # fmt: skip
from luthier.testing.variants import variants

__all__ = ["CHECKS", "PEERS", "checks", "outcome"]

CPU_SECONDS = 5.0
TIGHT = 2e-5


def checks(entry: Card) -> list[Check]:
    """CHECKS, by the names that reports show."""
    return [Check(name, partial(check, entry)) for name, check in CHECKS.items()]


def runnable(entry: Card) -> Iterator[tuple[Any, str]]:
    """(method, slot) for every slot the Part fills and every variant that fits the tiny decoder."""
    for slot in entry.slots:
        for i, method in enumerate(variants(find(entry.id))):
            try:
                config(method, slot)
                Spec(config(method, slot)).at(0).part(slot) if slot not in PLAIN_CALL else None
            except LuthierError:
                must(i > 0, f"{method} does not fit the tiny decoder")
                continue
            yield method, slot


def runs_quickly(entry: Card) -> None:
    began = time.process_time()
    for method, slot in runnable(entry):
        out = decoder(method, slot)(tokens(2, 8), labels=tokens(2, 8))
        must(torch.isfinite(out.loss), f"{method}: the loss is {out.loss}")
        must(out.logits.shape == (2, 8, SIZES["vocab_size"]), f"{method}: logits {tuple(out.logits.shape)}")
    must(time.process_time() - began < CPU_SECONDS, f"over {CPU_SECONDS} s of CPU at tiny size")


def same_seed_same_bytes(entry: Card) -> None:
    """Weights depend on the seed and nothing else, and drawing them leaves the global generator alone."""
    for method, slot in runnable(entry):
        before = torch.get_rng_state()
        one, two, other = decoder(method, slot), decoder(method, slot), decoder(method, slot, seed=1)
        ids = tokens(2, 8)
        logits = [m(ids).logits for m in (one, two, other)]
        must(torch.equal(logits[0], logits[1]), f"{method}: one seed gave two models")
        must(not torch.equal(logits[0], logits[2]), f"{method}: two seeds gave one model")
        must(torch.equal(before, torch.get_rng_state()), f"{method} touches the global generator")


def input_untouched(entry: Card) -> None:
    for method, slot in runnable(entry):
        x_BTD = states().detach()
        before = x_BTD.clone()
        call(alone(method, slot), slot, x_BTD)
        must(torch.equal(x_BTD, before), f"{method} writes into its input")


def gradients_reach_every_parameter(entry: Card) -> None:
    for method, slot in runnable(entry):
        module = alone(method, slot)
        x_BTD = states()
        y_BTD, aux = call(module, slot, x_BTD)
        (y_BTD.square().sum() + aux_loss(aux)).backward()
        for name, p in [*module.named_parameters(), ("its input", x_BTD)]:
            must(p.grad is not None and p.grad.abs().sum() > 0, f"{method}: no gradient reaches {name}")


def gradients_are_right(entry: Card) -> None:
    """Against finite differences in fp64, aux losses included."""
    for method, slot in runnable(entry):
        module = alone(method, slot, torch.float64)
        names = [name for name, _ in module.named_parameters()]

        def run(x_BTD: Tensor, *values: Tensor, module: Any = module, names: Any = names, slot: str = slot) -> Any:
            y_BTD, aux = torch.func.functional_call(_Called(module, slot), _prefixed(names, values), (x_BTD,))
            return y_BTD, *(v for k, v in aux.items() if k.startswith("loss/"))

        inputs = (states(dtype=torch.float64).detach().requires_grad_(), *(p for p in module.parameters()))
        must(torch.autograd.gradcheck(run, inputs, fast_mode=True), f"{method}: wrong gradient")


class _Called(nn.Module):
    """The module behind the calling convention of its slot."""

    def __init__(self, module: nn.Module, slot: str):
        super().__init__()
        self.module, self.slot = module, slot

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Aux]:
        return call(self.module, self.slot, x_BTD)


def _prefixed(names: list[str], values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in zip(names, values, strict=True)}


def causality(entry: Card) -> None:
    """What comes later changes nothing before it, unless the Part looks both ways, and something at its place."""
    for method, slot in runnable(entry):
        model = decoder(method, slot)
        ids = tokens(2, 9)
        changed = ids.clone()
        changed[:, 5] = changed[:, 5] % 30 + 1
        one, two = model(ids).logits, model(changed).logits
        earlier = (one[:, :5] - two[:, :5]).abs().amax((0, 2))
        if model.model.looks_ahead:
            must(bool((earlier > TIGHT).all()), f"{method} says it looks both ways, and does not")
        else:
            must(earlier.max() <= TIGHT, f"{method}: a later token changes earlier logits")
        must((one[:, 5] - two[:, 5]).abs().max() > TIGHT, f"{method}: a token does not change its own logits")


def padding_invariance(entry: Card) -> None:
    """Padding on either side, and the other rows of a batch, change neither logits nor aux losses."""
    ids, pads, others = tokens(1, 6), torch.zeros(1, 3, dtype=torch.long), tokens(1, 9)
    for method, slot in runnable(entry):
        model = decoder(method, slot).train()
        plain = model(ids)
        for left in (True, False):
            row = torch.cat((pads, ids) if left else (ids, pads), 1)
            mask = row.ne(0).long()
            place = mask.cumsum(1).sub(1).clamp_min(0)
            real = slice(3, 9) if left else slice(0, 6)
            padded = model(row, attention_mask=mask, position_ids=place)
            _near(padded.logits[:, real], plain.logits, f"{method}: padding changes the logits")
            _near(_as_tensor(aux_loss(padded.aux)), _as_tensor(aux_loss(plain.aux)), f"{method}: padding enters aux")
            both = model(
                torch.cat((row, others)), attention_mask=torch.cat((mask, torch.ones_like(others))),
                position_ids=torch.cat((place, torch.arange(9)[None])),
            )  # fmt: skip
            _near(both.logits[:1, real], plain.logits, f"{method}: another row changes the logits")


def cached_is_uncached(entry: Card) -> None:
    """Token by token, and in chunks, the cache gives the logits of one pass over everything."""
    ids = tokens(2, 9)
    for method, slot in runnable(entry):
        model = decoder(method, slot)
        whole = model(ids, use_cache=False).logits
        if model.model.looks_ahead:
            _refuses_a_cache(model, ids)
            continue
        for cuts in ([4, 1, 1, 1, 1, 1], [1, 3, 5]):
            cache, parts = None, []
            for piece in ids.split(cuts, dim=1):
                out = model(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            _near(torch.cat(parts, 1), whole, f"{method}: cached in pieces of {cuts}")


def _refuses_a_cache(model: LuthierForCausalLM, ids: Tensor) -> None:
    must(model(ids).past_key_values is None, "a model that looks both ways gives a cache")
    try:
        model(ids, use_cache=True)
    except LuthierError:
        return
    raise AssertionError("a model that looks both ways takes a cache")


def reload_is_equal(entry: Card) -> None:
    """Saved and loaded through the Auto class, every byte is back, also after a step of its balancing."""
    from transformers import AutoModelForCausalLM

    ids = tokens(2, 8)
    for method, slot in runnable(entry):
        model = decoder(method, slot).train()
        model(ids)
        after_step(model)
        model.eval()
        with tempfile.TemporaryDirectory() as folder, _quiet():
            model.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder)
        must(type(again) is type(model), f"{method} comes back as {type(again).__name__}")
        must(again.config.slots == model.config.slots, f"{method}: the slots change on the way")
        for name, value in model.state_dict().items():
            must(torch.equal(value, again.state_dict()[name]), f"{method}: {name} changes on the way")
        must(torch.equal(at_home(again)(ids).logits, model(ids).logits), f"{method}: logits change on the way")


def after_step(model: nn.Module) -> None:
    """What a trainer does after an optimizer step."""
    for module in model.modules():
        step = getattr(module, "after_step", None)
        if step:
            step()


def finite_in_bf16(entry: Card) -> None:
    for method, slot in runnable(entry):
        model = decoder(method, slot).train()
        model.bfloat16()
        out = model(tokens(2, 8), labels=tokens(2, 8))
        out.loss.backward()
        must(out.logits.dtype == torch.bfloat16, f"{method} changes the dtype to {out.logits.dtype}")
        for name, p in model.named_parameters():
            must(p.grad is not None and bool(torch.isfinite(p.grad).all()), f"{method}: gradient of {name} in bf16")


def aux_is_summed_once(entry: Card) -> None:
    """Names and kinds of aux; losses, gradients and what is observed are the same under checkpointing."""
    for method, slot in runnable(entry):
        plain, saving = decoder(method, slot).train(), decoder(method, slot).train()
        saving.activation_checkpointing_enable()
        ids = tokens(2, 8)
        outs = [m(ids, labels=ids) for m in (plain, saving)]
        for out in outs:
            out.loss.backward()
            for name, value in out.aux.items():
                loss = name.startswith("loss/")
                must(loss or name.startswith("metric/"), f"{method}: aux {name!r} is neither loss/ nor metric/")
                must(value.dim() == 0 or not loss, f"{method}: {name} is no scalar")
                must(loss or not value.requires_grad, f"{method}: {name} carries a gradient")
        must(list(outs[0].aux) == list(outs[1].aux), f"{method}: checkpointing changes the names of aux")
        _near(outs[1].loss.detach(), outs[0].loss.detach(), f"{method}: checkpointing changes the loss")
        after_step(plain)
        after_step(saving)
        for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
            _near(_as_tensor(q.grad), _as_tensor(p.grad), f"{method}: checkpointing changes the gradient of {name}")
        for (name, p), q in zip(plain.named_buffers(), saving.buffers(), strict=True):
            must(torch.equal(p, q), f"{method}: checkpointing changes {name}")


def builds_on_meta(entry: Card) -> None:
    for method, slot in runnable(entry):
        with torch.device("meta"):
            model = LuthierForCausalLM(config(method, slot))
        must(all(p.is_meta for p in model.parameters()), f"{method} puts weights on a device of its own choice")
        must(list(model.state_dict()) == list(decoder(method, slot).state_dict()), f"{method}: other names on meta")


CHECKS: dict[str, Callable[[Card], None]] = {
    f.__name__.replace("_", " "): f
    for f in (
        runs_quickly, same_seed_same_bytes, input_untouched, gradients_reach_every_parameter, gradients_are_right,
        causality, padding_invariance, cached_is_uncached, reload_is_equal, finite_in_bf16, aux_is_summed_once,
        builds_on_meta,
    )
}  # fmt: skip


def _near(mine: Tensor, other: Tensor, says: str) -> None:
    gap = (mine - other).abs().max().item() / max(1.0, other.abs().max().item())
    must(gap <= TIGHT, f"{says} by {gap:g}")


def _as_tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))


class _quiet:
    """No progress bars of transformers while a check saves and loads."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *fault: Any) -> None:
        from transformers.utils import logging

        if self.shown:
            logging.enable_progress_bar()
