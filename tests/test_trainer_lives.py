"""Training by two processes: real processes, real signals, real gloo. How it is killed stands in `torture/`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from dying import script


def history(out: Path) -> list[dict]:
    with safe_open(out, "pt") as file:
        return json.loads(file.metadata()["history"])


def gap(a: Path, b: Path) -> float:
    left, right = load_file(a), load_file(b)
    assert set(left) == set(right)
    return max(float((left[n] - right[n]).abs().max()) for n in left)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    script("trainer_lives.py", "ranks", folder)
    return folder


CLOSE = {"full": 2e-7, "full adam": 4e-6, "random": 2e-7, "lift": 2e-6, "odd": 2e-7, "moe": 2e-7}
"""Adam divides by 1e-4 at least: of rounding in a gradient lr / eps, 500 times as much, is in the weights."""


@pytest.mark.parametrize("case", CLOSE)
def test_two_processes_are_one_on_the_same_global_batch(ranked, case):
    assert (ranked / f"{case}-0.out").read_bytes() == (ranked / f"{case}-1.out").read_bytes()
    assert gap(ranked / f"{case}-0.out", ranked / f"{case}-alone.out") < CLOSE[case]
    for two, one in zip(history(ranked / f"{case}-0.out"), history(ranked / f"{case}-alone.out"), strict=True):
        assert two["tokens"] == one["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_a_parameter_without_gradient_anywhere_is_left_alone(ranked):
    """Weight decay would shrink it; one that has a gradient on a single process moves on both."""
    touched = [json.loads((ranked / f"rank-{rank}.json").read_text())["touched"] for rank in range(2)]
    assert any(a != b for a, b in zip(*touched, strict=True))
    learned = load_file(ranked / "odd-1.out")
    assert learned["never"].tolist() == [1.0, 1.0]
    assert max(learned["odd"].tolist()) < 0.99


def test_only_the_leaves_are_sent(ranked):
    sent = json.loads((ranked / "rank-0.json").read_text())["sent"]
    params = sum(t.numel() for t in load_file(ranked / "full-0.out").values())
    assert 5 * (params - 5) < sent["full"] < 5 * (params + 100)  # five steps; odd and never have no gradient here
    assert sent["random"] < 0.06 * sent["full"] and sent["lift"] < 0.06 * sent["full"]


def test_ctrl_c_on_one_process_stops_both_after_one_step_and_both_resume(ranked):
    told = [json.loads((ranked / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert told[0]["interrupted"] == told[1]["interrupted"]
    assert told[0]["interrupted"].startswith("stopped after step 3, saved in ")
    assert (ranked / "resumed-1.out").read_bytes() == (ranked / "random-1.out").read_bytes()


def test_a_loss_that_is_not_finite_on_one_process_stops_both(ranked):
    for rank in range(2):
        assert "at training step 2" in json.loads((ranked / f"rank-{rank}.json").read_text())["poisoned"]
