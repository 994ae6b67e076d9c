"""Checks of Decodes: batches do not matter, costs are counted honestly, a trace replays."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from luthier.catalogue import Card, find
from luthier.flows import Trace
from luthier.kit.context import Context
from luthier.kit.decoding import limited
from luthier.shapes import Decode
from luthier.testing import Check, must, tiny
from luthier.testing.measure import untouched
from luthier.testing.variants import variants

PROMPTS = ("3 + 4 =", "the number after 12", "a", "7 is the number before 8, and after")
LENGTH = 10
CPU_SECONDS = 5.0
WHY = {"eos", "stop", "length"}


def checks(entry: Card) -> list[Check]:
    every = [
        runs, same_seed, seeds_differ, batch_is_single, text_is_ids, steps_stream, forwards_are_counted,
        replays, models_unchanged,
    ]  # fmt: skip
    return [Check(f.__name__.replace("_", " "), partial(f, entry)) for f in every]


def quick(cls: Any) -> list[Any]:
    """The variants of a decoder, made short, as far as they can be."""
    return list(dict.fromkeys(limited(m, LENGTH) for m in variants(cls)))


def decode(method: Any, prompts: Any = PROMPTS, seed: int = 0, model: nn.Module | None = None) -> Trace:
    """The trace of the tiny model."""
    host = tiny.host(method.needs) if model is None else model
    decoding = method.steps([(host, tiny.tokenizer())], list(prompts), Context(seed=seed, step="contract"))
    for _ in decoding:
        pass
    return decoding.trace()


def outcome(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens and texts of the tiny model, at most `LENGTH` new tokens a prompt."""
    trace = decode(limited(method, LENGTH))
    return {"tokens": [_bare(row) for row in trace.tokens], "texts": list(trace.texts)}


def _greedy(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' own greedy generation, one prompt at a time."""
    model: Any = tiny.llama()
    tokenizer = tiny.tokenizer()
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH, pad_token_id=0
        )
        rows.append(_bare(made[0, ids.shape[1] :].tolist()))
    return {"tokens": rows, "texts": [tokenizer.decode(r, skip_special_tokens=True) for r in rows]}


