"""eval.perplexity against transformers' loss and a token-by-token twin."""

import math

import pytest
import torch

from luthier.eval.perplexity import Perplexity
from luthier.flows import Item
from luthier.kit.context import Context
from luthier.kit.encode import IGNORE, collate, encode
from luthier.testing import tiny

TOKENIZER = tiny.tokenizer()


def measured(data, model=None, **fields):
    table = Perplexity(**fields).measure([tiny.subject("m", model)], [data], Context())
    assert table.columns == ("model", "data", "item", "metric", "value", "tokens")
    return {row["item"]: row for row in table.dicts()}


@pytest.mark.parametrize("data", [tiny.text_data(test=7), tiny.task_data(test=7)], ids=["text", "tasks"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_each_item_is_transformers_loss(data, batch):
    model = tiny.llama(2)
    rows = measured(data, model, batch=batch)
    assert list(rows) == [item.id for item in data.test]
    for item in data.test:
        with torch.no_grad():
            want = model(**collate([encode(item, TOKENIZER)], 0, multiple=1)).loss.item()
        assert rows[item.id]["value"] == pytest.approx(want, rel=1e-5)


def test_against_one_softmax_a_token():
    model, item = tiny.llama(5), tiny.task_data().test[0]
    row = encode(item, TOKENIZER)
    total, count = 0.0, 0
    for place in range(1, len(row.input_ids)):
        if row.labels[place] != IGNORE:
            with torch.no_grad():
                logits = model(torch.tensor([row.input_ids[:place]])).logits[0, -1].double()
            total -= math.log(math.exp(logits[row.labels[place]]) / logits.exp().sum().item())
            count += 1
    got = measured(tiny.TinyData("d", [], [item]), model)[item.id]
    assert count == got["tokens"] == len(TOKENIZER(item.answer)["input_ids"]) + 1
    assert got["value"] == pytest.approx(total / count, rel=1e-5)


def test_long_items_are_computed_in_stretches(monkeypatch):
    data = tiny.text_data(test=6)
    whole = measured(data)
    monkeypatch.setattr("luthier.kit.likelihood.PLACES", 5)
    for id_, row in measured(data).items():
        assert row["value"] == pytest.approx(whole[id_]["value"], rel=1e-6) and row["tokens"] == whole[id_]["tokens"]


def test_logits_are_computed_at_labelled_places_only():
    model, seen = tiny.llama(), []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[0]))
    rows = measured(tiny.task_data(test=5), model)
    assert sum(seen) == sum(row["tokens"] for row in rows.values())


def test_defaults():
    """All items, 1024 tokens of each, 16 at a time."""
    assert Perplexity().to_dict()["set"] == {"max_items": None, "max_length": 1024, "batch": 16}


def test_limits():
    data = tiny.text_data(test=8)
    assert list(measured(data, max_items=3)) == [item.id for item in data.test[:3]]
    assert {row["tokens"] for row in measured(data, max_length=10).values()} == {9}


def test_items_without_anything_to_predict_are_left_out():
    items = [tiny.item(text="a"), tiny.item(text="some words"), Item(id="q", prompt="unanswered")]
    assert list(measured(tiny.TinyData("d", [], items))) == [items[1].id]


def test_conversations_count_the_assistants_turns():
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    item = tiny.item(messages=turns)
    row = measured(tiny.TinyData("d", [], [item]))[item.id]
    assert row["tokens"] == len(TOKENIZER("hello<|end|>\n")["input_ids"])
