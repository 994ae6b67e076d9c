"""Vocabularies that differ: rows matched by token, padding kept, ties kept, and what cannot be said."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.vocabulary import vocabulary
from luthier.engine.layout import Layout
from luthier.engine.stream import plan_transform, run_transform
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.testing import tiny

PADDED = 284


def model(folder, seed, added=(), rows=PADDED, tied=False, before=()):
    """A tiny Llama whose tokenizer has `added` tokens behind its 276, special if in brackets."""
    words = tiny.tokenizer()
    for token in added:
        words.add_tokens([AddedToken(token, special=token.startswith("<"), normalized=False)],
                         special_tokens=token.startswith("<"))  # fmt: skip
    tiny.llama(seed, vocab_size=rows, tie_word_embeddings=tied).save_pretrained(folder)
    words.save_pretrained(folder)
    return Checkpoint.open(folder)


@pytest.fixture
def three(tmp_path):
    """The base, and two experts that gave the same rows to different tokens."""
    return (
        model(tmp_path / "base", 0), model(tmp_path / "one", 1, ["<|im_start|>", "<|im_end|>"]),
        model(tmp_path / "two", 2, ["<|im_end|>", "wordy"]),
    )  # fmt: skip


def embedding(source, name="model.embed_tokens.weight"):
    folder = source.path if isinstance(source, Checkpoint) else source
    return load_file(folder / "model.safetensors")[name]


def merged(tmp_path, base, experts, tokenizer, method=None, multiple=1):
    out = tmp_path / "out"
    layout = Layout(tokenizer=tokenizer, multiple=multiple)
    run_transform(method or Linear(), base, experts, out, Context(), layout=layout)
    return out


def test_union_by_hand(three, tmp_path):
    """Every token's row is the mean of its rows in the experts; one that lacks it takes the first one's, which
    stands for the base, or else that of whoever has it."""
    base, one, two = three
    out = merged(tmp_path, None, [one, two], "union")
    rows = AutoTokenizer.from_pretrained(out).get_vocab()
    assert (rows["<|im_start|>"], rows["<|im_end|>"], rows["wordy"], len(rows)) == (276, 277, 278, 279)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        a, b, made = embedding(one, name), embedding(two, name), embedding(out, name)
        assert made.shape[0] == PADDED
        hand = [(a[i] + b[i]) / 2 for i in range(276)]
        hand += [a[276], (a[277] + b[276]) / 2, b[277]]
        torch.testing.assert_close(made[:279], torch.stack(hand))
        torch.testing.assert_close(made[279:], (a[279:] + b[279:]) / 2)  # padding by its number


def test_an_expert_without_a_token_changes_nothing_there(three, tmp_path):
    """Task arithmetic: who lacks a token has the base's row, so its change is zero; where the base lacks it too, all
    who lack it stand on the mean of those who have it."""
    base, one, two = three
    out = merged(tmp_path, base, [one, two], "union", TaskArithmetic())
    z, a, b, made = (embedding(m) for m in (base, one, two, out))
    torch.testing.assert_close(made[276], a[276])  # only one has it, so all agree
    torch.testing.assert_close(made[278], b[277])
    mean = (a[277] + b[276]) / 2
    torch.testing.assert_close(made[277], a[277] + b[276] - mean)
    torch.testing.assert_close(made[:276], a[:276] + b[:276] - z[:276], atol=1e-6, rtol=1e-5)


def test_the_bases_drops_what_it_does_not_know(three, tmp_path):
    base, one, two = three
    out = merged(tmp_path, base, [one, two], "base", TaskArithmetic())
    assert len(AutoTokenizer.from_pretrained(out)) == 276
    z, a, b, made = (embedding(m) for m in (base, one, two, out))
    torch.testing.assert_close(made[278:], a[278:] + b[278:] - z[278:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(made[276], z[276])  # padding here, tokens there: nothing to add


def test_a_named_models(three, tmp_path):
    base, one, two = three
    out = merged(tmp_path, base, [one, two], 1, TaskArithmetic())
    rows = AutoTokenizer.from_pretrained(out).get_vocab()
    assert rows == AutoTokenizer.from_pretrained(two.path).get_vocab()
    a, b, made = embedding(one), embedding(two), embedding(out)
    mean = (a[277] + b[276]) / 2
    torch.testing.assert_close(made[276], a[277] + b[276] - mean)
    torch.testing.assert_close(made[277], b[277])


def test_sizes_that_differ_and_ties(tmp_path):
    """Padded to 300 here, to 276 there, tied everywhere: loads, stays tied, and is padded up to a multiple."""
    one = model(tmp_path / "one", 1, ["<|im_end|>"], rows=300, tied=True)
    two = model(tmp_path / "two", 2, rows=276, tied=True)
    with pytest.raises(LuthierError, match=r"has the shape \[276, 32\].* set tokenizer: base, union or a model.s name"):
        plan_transform(Linear(), None, [one, two])
    out = merged(tmp_path, None, [one, two], "base", multiple=64)
    made, a, b = embedding(out), embedding(one), embedding(two)
    assert made.shape[0] == json.loads((out / "config.json").read_text())["vocab_size"] == 320
    torch.testing.assert_close(made[:276], (a[:276] + b) / 2)
    torch.testing.assert_close(made[276:300], a[276:])  # the other has no such rows and takes these
    assert not made[300:].any()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    words = AutoTokenizer.from_pretrained(out)
    ids = words("<|im_end|>", return_tensors="pt").input_ids
    assert ids.tolist() == [[276]] and loaded.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 3)


def test_one_row_two_meanings_is_refused(three):
    base, one, two = three
    with pytest.raises(LuthierError, match=r"two.tokenizer.json: row 276 is '<\|im_end\|>', in .* it is '<\|im_st"):
        plan_transform(Linear(), None, [one, two])
    plan_transform(Linear(), None, [base, one])  # the base has padding there


def test_tokenizers_that_split_differently(three, tmp_path):
    base = three[0]
    other = model(tmp_path / "other", 3)
    raw = json.loads((other.path / "tokenizer.json").read_text())
    raw["model"]["vocab"] = {(f"x{t}" if i > 100 else t): i for t, i in raw["model"]["vocab"].items()}
    raw["model"]["merges"] = []
    (other.path / "tokenizer.json").write_text(json.dumps(raw))
    for tokenizer, said in [("base", r"knows 101 of the 276 tokens of .*base; these models split text differently"),
                            ("union", r"175 tokens such as '.*' are not the base's, and no added ones")]:  # fmt: skip
        with pytest.raises(LuthierError, match=said):
            plan_transform(Linear(), base, [other], layout=Layout(tokenizer=tokenizer))


@pytest.mark.parametrize(("text", "said"), [
    ("{", "is no tokenizer (JSONDecodeError)"), ("[]", "is no tokenizer (TypeError)"),
    ('{"model": {"vocab": {"a": -1}}}', "gives a token no row"),
    ('{"model": {"vocab": {"a": 9999}}}', "has 10000 tokens, the embedding only 284 rows"),
])  # fmt: skip
def test_what_is_no_tokenizer(three, text, said):
    (three[0].path / "tokenizer.json").write_text(text)
    with pytest.raises(LuthierError) as fault:
        vocabulary(three[0])
    assert said in str(fault.value)
    (three[0].path / "tokenizer.json").unlink()
    with pytest.raises(LuthierError, match="has no tokenizer.json; rows cannot be matched"):
        plan_transform(Linear(), three[0], [three[1]], layout=Layout(tokenizer="base"))


def test_stretches_do_not_change_a_byte(three, tmp_path):
    base, one, two = three
    made = []
    for i, options in enumerate([{"threads": 1}, {"threads": 3, "memory": 1 << 20}]):
        out = tmp_path / f"o{i}"
        run_transform(TaskArithmetic(), base, [one, two], out, Context(), layout=Layout(tokenizer="union"), **options)
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1]