def _fill_mask(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' way with masked words: the likeliest other token at each mask, one prompt at a time."""
    model, tokenizer = tiny.host(method.needs), tiny.tokenizer()
    mask, rows = model.config.mask_token_id, []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"] + [mask] * LENGTH])
        with torch.no_grad():
            logits_LV = model(ids).logits[0, -LENGTH:]
        rows.append(_bare(logits_LV.index_fill(1, torch.tensor([mask]), -torch.inf).argmax(-1).tolist()))
    return {"tokens": rows, "texts": [tokenizer.decode(r, skip_special_tokens=True) for r in rows]}


PEERS: dict[str, Any] = {"transformers.greedy": _greedy, "transformers.fill_mask": _fill_mask}


def _bare(row: Any) -> tuple[int, ...]:
    """A row without the end-of-sequence token and what follows: whether it is kept is the method's choice."""
    row = tuple(int(t) for t in row)
    return row[: row.index(1)] if 1 in row else row


def deterministic(method: Any) -> bool:
    """Three seeds give the same tokens."""
    return len({decode(method, seed=s).tokens for s in range(3)}) == 1


def runs(entry: Card) -> None:
    """One row a prompt, no longer than asked, its text decoded from its tokens, with the reason it ended."""
    tokenizer = tiny.tokenizer()
    for method in quick(find(entry.id)):
        began = time.process_time()
        trace = decode(method)
        must(time.process_time() - began < CPU_SECONDS, f"{method} takes over {CPU_SECONDS} s of CPU time")
        must(len(trace.tokens) == len(trace.texts) == len(PROMPTS), f"{method}: not one row a prompt")
        must(len(trace.stopped) == len(PROMPTS) and set(trace.stopped) <= WHY, f"{method}: ended by {trace.stopped}")
        for row, text, why in zip(trace.tokens, trace.texts, trace.stopped, strict=True):
            must(0 < len(row) <= LENGTH, f"{method}: {len(row)} tokens, {LENGTH} allowed")
            must(why != "length" or len(row) == LENGTH, f"{method}: ended by length after {len(row)} tokens")
            whole = str(tokenizer.decode(list(row), skip_special_tokens=True))
            must(whole.startswith(text), f"{method}: {text!r} is not {whole!r}")


def same_seed(entry: Card) -> None:
    """Same seed, same trace, whatever the global generator has been through."""
    for method in quick(find(entry.id)):
        first = decode(method)
        torch.rand(3)
        must(decode(method) == first, f"{method} is not decided by its seed")


def seeds_differ(entry: Card) -> None:
    """Either every variant is deterministic by design, or some variant draws and heeds the seed."""
    draws = [m for m in quick(find(entry.id)) if getattr(m, "temperature", 0)]
    must(not draws or any(not deterministic(m) for m in draws), f"no variant of {entry.id} heeds the seed")


def batch_is_single(entry: Card) -> None:
    """A batch gives each prompt what it gets alone, where nothing is drawn."""
    tried = 0
    for method in quick(find(entry.id)):
        if deterministic(method):
            together = decode(method).tokens
            alone = tuple(decode(method, [p]).tokens[0] for p in PROMPTS)
            must(together == alone, f"{method}: {together} in a batch, {alone} alone")
            tried += 1
    must(tried, "no variant was tried")


def text_is_ids(entry: Card) -> None:
    """A prompt as text and as token ids is the same prompt."""
    ids = [tiny.tokenizer()(p)["input_ids"] for p in PROMPTS]
    method = quick(find(entry.id))[0]
    must(decode(method, ids) == decode(method), "token ids as prompts give another trace")


def steps_stream(entry: Card) -> None:
    """Steps come while it decodes: after the first, the host has not yet run to the end."""
    method = quick(find(entry.id))[0]
    model = tiny.host(method.needs)
    with counted(model) as calls:
        steps = iter(method.steps([(model, tiny.tokenizer())], list(PROMPTS), Context(step="contract")))
        next(steps)
        early = len(calls)
        rest = sum(1 for _ in steps)
        must(rest > 0 and early < len(calls), "all was decoded before the first step was given")


def forwards_are_counted(entry: Card) -> None:
    """The trace counts the model's forward passes truly; they are never above what the tokens take one by one,
    nor above those of the decode that hosts the method."""
    for method in quick(find(entry.id)):
        model = tiny.host(method.needs)
        with counted(model) as calls:
            trace = decode(method, model=model)
        must(trace.forwards == len(calls), f"{method} says {trace.forwards} forwards, the model ran {len(calls)}")
        need = LENGTH if "bidirectional" in method.needs else max(len(_bare(row)) for row in trace.tokens) + 1
        must(trace.forwards <= need, f"{method}: {trace.forwards} forwards for {need} tokens")
        for host in (getattr(method, f.name) for f in dataclasses.fields(method)):
            if isinstance(host, Decode):
                least = decode(host).forwards
                must(trace.forwards <= least, f"{method}: {trace.forwards} forwards, its host takes {least}")
        must(trace.cache_bytes >= 0, "a cache has at least 0 bytes")


def replays(entry: Card) -> None:
    """Fed back, a deterministic trace is what the model would choose: token for token."""
    method = quick(find(entry.id))[0]
    must(deterministic(method), "the default draws: nothing to replay")
    model, tokenizer = tiny.host(method.needs), tiny.tokenizer()
    if "bidirectional" in method.needs:
        _replay_drafts(method, model, tokenizer)
        return
    for prompt, row in zip(PROMPTS, decode(method).tokens, strict=True):
        ids = [*tokenizer(prompt)["input_ids"], *row]
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        must(best[len(ids) - len(row) - 1 : -1] == list(row), f"the host would not have chosen {row}")


def _replay_drafts(method: Any, model: Any, tokenizer: Any) -> None:
    """Each draft fills masked places only, with the likeliest token given what stood there before."""
    mask, made = model.config.mask_token_id, [[model.config.mask_token_id] * LENGTH for _ in PROMPTS]
    decoding = method.steps([(model, tokenizer)], list(PROMPTS), Context(step="contract"))
    for draft in decoding:
        for row, after in zip(draft.rows, draft.canvas_BL.tolist(), strict=True):
            ids = [*tokenizer(PROMPTS[row])["input_ids"], *made[row]]
            with torch.no_grad():
                logits_LV = model(torch.tensor([ids])).logits[0, -LENGTH:]
            best = logits_LV.index_fill(1, torch.tensor([mask]), -torch.inf).argmax(-1).tolist()
            pairs = zip(made[row], after, best, strict=True)
            must(all(new in ((old,) if old != mask else (mask, top)) for old, new, top in pairs), "not what it chose")
            must(after != made[row], "a draft decides nothing")
            made[row] = after
    for row, kept in zip(made, decoding.trace().tokens, strict=True):
        must(tuple(row[: len(kept)]) == kept and mask not in kept, f"the drafts give {row}, the trace {kept}")


def models_unchanged(entry: Card) -> None:
    for method in quick(find(entry.id)):
        model = tiny.host(method.needs)
        with untouched(model):
            decode(method, model=model)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """A list that grows by one at each forward pass of the model."""
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()
