"""Items to token rows: chat templates, label masks, padding, packing.

Labels are aligned with the inputs, as in transformers: `labels[i]` is the token at place i if the
model should predict it (from the places before i), else IGNORE. The label of a row's first place is
never used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from luthier.errors import LuthierError, said
from luthier.flows import Item

IGNORE = -100


@dataclass(frozen=True)
class Row:
    """Token ids, and labels of the same length."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many tokens the row asks a model to predict."""
        return sum(label != IGNORE for label in self.labels[1:])


def encode(item: Item, tokenizer: Any, max_length: int | None = None) -> Row:
    """One item as one row.

    Text is labelled everywhere and cut at the end. A prompt with an answer is labelled on the answer
    and the end-of-sequence token, messages on the assistant's turns; both are cut at the front, so
    that the answer stays.
    """
    if item.text is not None:
        ids = tokenizer(item.text)["input_ids"][:max_length]
        return Row(tuple(ids), tuple(ids))
    if item.messages is not None:
        ids, labels = _conversation(item.messages, tokenizer)
    else:
        if item.answer is None:
            raise LuthierError(f"item {item.id} has a prompt and no answer", do="leave such items out")
        ids = prompt_ids(item, tokenizer)
        answer = _plain(item.answer, tokenizer) + _end(tokenizer)
        ids, labels = ids + answer, [IGNORE] * len(ids) + answer
    keep = -max_length if max_length else None
    return Row(tuple(ids[keep:]), tuple(labels[keep:]))


def prompt_ids(item: Item, tokenizer: Any, shots: Sequence[Item] = ()) -> list[int]:
    """What a model is given before it answers: the prompt, after solved examples if there are any.

    With a chat template the examples are earlier turns; without one, "prompt\\nanswer" paragraphs.
    Messages that end with the assistant's turn are given without it.
    """
    if item.messages is not None:
        turns = list(item.messages[:-1] if item.messages[-1]["role"] == "assistant" else item.messages)
    elif item.prompt is not None:
        turns = [{"role": "user", "content": item.prompt}]
    else:
        raise LuthierError(f"item {item.id} is plain text and asks for no answer", do="use eval.perplexity for text")
    solved = [turn for shot in shots for turn in _solved(shot)]
    if getattr(tokenizer, "chat_template", None):
        return _plain(_render(solved + turns, tokenizer, prompt=True), tokenizer)
    if item.messages is not None:
        raise LuthierError("the tokenizer has no chat template", do='write {"prompt": ..., "answer": ...} instead')
    text = "".join(f"{turn['content']}\n" + ("\n" if turn["role"] == "assistant" else "") for turn in solved + turns)
    return list(tokenizer(text)["input_ids"])


def collate(rows: Sequence[Row], pad_id: int, multiple: int = 8) -> dict[str, Tensor]:
    """Right-padded int64 tensors `input_ids`, `attention_mask`, `labels`, all (rows, length).

    multiple: the length is rounded up to it.
    """
    length = max(len(row.input_ids) for row in rows)
    length = -(-length // multiple) * multiple

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (length - len(values))]

    return {
        "input_ids": torch.tensor([padded(row.input_ids, pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
        "labels": torch.tensor([padded(row.labels, IGNORE) for row in rows]),
    }


def pack(items: Sequence[Item], tokenizer: Any, length: int) -> list[Row]:
    """Text items joined into rows of exactly `length` tokens, labelled everywhere.

    An end-of-sequence token follows each item, except windows that their file continues
    (`meta["continues"]`). The last, shorter row is kept only if it is the only one. Attention
    crosses the joints, as is usual in pre-training.
    """
    texts = [item.text for item in items]
    if None in texts:
        raise LuthierError(f"item {items[texts.index(None)].id} has no text", do="only text can be packed")
    ids: list[int] = []
    for item, piece in zip(items, tokenizer(texts)["input_ids"] if texts else [], strict=True):
        ids += piece + ([] if item.meta.get("continues") else _end(tokenizer))
    full = len(ids) // length * length
    rows = [tuple(ids[i : i + length]) for i in range(0, full, length)] or [tuple(ids)]
    return [Row(row, row) for row in rows if row]


def pad_id(tokenizer: Any) -> int:
    """The token to pad with; any will do, since padding is masked."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0


def _solved(item: Item) -> list[Mapping[str, str]]:
    if item.messages is not None:
        return list(item.messages)
    if item.prompt is None or item.answer is None:
        raise LuthierError(f"item {item.id} has no answer and cannot serve as a solved example", do="set shots to 0")
    return [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answer}]


def _conversation(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation: each assistant's turn up to its end-of-sequence token.

    The template is rendered up to and with each such turn; what the second adds to the first is the
    turn. Templates that rewrite earlier turns (dropping their reasoning, say) leave those unlabelled.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise LuthierError("the tokenizer has no chat template", do='write {"prompt": ..., "answer": ...} instead')
    whole = _render(messages, tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    done = 0
    for place, turn in enumerate(messages):
        spoken = place and turn["role"] == "assistant"  # before the first turn there is nothing to render
        before = _render(messages[:place], tokenizer, prompt=True) if spoken else None
        after = _render(messages[: place + 1], tokenizer) if before else ""
        if not before or len(before) < done or not whole.startswith(before) or not whole.startswith(after):
            continue
        ids += _plain(whole[done : len(before)], tokenizer)
        labels += [IGNORE] * (len(ids) - len(labels))
        said = _plain(whole[len(before) : len(after)], tokenizer)
        ids += said
        stop = said.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in said else len(said)
        labels += said[:stop] + [IGNORE] * (len(said) - stop)
        done = len(after)
    if not done:
        raise LuthierError("no assistant's turn can be found in the conversation", do="end it with one")
    return ids, labels  # what follows the last answer is never predicted, so it is left out


def _render(messages: Sequence[Mapping[str, str]], tokenizer: Any, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            [dict(turn) for turn in messages], tokenize=False, add_generation_prompt=prompt
        )
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, TemplateError) as fault:
        why = f"{type(fault).__name__}: {said(str(fault), 120)}"
        raise LuthierError(f"the tokenizer's chat template fails ({why})", do="mend chat_template.jinja") from None


def _plain(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
