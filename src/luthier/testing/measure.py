"""Checks of Measures: models are left alone, twins measure alike, a planted difference is found."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from luthier.catalogue import Card, find
from luthier.flows import Table
from luthier.kit.context import Context
from luthier.kit.encode import collate, encode, prompt_ids
from luthier.testing import Check, must, tiny
from luthier.testing.reduction import distance
from luthier.testing.variants import variants

BETTER = {"nll": -1, "perplexity": -1, "accuracy": 1}
"""Which way a known metric improves; in a table without one, only a difference is asked for."""
LENGTH = 4
CPU_SECONDS = 20.0


def checks(entry: Card) -> list[Check]:
    every = [runs, same_seed, models_unchanged, twins_agree, planted_signal, order_of_models]
    return [Check(f.__name__.replace("_", " "), partial(f, entry)) for f in every]


def quick(cls: Any) -> list[Any]:
    """The variants of a measure, two a field at most, with short answers where it generates."""
    base, *others = (_short(m) for m in variants(cls))
    of_field: dict[str, list[Any]] = {}
    for one in others:
        changed = (f.name for f in dataclasses.fields(cls) if getattr(one, f.name) != getattr(base, f.name))
        of_field.setdefault(next(changed, ""), []).append(one)
    return [base, *(one for name, several in of_field.items() if name for one in several[:2])]


def _short(method: Any) -> Any:
    return method.replace(max_new_tokens=LENGTH) if hasattr(method, "max_new_tokens") else method


def data() -> tiny.TinyData:
    """Sums that answers can be scored on; with batches of two, one stands alone."""
    return tiny.task_data(train=24, test=5)


@cache
def _planted() -> dict[str, torch.Tensor]:
    """Weights of a tiny model that has learnt the test answers, and three more, by heart."""
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    batch = collate([encode(i, tokenizer) for i in tiny.task_data(train=24, test=8).test], 0)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        model(**batch).loss.backward()
        optim.step()
        optim.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def subjects(*names: str) -> list[tiny.TinySubject]:
    """Tiny models by name: `good` has learnt the answers, all others are the same untrained one."""
    made = []
    for name in names:
        model = tiny.llama()
        if name == "good":
            model.load_state_dict(_planted(), strict=False)
        made.append(tiny.subject(name, model))
    return made


def measure(method: Any, *names: str, seed: int = 0) -> Table:
    ctx = Context(seed=seed, step="contract", roles={"paired_to": "base"})
    return method.measure(subjects(*names), [data()], ctx)


@cache
def measured(method: Any) -> tuple[Table, float]:
    """What `measure` says of an untrained model and a good one, and the CPU seconds that took: once for all checks
    that ask, while `same_seed` asks anew."""
    began = time.process_time()
    table = measure(method, "base", "good")
    return table, time.process_time() - began


def outcome(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """{"model column values": number} of the tiny models. given: {"models": how many}."""
    return numbers(measure(_short(method), *_named(given)))


def _named(given: Mapping[str, Any]) -> tuple[str, ...]:
    return ("base", "good", "twin")[: given.get("models", 2)]


def _loss(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' own loss of each item's answer, one item a batch."""
    found: dict[str, Any] = {}
    for one in subjects(*_named(given)):
        for item in data().test:
            row = encode(item, one.tokenizer)
            with torch.no_grad():
                loss = one.model(**collate([row], 0, multiple=1)).loss
            words = f"{one.name}/{data().name}/{item.id}/nll"
            found |= {f"{words}/value": loss.item(), f"{words}/tokens": row.count}
    return found


def _greedy(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' own greedy generation answers, one prompt a batch, scored by the data."""
    found: dict[str, Any] = {}
    for one in subjects(*_named(given)):
        for item in data().test:
            ids = torch.tensor([prompt_ids(item, one.tokenizer)])
            host: Any = one.model
            made = host.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH, pad_token_id=0
            )[0, ids.shape[1] :]
            right = data().score(item, one.tokenizer.decode(made, skip_special_tokens=True)) == 1
            words = f"{one.name}/{data().name}/{item.id}/accuracy"
            found |= {f"{words}/value": float(right), f"{words}/tokens": len(made)}
    return found


