"""What is wrong with a mergekit file and shows only later is said with the file's own line, too."""

import pytest

from luthier.cli import main
from luthier.cli_models import merge_recipe
from luthier.errors import LuthierError
from luthier.testing import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, layers) in enumerate([("base", 2), ("one", 2), ("two", 2), ("six", 3)]):
        tiny.checkpoint(folder / name, seed, num_hidden_layers=layers)
    return folder


HEAD = """merge_method: METHOD
base_model: base
models:
  - model: one
    parameters: {weight: 1}
  - model: two
    parameters:
      weight: 0.5
"""
SLICE = "  - sources:\n      - {model: base, layer_range: [0, 2]}\n      - {model: one, layer_range: RANGE}\n"
SLICES = "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 1}\nslices:\n"
WRONG = [
    (HEAD.replace("model: two", "model: nosuch/model-x"), "ties", "6: 'nosuch/model-x' is not"),
    (HEAD.replace("model: two", "model: ./nosuch"), "ties", "6: no such folder: './nosuch'"),
    (HEAD.replace("base_model: base", "base_model: ./nosuch"), "ties", "2: no such folder: './nosuch'"),
    (HEAD.replace("model: two", "model: six"), "ties", "6: FOLDER/six/model.safetensors: tensor "),
    (HEAD + "parameters:\n  int8_mask: true\n  density: 1.5\n", "ties", "11: density 1.5 is out of range"),
    (HEAD + "      density: 0.9\nparameters:\n  epsilon: 0.3\n", "della", "9: merge.della: density 0.9 leaves no room"),
    (HEAD + "parameters:\n  epsilon: 0.3\n  density: 0.9\n", "della", "11: merge.della: density 0.9 leaves no room"),
    (HEAD.replace("0.5", "-1") + "parameters:\n  normalize: true\n", "linear",
     "2: 'weight' is not given for every tensor"),
    (HEAD.replace("0.5", "-1").replace("base_model: base\n", ""), "linear", "4: weights: they sum to 0"),
    (HEAD + "tokenizer:\n  source: union\n  pad_to_multiple_of: '64'\n", "ties",
     "11: expected a number from 1 to 65536, got '64'"),
    (SLICES + SLICE.replace("RANGE", "[0, 2]") + SLICE.replace("RANGE", "[1, 3]"), "",
     "8: slices[1]: layers [1, 3] of a model that has 2"),
    (SLICES + SLICE.replace("RANGE", "[0, 1]"), "", "5: slices[0]: the stretches have different lengths: [1, 2]"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "method", "says"), WRONG)
def test_the_line_is_named(text, method, says, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("base", "one", "two", "six"):
        text = text.replace(f"model: {name}", f"model: {models}/{name}")
    (tmp_path / "mine.yaml").write_text(text.replace("METHOD", method))
    assert main(["merge", "mine.yaml", "out"]) == 2
    said = capsys.readouterr().err
    assert f"mine.yaml:{says.replace('FOLDER', str(models))}" in said, said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_value_from_the_command_line_is_named_by_it(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    (tmp_path / "mine.yaml").write_text(HEAD.replace("METHOD", "ties"))
    made = merge_recipe(str(tmp_path / "mine.yaml"), ["merged.density=0.5"])
    assert made.steps["merged"].method.density == 0.5 and made.name == "mine"
    with pytest.raises(LuthierError, match="^--set merged.density=2: "):
        merge_recipe(str(tmp_path / "mine.yaml"), ["merged.density=2"])
