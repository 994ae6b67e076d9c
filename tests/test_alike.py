"""Models of the same shapes that do not mean the same by them: refused, or said beforehand."""

import json
import types

import pytest
import torch

from luthier.checkpoint.alike import doubts
from luthier.checkpoint.reader import Checkpoint
from luthier.cli import main
from luthier.engine.stream import plan_transform
from luthier.errors import LuthierError
from luthier.merge.linear import Linear
from luthier.testing import tiny


def two(tmp_path, **changes):
    """Two tiny models; the second one's config.json says otherwise."""
    for seed, name in enumerate(("one", "two")):
        tiny.checkpoint(tmp_path / name, seed)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    path = tmp_path / "two" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return [Checkpoint.open(tmp_path / name) for name in ("one", "two")]


@pytest.mark.parametrize(("changes", "said"), [
    ({"num_attention_heads": 2, "head_dim": 16}, "two: has attention heads 2, one has 4"),
    ({"num_key_value_heads": 1}, "two: has key-value heads 1, one has 2"),
    ({"head_dim": 16}, "two: has entries a head 16, one has 8"),
    ({"hidden_act": "gelu"}, "two: has activation gelu, one has silu"),
])  # fmt: skip
def test_what_cannot_be_merged(tmp_path, changes, said):
    models = two(tmp_path, **changes)
    with pytest.raises(LuthierError, match=f"{said}; merge models of one architecture"):
        plan_transform(Linear(), None, models)


@pytest.mark.parametrize(("changes", "said"), [
    ({}, ()),
    ({"rms_norm_eps": 0.5}, ("two: rms_norm_eps is 0.5, the output has 1e-06",)),
    ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
     ("two: rope_theta is 500000.0, the output has 10000.0",)),
    ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
     ("two: rope_scaling is {'rope_type': 'linear', 'factor': 2.0}, the output has None",)),
    ({"sliding_window": 64}, ("two: sliding_window is 64, the output has None",)),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
     ("two: rope_scaling is {'rope_type': 'linear', 'factor': 2.0}, the output has None",)),
    ({"rope_parameters": None}, ()),
    ({"model_type": "mistral"}, ("two: model_type is 'mistral', the output has 'llama'",)),
    ({"eos_token_id": [1, 2]}, ("two: eos_token_id is [1, 2], the output has 1",)),
    ({"rope_parameters": [], "text_config": 3}, None),
])  # fmt: skip
def test_what_is_said_beforehand(tmp_path, changes, said):
    found = plan_transform(Linear(), None, two(tmp_path, **changes)).notes
    assert said is None or found == said


def test_chat_templates(tmp_path):
    models = two(tmp_path)
    (models[1].path / "chat_template.jinja").write_text("{{ messages }}")
    note = "two: the chat template is another one, the output has that of one"
    assert doubts(*models) == (note,)
    assert doubts(models[0], models[0]) == ()
    plain = "two: has a chat template, one none, nor has the output"
    config = models[0].path / "tokenizer_config.json"
    said = json.loads(config.read_text())
    said.pop("chat_template", None)
    config.write_text(json.dumps(said))
    (models[0].path / "chat_template.jinja").unlink(missing_ok=True)
    assert doubts(*models) == (plain,) and doubts(*models[::-1]) == ()


@pytest.mark.parametrize(("dtypes", "note"), [
    (("bfloat16", "float32"), ("two: weights are float32, the output's bfloat16 unless a dtype is given",)),
    (("float32", "bfloat16"), ()), (("bfloat16", "bfloat16"), ()),
    (("bfloat16", "float16"), ("two: weights are float16, the output's bfloat16 unless a dtype is given",)),
])  # fmt: skip
def test_dtypes(dtypes, note):
    models = []
    for name, kind in zip(("one", "two"), dtypes, strict=True):
        info = types.SimpleNamespace(dtype=getattr(torch, kind))
        models.append(types.SimpleNamespace(config={"model_type": "llama"}, path=name, tensors={"a": info}))
    assert doubts(*models) == note


def test_plan_shows_it_for_mergekits_yaml_too(tmp_path, capsys):
    two(tmp_path, rms_norm_eps=0.5)
    file = tmp_path / "merge.yaml"
    listed = ", ".join(f"{{model: {tmp_path}/{n}, parameters: {{weight: 1}}}}" for n in ("one", "two"))
    file.write_text(f"merge_method: linear\nmodels: [{listed}]\n")
    assert main(["plan", str(file), "--folder", str(tmp_path / "run")]) == 0
    assert "note: two: rms_norm_eps is 0.5, the output has 1e-06" in capsys.readouterr().out


def test_plan_knows_what_the_merge_would_refuse(tmp_path, capsys):
    """Where the output cannot be put, and inputs that are no numbers or lead elsewhere."""
    one, two_ = two(tmp_path)
    file = tmp_path / "merge.yaml"
    file.write_text("merge_method: linear\nmodels:\n" + "".join(
        f"- {{model: {model.path}, parameters: {{weight: 1}}}}\n" for model in (one, two_)
    ))  # fmt: skip

    def planned(out="run"):
        code = main(["plan", str(file), "--folder", str(tmp_path / out)])
        said = " ".join(capsys.readouterr().out.split())
        assert code == (2 if "cannot work" in said else 0)
        return said.partition("cannot work: ")[2]

    assert planned() == ""
    assert "holds an input" in planned("one")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    assert "exists and was not written by Luthier" in planned("other")
    (one.path / "tokenizer.model").symlink_to("/etc/hostname")
    assert "is a link out of its folder" in planned()
    (one.path / "tokenizer.model").unlink()
    for model in (one, two_):
        config = model.path / "config.json"
        before = config.read_text()
        config.write_text(json.dumps({**json.loads(before), "quantization_config": {"bits": 4}}))
        assert "the weights are quantized" in planned()
        config.write_text(before)
    assert planned() == ""
