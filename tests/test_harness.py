"""Subjects, tokenizers, and the same tasks in lm-evaluation-harness."""

import os

import pytest
import torch

from luthier.checkpoint.delta import Delta
from luthier.engine.harness import harness_task
from luthier.engine.subject import Subject_
from luthier.engine.tokenize import train_tokenizer
from luthier.errors import LuthierError
from luthier.eval.accuracy import Accuracy
from luthier.kit import precision
from luthier.kit.context import Context
from luthier.testing import tiny
from luthier.testing.measure import subjects

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
IDS = torch.arange(4, 20)[None]


def logits(subject):
    with subject.open() as (model, _), torch.no_grad():
        return model(IDS).logits


# --- subjects


def test_a_stored_model_opens_in_eval_mode_with_its_tokenizer(tmp_path):
    folder = tiny.checkpoint(tmp_path / "m", seed=3)
    with Subject_("m", folder).open() as (model, tokenizer):
        assert not model.training and tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
    assert torch.equal(logits(Subject_("m", str(folder))), tiny.llama(3)(IDS).logits)


def test_stored_in_16_bits_it_computes_in_what_the_machine_is_good_at(tmp_path, monkeypatch):
    folder = tiny.checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    for units, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "has_half", lambda device, units=units: units)
        assert logits(Subject_("m", folder)).dtype == dtype
    exact = tiny.llama().to(torch.bfloat16).float()
    exact.model.rotary_emb = tiny.llama().model.rotary_emb  # the detour through bf16 spoils its frequencies
    assert torch.equal(logits(Subject_("m", folder, dtype=torch.float32)), exact(IDS).logits)


def test_a_live_model_gets_its_modes_back():
    model = tiny.llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), Subject_("m", model, tiny.tokenizer()).open() as (opened, _):
        assert opened is model and not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    assert Subject_("m", (model, tiny.tokenizer())).name == "m"
    with pytest.raises(LuthierError, match="tokenizer"):
        Subject_("m", model)


def test_a_delta_stands_on_its_base(tmp_path):
    base, expert = tiny.llama(0), tiny.expert_of(tiny.llama(0), 1)
    folder = tiny.save(base, tmp_path / "base")
    Delta.between(base, expert).save(tmp_path / "delta")
    want = expert(IDS).logits
    assert torch.equal(logits(Subject_("d", tmp_path / "delta", base=folder)), want)
    live = Subject_("d", tmp_path / "delta", tiny.tokenizer(), base=base)
    assert torch.equal(logits(live), want)
    assert torch.equal(base(IDS).logits, tiny.llama(0)(IDS).logits)  # reverted
    with pytest.raises(LuthierError, match="which base"):
        Subject_("d", tmp_path / "delta")


def test_an_unknown_model_is_named():
    with pytest.raises(LuthierError, match="did you mean 'smollm2'"):
        Subject_("x", "smollm")


# --- tokenizers


TEXTS = ["def f(x):\n    return x + 1\n", "the cat and the dog and the bird, 12 times\n"] * 30


def test_a_trained_tokenizer_reads_anything_and_repeats(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    assert 260 < len(tokenizer) <= 300
    for text in ("the cat", "naïve → 😀", "  indented\n\n\ttab", "", " ."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the and the")["input_ids"]) < 6
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert train_tokenizer(TEXTS, 300).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)("the dog 😀")["input_ids"] == tokenizer("the dog 😀")["input_ids"]
    with pytest.raises(LuthierError, match="no room for 256 bytes"):
        train_tokenizer(TEXTS, 200)


# --- lm-evaluation-harness


@pytest.mark.slow
def test_the_harness_measures_what_we_measure():
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    data = tiny.task_data(train=8, test=8)
    (good,) = subjects("good")
    model = tiny.moved(good.model, 2, 0.03)
    ours = Accuracy(max_new_tokens=6).measure([tiny.subject("m", model)], [data], Context())
    host = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=4, device="cpu")
    task = harness_task(data, max_new_tokens=6)
    theirs = lm_eval.simple_evaluate(
        model=host, tasks=[task], apply_chat_template=True, bootstrap_iters=0, log_samples=True
    )
    values = [row["value"] for row in ours.dicts()]
    assert [sample["accuracy"] for sample in theirs["samples"]["sums"]] == values
    assert theirs["results"]["sums"]["accuracy,none"] == sum(values) / 8
    assert 0 < sum(values) < 8


def test_the_harness_wants_answers():
    with pytest.raises(LuthierError, match="no scored answers"):
        harness_task(tiny.text_data())
