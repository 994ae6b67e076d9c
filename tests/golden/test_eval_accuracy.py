"""eval.accuracy against transformers' generate scored by hand."""

import pytest
import torch

from luthier.decode.sample import Sample
from luthier.errors import LuthierError
from luthier.eval.accuracy import Accuracy
from luthier.kit.context import Context
from luthier.kit.encode import prompt_ids
from luthier.testing import tiny
from luthier.testing.measure import subjects

TOKENIZER = tiny.tokenizer()
DATA = tiny.task_data(train=24, test=8)


def by_hand(model, data, new, shots=()):
    """Each item alone through transformers' greedy generation, compared as text."""
    found = []
    for item in data.test:
        ids = torch.tensor([prompt_ids(item, TOKENIZER, shots)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
        )[0, ids.shape[1] :]
        text = TOKENIZER.decode(out, skip_special_tokens=True)
        found.append((float(text.strip() == item.answer), len(out)))
    return found


@pytest.fixture(scope="module")
def half():
    """A tiny model that knows about half of the answers: the one that knows all, with noise."""
    (good,) = subjects("good")
    model = tiny.moved(good.model, 17, 0.03)  # the first seed that leaves some right and some wrong
    assert 2 <= sum(value for value, _ in by_hand(model, DATA, 6)) <= 6
    return model


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("shots", [0, 2])
def test_values_and_lengths_are_those_of_generate(half, batch, shots):
    table = Accuracy(batch=batch, max_new_tokens=6, shots=shots).measure([tiny.subject("m", half)], [DATA], Context())
    want = by_hand(half, DATA, 6, DATA.train[:shots])
    assert [(row["value"], row["tokens"]) for row in table.dicts()] == want
    assert [row["item"] for row in table.dicts()] == [item.id for item in DATA.test]
    if not shots:
        assert 0 < sum(row["value"] for row in table.dicts()) < 8


def test_a_part_of_a_point_is_no_right_answer(half):
    class Generous(tiny.TinyData):
        def score(self, item, output):
            return 0.99

    data = Generous("d", [], DATA.test, scored=True)
    table = Accuracy(max_new_tokens=2).measure([tiny.subject("m", half)], [data], Context())
    assert {row["value"] for row in table.dicts()} == {0.0}


def test_data_without_answers_gives_a_note():
    table = Accuracy().measure([tiny.subject()], [tiny.text_data()], Context())
    assert table.rows == () and "no scored answers" in table.notes[0]


def test_limits(half):
    data = tiny.TinyData("d", DATA.train[:1], DATA.test, scored=True)
    subject = tiny.subject("m", half)
    assert len(Accuracy(max_items=3, max_new_tokens=2).measure([subject], [data], Context()).rows) == 3
    with pytest.raises(LuthierError, match="1 training items"):
        Accuracy(shots=2).measure([subject], [data], Context())


def test_every_item_goes_through_once(half):
    """The shortest prompts first, three at a time; the last batch has what is left."""
    seen, lengths = [], sorted(len(prompt_ids(item, TOKENIZER, ())) for item in DATA.test)
    hook = half.register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    Accuracy(batch=3, max_new_tokens=1).measure([tiny.subject("m", half)], [DATA], Context())
    hook.remove()
    assert seen == [(3, lengths[2]), (3, lengths[5]), (2, lengths[7])]


def test_defaults():
    """All items, answers of 32 tokens, 64 prompts at a time, no shots, greedy."""
    assert Accuracy().to_dict()["set"] == {
        "max_items": None, "max_new_tokens": 32, "batch": 64, "shots": 0,
        "decode": {"use": "decode.sample", "set": Sample().to_dict()["set"]},
    }  # fmt: skip


def test_another_decode_is_heeded(half):
    hot = Accuracy(max_new_tokens=6, decode={"use": "decode.sample", "set": {"temperature": 3.0}})
    table = hot.measure([tiny.subject("m", half)], [DATA], Context())
    assert [(r["value"], r["tokens"]) for r in table.dicts()] != by_hand(half, DATA, 6)
    assert hot.measure([tiny.subject("m", half)], [DATA], Context()) == table
