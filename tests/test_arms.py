"""What comparing trainings needs: the same draws in several steps, tasks as text, what a token costs, pictures."""

import pytest
import torch

import luthier
import luthier.report
from luthier.engine.data import open_data
from luthier.engine.flops import training_flops
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.model import build_model
from luthier.report_figures import costs, curves

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SUMS = {"source": "gym:chain_sum", "form": "text", "split": {"train": 24, "test": 4}}


def test_tasks_become_texts_with_their_answers():
    task = open_data("sums", {**SUMS, "form": "task"}, Context())
    text = open_data("sums", SUMS, Context())
    assert task.scored and not text.scored and task.hash() != text.hash()
    for side in ("train", "test"):
        for one, other in zip(getattr(task, side), getattr(text, side), strict=True):
            assert other.text == f"{one.prompt}\n{one.answer}" and other.prompt is None and other.id == one.id
    assert text.overlap() == 0


def test_shuffled_answers_stay_shuffled_in_texts():
    true, shuffled = (open_data("sums", {**SUMS, "answers": a}, Context()) for a in ("true", "shuffled"))
    assert [i.text for i in true.train] != [i.text for i in shuffled.train]
    assert [i.text for i in true.test] == [i.text for i in shuffled.test]


def test_only_tasks_have_a_form():
    with pytest.raises(LuthierError, match="data.code: form: 'text' is for gym tasks"):
        open_data("code", {"source": "text:stdlib", "form": "text"}, Context())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three trainings of one model for one step each: two share their draws, the third has its own."""

    def arm(**train):
        model = {"new": SIZES, "tokenizer": {"train": "sums", "size": 300}}
        spec = {"steps": 2, "batch": 2, "max_length": 16, "lr": 1e-3, "dtype": "fp32", **train}
        return {"use": "tune.full", "model": model, "data": "sums", "train": spec, "vary": {"seed": [0, 1]}}

    recipe = {"luthier": 1, "data": {"sums": SUMS}, "steps": {
        "one": arm(draws="arm"), "two": arm(draws="arm", lr=2e-3), "three": arm(),
    }}  # fmt: skip
    folder = tmp_path_factory.mktemp("arms") / "run"
    return luthier.run(recipe, folder=folder), luthier.report.summary(folder)


def test_trainings_that_share_a_name_share_their_draws(trained):
    _, shown = trained
    first = {name: rows[0]["loss"] for name, rows in shown.histories.items()}
    assert first["one@seed=0"] == first["two@seed=0"] and first["one@seed=1"] == first["two@seed=1"]
    assert len(set(first.values())) == 4, "another seed, or no common name, draws anew"


def test_what_a_token_costs_is_recorded(trained):
    _, shown = trained
    vocab = 300
    per_layer = 4 * 16 * 16 + 3 * 16 * 24
    for record in shown.records:
        assert record.metrics["flops_per_token"] == pytest.approx(3 * 2 * (2 * per_layer + vocab * 16), rel=0.02)


def test_experts_that_are_not_used_cost_nothing():
    moe = {"ffn": {"use": "block.moe", "set": {"experts": 8, "top_k": 2, "width": 12}}}
    model = build_model({**SIZES, "vocab_size": 32, "slots": moe})
    dense = build_model({**SIZES, "vocab_size": 32})
    assert training_flops(model, 8) - training_flops(dense, 8) == 3 * 2 * 2 * 8 * 16, "two routers are the difference"
    assert model.training, "left in the mode it was in"
    before = torch.get_rng_state()
    training_flops(model, 8)
    assert torch.equal(before, torch.get_rng_state())


def test_repeats_are_one_line_and_costs_have_three_panels(trained):
    _, shown = trained
    flops = {r.step: r.metrics["flops_per_token"] for r in shown.records}
    svg = costs(shown.histories, flops)
    for word in ("tokens", "floating-point operations", "seconds", "one", "two", "three"):
        assert f">{word}<" in svg
    assert "@seed" not in svg and "@seed" not in curves(shown.histories)


def test_the_report_draws_costs_where_steps_repeat(trained):
    run, _ = trained
    assert "Loss against cost" in luthier.report.build(run.folder).read_text()