def _means(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the items of what the method's own measures say of one model; losses weigh by tokens."""
    found: dict[str, Any] = {}
    for inner in method.measures:
        rows = measure(inner, "base").dicts()
        weights = [row["tokens"] if row["metric"] == "nll" else 1 for row in rows]
        mean = math.fsum(row["value"] * w for row, w in zip(rows, weights, strict=True)) / sum(weights)
        words = f"base/{data().name}/{rows[0]['metric']}/base"
        found |= {f"{words}/mean": mean, f"{words}/n": len(rows)}
    return found


def _mean_loss(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The mean of transformers' loss over the labels of all items."""
    per, found = _loss(method, given), {}
    for one in _named(given):
        items = [f"{one}/{data().name}/{item.id}/nll" for item in data().test]
        total = math.fsum(per[f"{words}/value"] * per[f"{words}/tokens"] for words in items)
        words = f"{one}/{data().name}/nll"
        mean = total / sum(per[f"{item}/tokens"] for item in items)
        found |= {f"{words}/value": mean, f"{words}/n": len(items)}
    return found


def _shares(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The mean of transformers' greedy answers of each model; a drawn training answer, and the commonest one."""
    per, found, items = _greedy(method, given), {}, data().test
    known = [item.answer for item in data().train]
    common = max(dict.fromkeys(known), key=known.count)
    right = {name: [per[f"{name}/{data().name}/{i.id}/accuracy/value"] for i in items] for name in _named(given)}
    right |= {"chance": [known.count(i.answer) / len(known) for i in items]}
    right |= {"majority": [float(i.answer == common) for i in items]}
    for name, values in right.items():
        words = f"{name}/{data().name}/all/accuracy"
        found |= {f"{words}/value": math.fsum(values) / len(values), f"{words}/items": len(values)}
    return found


PEERS: dict[str, Any] = {
    "greedy answers and a draw": _shares,
    "transformers.loss": _loss,
    "mean of transformers.loss": _mean_loss,
    "transformers.greedy": _greedy,
    "means of its measures": _means,
}


def numbers(table: Table, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every number of a table under a name made of the row's words, its layer if it has one, and the column."""
    found: dict[str, Any] = {}
    for row in table.dicts():
        named = {k: v for k, v in row.items() if isinstance(v, str) or (k == "layer" and v is not None)}
        words = [str(v) for k, v in named.items() if k not in but]
        for column, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found["/".join([*words, column])] = value
    return found


def runs(entry: Card) -> None:
    """A table with rows for every model, finite numbers only, equal after JSON, quick."""
    for method in quick(find(entry.id)):
        table, seconds = measured(method)
        must(seconds < CPU_SECONDS, f"{method} takes over {CPU_SECONDS} s of CPU time")
        must({r["model"] for r in table.dicts()} >= {"good"}, f"{method}: no row of a model")
        must(numbers(table), f"{method}: a table without numbers")
        must(all(math.isfinite(v) for v in numbers(table).values()), f"{method}: not every number is finite")
        must(Table.from_json(table.to_json()) == table, f"{method}: the table changes by JSON")


def same_seed(entry: Card) -> None:
    for method in quick(find(entry.id)):
        first, _ = measured(method)
        torch.rand(3)
        must(measure(method, "base", "good") == first, f"{method} is not decided by its seed")


def models_unchanged(entry: Card) -> None:
    """Weights, modes, gradients' flags and hooks are as before."""
    for method in quick(find(entry.id)):
        several = subjects("base", "good")
        with untouched(several[0].model), untouched(several[1].model):
            method.measure(several, [data()], Context(step="contract", roles={"paired_to": "base"}))


def twins_agree(entry: Card) -> None:
    """A model with the same weights under another name gets the same numbers; a difference to it is 0."""
    for method in quick(find(entry.id)):
        both = measure(method, "base", "twin")
        for row in (r for r in both.dicts() if r["model"] == "twin"):
            must(not row.get("diff"), f"{method}: a twin differs by {row.get('diff')}")
        plain, alone = (numbers(t, but=("model",)) for t in (both, measure(method, "base")))
        for name in alone.keys() & plain.keys():
            gap = distance(float(alone[name]), float(plain[name]))
            must(gap == 0, f"{method}: {name} of a twin differs by {gap:g}")


def planted_signal(entry: Card) -> None:
    """The model that knows the answers stands out, on the right side where the metric has one."""
    for method in quick(find(entry.id)):
        every = gains(measured(method)[0])
        judged = {m: g for m, g in every.items() if m in BETTER} or every
        for metric, gain in judged.items():
            side = BETTER.get(metric, math.copysign(1, gain))
            must(side * gain > 0.1, f"{method}: {metric} moves by {gain:g} where a model knows the answers")
        must(judged, f"{method}: no metric to judge")


def gains(table: Table) -> dict[str, float]:
    """metric -> the good model's mean minus the base's, or the difference the table itself states."""
    rows = table.dicts()
    found = {}
    for metric in dict.fromkeys(str(r.get("metric", "value")) for r in rows):
        mine = [r for r in rows if str(r.get("metric", "value")) == metric]
        good = [r for r in mine if r["model"] == "good"]
        if "diff" in table.columns:
            found[metric] = sum(r["diff"] for r in good) / len(good)
        else:
            base = [r for r in mine if r["model"] == "base"]
            found[metric] = sum(r["value"] for r in good) / len(good) - sum(r["value"] for r in base) / len(base)
    return found


def order_of_models(entry: Card) -> None:
    """What is said of a model does not depend on which models are measured before it."""
    for method in quick(find(entry.id)):
        forth, back = (numbers(t) for t in (measured(method)[0], measure(method, "good", "base")))
        must(forth == back, f"{method}: the order of the models changes the numbers")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Raise if the block changes a weight, a buffer, a mode, a gradient or leaves a hook."""
    before, bytes_ = _state(model), {k: v.clone() for k, v in model.state_dict().items()}
    yield
    after = model.state_dict()
    must(list(after) == list(bytes_), "tensors came or went")
    changed = [n for n, t in bytes_.items() if not torch.equal(t, after[n])]
    must(not changed, f"changed: {', '.join(changed)}")
    for mine, other in zip(before, _state(model), strict=True):
        must(mine == other, f"{other[0] or 'the model'} is left in another state: {other[1:]}, was {mine[1:]}")


def _state(model: nn.Module) -> list[tuple]:
    modules = [(n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    return [*modules, *((n, p.requires_grad, p.grad is None) for n, p in model.named_parameters())]
