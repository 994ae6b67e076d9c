"""Checks of Objectives: labels alone count, padding and batching do not, gradients arrive."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luthier.catalogue import Card, find
from luthier.flows import Loss
from luthier.kit.context import Context
from luthier.testing import Check, must, tiny
from luthier.testing.reduction import same
from luthier.testing.variants import variants

Batch = dict[str, Tensor]
IGNORE = -100
SEEDS = 50
"""draws over which noise has to average out"""


def checks(entry: Card) -> list[Check]:
    return [Check(name, partial(f, entry)) for name, f in CHECKS.items()]


def batch() -> Batch:
    """Three rows of 10, 7 and 5 tokens, padded on the right to 10; some labels left out."""
    ids_BT = torch.randint(4, tiny.VOCAB, (3, 10), generator=torch.Generator().manual_seed(5))
    mask_BT = torch.arange(10)[None] < torch.tensor([10, 7, 5])[:, None]
    labels_BT = torch.where(mask_BT, ids_BT, IGNORE)
    labels_BT[0, :6] = IGNORE
    labels_BT[2, 3] = IGNORE
    return {"input_ids": torch.where(mask_BT, ids_BT, 0), "attention_mask": mask_BT.long(), "labels": labels_BT}


def rows(whole: Batch, start: int, stop: int) -> Batch:
    return {key: value[start:stop] for key, value in whole.items()}


def loss_of(method: Any, given: Batch | None = None, model: Any = None, seed: int = 0) -> Loss:
    host = tiny.host(method.needs) if model is None else model
    return method.loss(host, batch() if given is None else given, Context(seed=seed, step="contract"))


def labels_of(method: Any) -> int:
    """How many labels of the batch count: a model that looks both ways predicts a row's first token too."""
    return int((batch()["labels"][:, "bidirectional" not in method.needs :] != IGNORE).sum())


def outcome(method: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The loss of a fixed batch and the gradients of the tiny model."""
    model = tiny.host(method.needs)
    loss = loss_of(method, model=model).total
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def _transformers(method: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    model = tiny.llama()
    loss = model(**batch()).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def _masked_lm(method: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """transformers' loss of masked language models, with the mask token at every label."""
    from transformers.loss.loss_utils import ForMaskedLMLoss

    model, whole = tiny.host(method.needs), batch()
    ids_BT = torch.where(whole["labels"] != IGNORE, model.config.mask_token_id, whole["input_ids"])
    logits_BTV = model(ids_BT, attention_mask=whole["attention_mask"]).logits
    loss = ForMaskedLMLoss(logits_BTV, whole["labels"], tiny.VOCAB)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


PEERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "transformers.loss": _transformers, "transformers.masked_lm": _masked_lm,
}  # fmt: skip


def a_scalar_with_terms(entry: Card) -> None:
    """total is a finite scalar that carries a gradient; terms are detached; count is that of the labels or rows."""
    for method in variants(find(entry.id)):
        loss = loss_of(method)
        must(loss.total.dim() == 0 and bool(loss.total.isfinite()), f"{method}: total is {loss.total}")
        must(loss.total.requires_grad, f"{method}: total carries no gradient")
        must(not any(t.requires_grad for t in loss.terms.values()), f"{method}: a term carries a gradient")
        units = (labels_of(method), len(batch()["labels"]))
        must(loss.count in units, f"{method}: count is {loss.count} for {units[0]} labels in {units[1]} rows")


def gradients_arrive(entry: Card) -> None:
    """Every parameter gets a finite gradient."""
    for method in variants(find(entry.id)):
        grads, names = outcome(method, {}), [n for n, _ in tiny.host(method.needs).named_parameters()]
        missing = [n for n in names if n not in grads or not bool(grads[n].isfinite().all())]
        must(not missing, f"{method}: no gradient at {missing[:3]}")


def padding_does_not_count(entry: Card) -> None:
    """More padding, on either side, changes nothing but rounding."""
    for method in variants(find(entry.id)):
        plain, wide = loss_of(method), batch()
        fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
        for side in (True, False):
            padded = {}
            for key, value in wide.items():
                pad = torch.full((3, 4), fill[key])
                padded[key] = torch.cat([pad, value] if side else [value, pad], 1)
            gap = abs(loss_of(method, padded).total.item() - plain.total.item())
            must(gap < 1e-5, f"{method}: padding changes the loss by {gap:g}")


