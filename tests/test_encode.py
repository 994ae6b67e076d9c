"""Items to rows: what is labelled, what is cut, how rows are padded and packed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.flows import Item
from luthier.kit.encode import IGNORE, Row, collate, encode, pack, pad_id, prompt_ids
from luthier.testing import tiny

TOKENIZER, PLAIN = tiny.tokenizer(), tiny.tokenizer(chat=False)
EOS = TOKENIZER.eos_token_id


def said(row: Row, tokenizer=TOKENIZER) -> str:
    """The text that is labelled."""
    return tokenizer.decode([label for label in row.labels if label != IGNORE])


def test_text_is_labelled_everywhere_and_cut_at_the_end():
    row = encode(Item(id="a", text="some words of text"), TOKENIZER)
    assert row.labels == row.input_ids and TOKENIZER.decode(row.input_ids) == "some words of text"
    assert row.count == len(row.input_ids) - 1  # nothing predicts the first
    assert encode(Item(id="a", text="some words of text"), TOKENIZER, 3).input_ids == row.input_ids[:3]


def test_prompt_is_not_labelled_answer_and_end_are():
    row = encode(Item(id="a", prompt="1 + 1 =", answer="2"), TOKENIZER)
    text = TOKENIZER.decode(row.input_ids)
    assert text == "<|start|>user\n1 + 1 =<|end|>\n<|start|>assistant\n2<eos>"
    assert said(row) == "2<eos>" and row.count == 2


def test_without_a_template_the_prompt_ends_with_a_line_break():
    row = encode(Item(id="a", prompt="1 + 1 =", answer="2"), PLAIN)
    assert PLAIN.decode(row.input_ids) == "1 + 1 =\n2<eos>" and said(row, PLAIN) == "2<eos>"


def test_a_row_begins_with_what_the_model_is_given_to_answer():
    item = Item(id="a", prompt="3 + 4 =", answer="7")
    for tokenizer in (TOKENIZER, PLAIN):
        ids = prompt_ids(item, tokenizer)
        assert list(encode(item, tokenizer).input_ids[: len(ids)]) == ids


def test_too_long_a_task_loses_its_front_and_keeps_its_answer():
    row = encode(Item(id="a", prompt="word " * 50, answer="yes"), TOKENIZER, 8)
    assert len(row.input_ids) == 8 and said(row) == "yes<eos>"


TURNS = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
)


def test_every_assistant_turn_is_labelled_and_nothing_else():
    row = encode(Item(id="a", messages=TURNS), TOKENIZER)
    assert said(row) == "hi there<|end|>\nso long<|end|>\n"  # here turns end with <|end|>, not with eos
    whole = TOKENIZER.apply_chat_template(list(TURNS), tokenize=False)
    assert TOKENIZER.decode(row.input_ids) == whole


def test_a_turn_is_labelled_up_to_its_end_of_sequence_token():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.TEMPLATE.replace("<|end|>", "<eos>")
    row = encode(Item(id="a", messages=TURNS), tokenizer)
    assert said(row) == "hi there<eos>so long<eos>"  # the line break after it is the template's


def test_turns_that_the_template_rewrites_later_are_not_labelled():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (  # shows the assistant's last turn only, as some do with their reasoning
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.role }}:{{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert said(encode(Item(id="a", messages=TURNS), tokenizer)) == "so long\n"


def test_conversation_errors_say_what_to_do():
    with pytest.raises(LuthierError, match="no chat template"):
        encode(Item(id="a", messages=TURNS), PLAIN)
    with pytest.raises(LuthierError, match="no assistant's turn"):
        encode(Item(id="a", messages=TURNS[:2]), TOKENIZER)
    with pytest.raises(LuthierError, match="asks for no answer"):
        prompt_ids(Item(id="a", text="plain"), TOKENIZER)
    with pytest.raises(LuthierError, match="no answer"):
        encode(Item(id="a", prompt="unanswered"), TOKENIZER)


def test_messages_are_asked_without_their_last_answer():
    asked = TOKENIZER.decode(prompt_ids(Item(id="a", messages=TURNS), TOKENIZER))
    assert asked.endswith("bye<|end|>\n<|start|>assistant\n") and "so long" not in asked


def test_shots_are_earlier_turns_or_paragraphs():
    shot, item = Item(id="s", prompt="1 + 2 =", answer="3"), Item(id="a", prompt="2 + 2 =", answer="4")
    chat = TOKENIZER.decode(prompt_ids(item, TOKENIZER, [shot]))
    assert chat.index("1 + 2 =") < chat.index("assistant\n3<|end|>") < chat.index("2 + 2 =")
    assert PLAIN.decode(prompt_ids(item, PLAIN, [shot])) == "1 + 2 =\n3\n\n2 + 2 =\n"


def test_collate_pads_to_the_right_and_masks():
    batch = collate([Row((5, 6, 7), (IGNORE, 6, 7)), Row((8,), (8,))], pad_id=0, multiple=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE], [8, IGNORE, IGNORE, IGNORE]]
    assert collate([Row((1,) * 9, (1,) * 9)], 0)["input_ids"].shape == (1, 16)
    assert collate([Row((1,) * 8, (1,) * 8)], 0)["input_ids"].shape == (1, 8)


def test_pack_joins_documents_with_their_ends():
    items = [Item(id="a", text="abcd"), Item(id="b", text="efg", meta={"continues": True}), Item(id="c", text="hi")]
    ids = [i for item in items for i in TOKENIZER(item.text)["input_ids"] + ([EOS] if item.id != "b" else [])]
    rows = pack(items, TOKENIZER, 4)
    assert [list(row.input_ids) for row in rows] == [ids[i : i + 4] for i in range(0, len(ids) // 4 * 4, 4)]
    assert all(row.labels == row.input_ids for row in rows)
    assert [list(row.input_ids) for row in pack(items, TOKENIZER, 100)] == [ids]  # a single short row is kept
    assert pack([], TOKENIZER, 4) == []
    with pytest.raises(LuthierError, match="only text"):
        pack([Item(id="t", prompt="a", answer="b")], TOKENIZER, 4)


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60), st.text(min_size=1, max_size=20), st.integers(2, 40))
def test_any_text_keeps_its_answer(prompt, answer, length):
    row = encode(Item(id="x", prompt=prompt, answer=answer), TOKENIZER, length)
    want = TOKENIZER(answer, add_special_tokens=False)["input_ids"] + [EOS]
    assert [label for label in row.labels if label != IGNORE] == want[-length:]
    assert len(row.input_ids) == len(row.labels) <= length


def test_pad_id_falls_back_on_the_end():
    other = tiny.tokenizer()
    assert pad_id(other) == other.pad_token_id
    other.pad_token = None
    assert pad_id(other) == EOS
