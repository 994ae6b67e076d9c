"""Rows of tokens and their likelihoods, against slow twins on a tiny model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import SEEDS, often, randn

from luthier.flows import Item
from luthier.kit.encode import IGNORE, Row, collate, encode, pack, prompt_ids
from luthier.kit.likelihood import by_length, summed_nll
from luthier.kit.logits import labelled, summed
from luthier.testing import tiny

TOKENIZER, PLAIN = tiny.tokenizer(), tiny.tokenizer(chat=False)
MODEL = tiny.llama(3, dtype=torch.float64, num_hidden_layers=1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
IDS = st.lists(st.integers(4, tiny.VOCAB - 1), min_size=1, max_size=9)


@st.composite
def rows(draw):
    ids = draw(IDS)
    labels = [i if draw(st.booleans()) else IGNORE for i in ids]
    return Row(tuple(ids), tuple(labels))


@given(TEXT, st.one_of(st.none(), st.integers(1, 30)))
@often(40)
def test_text_is_labelled_everywhere_and_cut_at_its_end(text, most):
    row = encode(Item(id="a", text=text), TOKENIZER, most)
    ids = TOKENIZER(text)["input_ids"]
    assert list(row.input_ids) == list(row.labels) == ids[:most]
    assert row.count == max(0, len(row.labels) - 1)


@given(TEXT, TEXT, st.one_of(st.none(), st.integers(1, 40)), st.booleans())
@often(40)
def test_only_the_answer_is_labelled_and_it_stays_when_cut(prompt, answer, most, chat):
    tokenizer, item = (TOKENIZER if chat else PLAIN), Item(id="a", prompt=prompt, answer=answer)
    row = encode(item, tokenizer, most)
    said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    whole = [*prompt_ids(item, tokenizer), *said]
    assert list(row.input_ids) == whole[-most:] if most else list(row.input_ids) == whole
    assert list(row.labels) == ([IGNORE] * (len(whole) - len(said)) + said)[-(most or 0) :]
    assert all(label in (IGNORE, token) for label, token in zip(row.labels, row.input_ids, strict=True))


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), TEXT), min_size=1, max_size=5), TEXT)
@often(40)
def test_in_a_conversation_the_assistants_turns_are_labelled(turns, last):
    turns = [*turns, ("assistant", last)]  # an answer to nothing, as the first turn, is not labelled
    row = encode(Item(id="a", messages=tuple({"role": r, "content": c} for r, c in turns)), TOKENIZER)
    ids = [label for label in row.labels if label != IGNORE]
    want = "".join(f"{c}<|end|>\n" for i, (r, c) in enumerate(turns) if i and r == "assistant")
    assert TOKENIZER.decode(ids) == want
    assert all(label in (IGNORE, token) for label, token in zip(row.labels, row.input_ids, strict=True))


@given(st.lists(rows(), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 3))
@often(40)
def test_padding_adds_nothing_that_counts(made, multiple, pad):
    batch = collate(made, pad, multiple)
    length = batch["input_ids"].shape[1]
    assert length % multiple == 0 and length - max(len(r.input_ids) for r in made) < multiple
    for row, ids, mask, labels in zip(made, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        n = len(row.input_ids)
        assert ids.tolist() == [*row.input_ids, *[pad] * (length - n)]
        assert mask.tolist() == [1] * n + [0] * (length - n) and labels.tolist() == [
            *row.labels,
            *[IGNORE] * (length - n),
        ]


@given(st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=6), st.integers(1, 20))
@often(40)
def test_packing_loses_only_the_last_short_row(texts, length):
    items = [Item(id=str(i), text=t, meta={"continues": c}) for i, (t, c) in enumerate(texts)]
    ids = [i for t, c in texts for i in [*TOKENIZER(t)["input_ids"], *([] if c else [TOKENIZER.eos_token_id])]]
    got = pack(items, TOKENIZER, length)
    full = len(ids) // length
    if full:
        assert [i for row in got for i in row.input_ids] == ids[: full * length]
        assert all(len(row.input_ids) == length for row in got)
    else:
        assert [i for row in got for i in row.input_ids] == ids
    assert all(row.labels == row.input_ids for row in got)


@given(st.lists(rows(), max_size=12), st.integers(1, 5))
@often(30)
def test_batches_by_length_hold_every_row_once(made, size):
    got = by_length(made, size)
    assert sorted(i for batch in got for i in batch) == list(range(len(made)))
    assert all(len(batch) == size for batch in got[:-1])
    lengths = [len(made[i].input_ids) for batch in got for i in batch]
    assert lengths == sorted(lengths)


def slow_nll(row):
    """One row by itself through the whole model, word by word."""
    with torch.no_grad():
        logits = MODEL(torch.tensor([row.input_ids])).logits[0].double()
    total = 0.0
    for place in range(1, len(row.input_ids)):
        if row.labels[place] != IGNORE:
            total -= float(logits[place - 1].log_softmax(-1)[row.labels[place]])
    return total


@given(st.lists(rows(), min_size=1, max_size=4))
@often(25)
def test_likelihoods_are_those_of_each_row_alone(made):
    got = summed_nll(MODEL, made, 0)
    assert got == pytest.approx([slow_nll(row) for row in made], rel=1e-5, abs=1e-6)


@given(st.lists(rows(), min_size=1, max_size=4), st.booleans())
@often(25)
def test_places_before_a_label_are_those_of_the_loss(made, left):
    """On either side of the padding."""
    batch = collate(made, 0, 4)
    if left:
        batch = {k: torch.stack([torch.cat([v[i, len(r.input_ids) :], v[i, : len(r.input_ids)]])
                                 for i, r in enumerate(made)]) for k, v in batch.items()}  # fmt: skip
    seen = labelled(MODEL, batch)
    want = [r.labels[i] for r in made for i in range(1, len(r.labels)) if r.labels[i] != IGNORE]
    assert seen.y_N.tolist() == want and len(seen.h_ND) == len(want)


@given(st.integers(1, 30), st.integers(1, 12), SEEDS)
@often(25)
def test_sums_in_stretches_are_the_sum_and_so_is_the_gradient(n, size, seed):
    found = []
    for step in (n, size):
        x = randn(seed, n, 3).requires_grad_()
        total = summed(lambda a, b: (a.sin() * b[:, None]).sum(), step, x, torch.arange(n).double())
        total.backward()
        found.append((float(total.detach()), x.grad))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-9) and torch.allclose(found[0][1], found[1][1])
    assert math.isfinite(found[0][0])
