"""Training killed in mid-step and in mid-save: the weights, the optimizer's state and the history end the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from dying import script


@pytest.fixture(scope="module")
def killed(tmp_path_factory, times) -> list[Path]:
    """A folder for each seed of the dice."""
    folders = [tmp_path_factory.mktemp(f"kill{seed}") for seed in range(times(1, 2))]
    for seed, folder in enumerate(folders):
        script("trainer_lives.py", "kill", folder, 7 + seed)
    return folders


@pytest.mark.parametrize("name", ["full", "lift"])
def test_ten_deaths_leave_no_trace(killed, name, tell):
    """SIGKILL at ten random moments, six of them inside a save: the last byte is the same."""
    for folder in killed:
        told = json.loads((folder / f"{name}.json").read_text())
        assert told["deaths"] == [-9] * 10
        assert told["leftovers"] >= 1  # at least one death left a half-written save
        assert (
            "step-00000002" <= told["reached"] < "step-00000030"
        )  # lives got on, and none but the last came to the end
        for kind in ("out", "save"):  # what was learned; and the last save, optimizer and all
            assert (folder / f"{name}-calm.{kind}").read_bytes() == (folder / f"{name}-killed.{kind}").read_bytes()
        with safe_open(folder / f"{name}-killed.out", "pt") as file:
            assert len(json.loads(file.metadata()["history"])) == 30
        tell(f"training ({name}): 10 killed, 6 of them inside a save, {told['leftovers']} left it half written")