def batches_join_by_count(entry: Card) -> None:
    """total * count adds up over the parts of a batch, so accumulation gives the loss of the whole: at once, or,
    where noise is drawn for a batch as a whole, on average over seeds."""
    for method in variants(find(entry.id)):
        gaps = [_gap_of_parts(method, 0)]
        if gaps[0] > 1e-5 and loss_of(method).total != loss_of(method, seed=1).total:
            gaps = [_gap_of_parts(method, seed, absolute=False) for seed in range(SEEDS)]
        mean, spread = sum(gaps) / len(gaps), float(torch.tensor(gaps).std()) if len(gaps) > 1 else 0.0
        allowed = 1e-5 + 4 * spread / len(gaps) ** 0.5
        must(abs(mean) < allowed, f"{method}: parts of a batch differ from the whole by {mean:g}")


def _gap_of_parts(method: Any, seed: int, absolute: bool = True) -> float:
    with torch.no_grad():
        whole = loss_of(method, seed=seed).total.item()
        parts = [loss_of(method, rows(batch(), i, j), seed=seed) for i, j in ((0, 1), (1, 3))]
    gap = sum(p.total.item() * p.count for p in parts) / sum(p.count for p in parts) - whole
    return abs(gap) if absolute else gap


def only_labels_matter(entry: Card) -> None:
    """Tokens after a row's last label do not matter, unless the model looks both ways; a label does, in some draw."""
    for method in variants(find(entry.id)):
        after, other = batch(), batch()
        after["labels"][0, 8:] = other["labels"][0, 8:] = IGNORE
        after["input_ids"][0, 8:] = 9
        peeks = abs(loss_of(method, after).total.item() - loss_of(method, other).total.item()) >= 1e-6
        must("bidirectional" in method.needs or not peeks, f"{method}: peeks")
        changed = batch()
        changed["labels"][1, 5] = (changed["labels"][1, 5] + 1) % tiny.VOCAB
        gaps = (loss_of(method, changed, seed=s).total.item() - loss_of(method, seed=s).total.item() for s in range(8))
        must(any(abs(gap) > 1e-4 for gap in gaps), f"{method}: a label does not matter")


def no_labels_no_loss(entry: Card) -> None:
    """A batch without labels counts 0 and pulls nowhere."""
    for method in variants(find(entry.id)):
        model, empty = tiny.host(method.needs), batch()
        empty["labels"] = torch.full_like(empty["labels"], IGNORE)
        loss = loss_of(method, empty, model)
        loss.total.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        must(loss.count == 0 and loss.total.item() == 0.0, f"{method}: {loss.total.item()} over {loss.count} labels")
        must(all(bool((g == 0).all()) for g in grads), f"{method}: a gradient from no labels")


def leaves_no_trace(entry: Card) -> None:
    """Same bytes twice; model, batch and the global generator are as before."""
    for method in variants(find(entry.id)):
        model, given, state = tiny.host(method.needs), batch(), torch.get_rng_state()
        names = set(vars(model))
        weights = copy.deepcopy(model.state_dict())
        first = loss_of(method, given, model).total.detach()
        same({"loss": loss_of(method, given, model).total.detach()}, {"loss": first}, 0.0, f"{method} twice")
        same(model.state_dict(), weights, 0.0, f"weights after {method}")
        same(given, batch(), 0.0, f"batch after {method}")
        must(torch.equal(state, torch.get_rng_state()), f"{method} draws from the global generator")
        must(set(vars(model)) == names and not model._forward_hooks, f"{method} leaves something on the model")


def half_precision(entry: Card) -> None:
    """A model in bfloat16 gives a finite loss in fp32, near that of the same weights in fp32."""
    for method in variants(find(entry.id)):
        half = loss_of(method, model=tiny.host(method.needs, dtype=torch.bfloat16)).total
        full = loss_of(method).total
        must(half.dtype == torch.float32 and abs(half - full) < 0.05, f"{method}: {half} in bfloat16, {full} in fp32")


CHECKS: dict[str, Callable[[Card], None]] = {
    f.__name__.replace("_", " "): f
    for f in (
        a_scalar_with_terms, gradients_arrive, padding_does_not_count, batches_join_by_count, only_labels_matter,
        no_labels_no_loss, leaves_no_trace, half_precision,
    )
}  # fmt: skip
"""Each check by name, a callable of the method's card."""
