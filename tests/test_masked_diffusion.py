"""Masked diffusion from end to end: trained by the trainer, resumed, decoded by `apply`, scored by eval.accuracy."""

import pytest
import torch

from luthier.catalogue import load
from luthier.claims import _sudoku
from luthier.engine.trainer import TrainSpec, train
from luthier.kit.context import Context
from luthier.model import build_model
from luthier.testing import tiny

TOKENIZER = tiny.tokenizer()
MODEL = {
    "vocab_size": tiny.VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "initializer_range": 0.08, "mask_token_id": 3,
    "slots": {"mixer": {"use": "block.attention", "set": {"causal": False}}},
}  # fmt: skip


def fit(folder, steps, **spec):
    model = build_model(MODEL, seed=1)
    return train(
        model, TOKENIZER, tiny.task_data(80, 20), load("tune.full"), load("objective.masked_diffusion"),
        load("optim.adamw", fused=False), TrainSpec.of({"steps": steps, "batch": 16, "lr": 5e-3, **spec}),
        Context(seed=3, step="train"), folder,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("run"), 80).model.eval()


def test_it_learns(model):
    """Answers of one-digit sums, end token included, at half of the places masked."""
    fresh, objective = build_model(MODEL, seed=1), load("objective.masked_diffusion", rate=0.5)
    from luthier.kit.encode import collate, encode

    batch = collate([encode(item, TOKENIZER) for item in tiny.task_data(80, 20).test], 0)
    with torch.no_grad():
        before, after = (objective.loss(m, batch, Context(seed=9)).total.item() for m in (fresh, model))
    assert after < 0.35 * before


def test_a_resumed_training_is_the_same(tmp_path):
    """Noise is keyed by the step, so a run in two parts draws what a run in one draws."""
    whole = fit(tmp_path / "whole", 6, save_every=3).model.state_dict()
    (tmp_path / "part").mkdir()
    saved = tmp_path / "whole" / "step-00000003"
    saved.rename(tmp_path / "part" / saved.name)
    again = fit(tmp_path / "part", 6, save_every=3).model.state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("use", ["decode.masked_diffusion", "decode.prophet"])
def test_applied_and_scored(model, use):
    method = load(use) if use == "decode.prophet" else load(use, max_new_tokens=5)
    if use == "decode.prophet":
        method = method.replace(host=load("decode.masked_diffusion", max_new_tokens=5))
    trace = method.apply(models=(model, TOKENIZER), prompts=["3 + 4 =\n", "1 + 1 =\n"])
    assert len(trace.texts) == 2 and 0 < trace.forwards <= 5
    accuracy = load("eval.accuracy", decode=method, max_new_tokens=3, max_items=4)
    table = accuracy.apply(models=(model, TOKENIZER), data=tiny.task_data(80, 20))
    assert len(table.rows) == 4


def test_puzzles_of_the_claims():
    """288 grids; puzzles have one solution; none is on both sides; a perfect solver scores one."""
    assert len(_sudoku.grids()) == 288 and len({tuple(g) for g in _sudoku.grids().tolist()}) == 288
    sides = []
    for test in (False, True):
        puzzle, answer = _sudoku.puzzles(300, test, torch.Generator().manual_seed(4))
        given = puzzle != _sudoku.BLANK
        assert torch.equal(puzzle[given], answer[given])
        assert set(given.sum(1).tolist()) <= {7, 8, 9, 10}
        fits = ((puzzle[:, None] == _sudoku.grids()) | ~given[:, None]).all(2).sum(1)
        assert (fits == 1).all()
        sides.append({tuple(p) for p in puzzle.tolist()})
    assert not sides[0] & sides[1]
    batch = _sudoku.batch_of(puzzle, answer)
    assert batch["input_ids"].shape == (300, 33) and (batch["labels"] != -100).sum() == 300 * 16
    assert batch["input_ids"].max() < _sudoku.CONFIG["vocab_size"]


def test_the_curve_is_read_between_its_points():
    curve = [{"passes": 4.0, "accuracy": 0.9}, {"passes": 1.0, "accuracy": 0.3}, {"passes": 2.0, "accuracy": 0.5}]
    want = {0.5: 0.3, 1.0: 0.3, 1.5: 0.4, 2.0: 0.5, 3.0: 0.7, 4.0: 0.9, 9.0: 0.9}
    assert {n: _sudoku.at_passes(n, curve) for n in want} == pytest.approx(want)
