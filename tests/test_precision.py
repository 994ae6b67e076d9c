"""Training in `auto`: the result has the stored dtype and its delta gives it to the byte, whatever was computed in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import luthier
from luthier.engine.trainer import TrainSpec, train
from luthier.kit import precision
from luthier.kit.context import Context
from luthier.testing import tiny


@pytest.mark.parametrize("method", ["tune.full", "tune.lift", "tune.random"])
@pytest.mark.parametrize("half", [True, False])
def test_auto_keeps_the_stored_dtype(method: str, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_half", lambda device: half)
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.dtype)
            return x

    model = tiny.llama(0).to(torch.bfloat16)
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(model.model.layers[0].mlp.act_fn, Spy())
    fields = {} if method == "tune.full" else {"share": 0.2}
    spec = TrainSpec(steps=2, batch=2, lr=1e-2, max_length=32)
    parts = luthier.load(method, **fields), luthier.load("objective.next_token"), luthier.load("optim.adamw")
    done = train(model, tiny.tokenizer(), tiny.text_data(), *parts, spec, Context(), tmp_path)
    assert set(seen) == {torch.bfloat16 if half else torch.float32}
    assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}
    base = tiny.llama(0).to(torch.bfloat16)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    done.delta.apply_(base)
    after = done.model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in base.state_dict().items())
    assert any(not torch.equal(t, after[name]) for name, t in before.items())
