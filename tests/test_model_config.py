"""The decoder's configuration: slots, overrides by layer, errors, JSON."""

import json

import pytest

from luthier.errors import LuthierError
from luthier.model import LuthierConfig, build_model
from luthier.model.config import config_from

SMALL = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 6}
MOE = {"use": "block.moe", "set": {"experts": 4}}


def test_defaults():
    config = LuthierConfig(**SMALL)
    assert config.slots == {}
    assert config.num_key_value_heads == 2 and config.head_dim == 4
    assert [config.part(s, 0).id for s in ("mixer", "ffn", "norm")] == ["block.attention", "block.dense", "norm.rms"]
    assert config.part("norm").id == "norm.rms"
    assert config.part("layer", 0) is None and config.part("stack") is None and config.part("linear", 0) is None


def test_the_narrowest_reach_wins_whatever_the_order():
    slots = {"ffn@2": "block.dense", "ffn": MOE, "ffn@1-3": {"use": "block.dense", "set": {"width": 3}}}
    for order in (list(slots), list(slots)[::-1], sorted(slots)):
        config = LuthierConfig(**SMALL, slots={k: slots[k] for k in order})
        parts = [config.part("ffn", i) for i in range(6)]
        assert [p.id for p in parts] == ["block.moe", *["block.dense"] * 3, *["block.moe"] * 2]
        assert [parts[i].width for i in (1, 2, 3)] == [3, None, 3]


def test_layers_from_the_end():
    config = LuthierConfig(
        **SMALL, slots={"ffn@-2--1": MOE, "mixer@-6": {"use": "block.attention", "set": {"theta": 5}}}
    )
    assert [config.part("ffn", i).id == "block.moe" for i in range(6)] == [False] * 4 + [True] * 2
    assert [config.part("mixer", i).theta for i in range(2)] == [5.0, None]


def test_a_norm_by_layer_leaves_the_last_norm():
    config = LuthierConfig(**SMALL, slots={"norm@0-5": {"use": "norm.rms", "set": {"eps": 0.5}}})
    assert config.part("norm", 5).eps == 0.5 and config.part("norm").eps is None
    config = LuthierConfig(**SMALL, slots={"norm": {"use": "norm.rms", "set": {"eps": 0.5}}})
    assert config.part("norm").eps == 0.5


def test_every_field_is_spelt_out():
    slots = LuthierConfig(**SMALL, slots={"ffn": "block.dense"}).slots
    assert slots["ffn"]["set"] == {"width": None, "activation": "silu", "gated": True}


def test_json_round_trip(tmp_path):
    config = LuthierConfig(**SMALL, slots={"ffn": MOE, "ffn@0": "block.dense", "mixer@1-2": "block.attention"})
    config.save_pretrained(tmp_path)
    again = LuthierConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "luthier"
    assert "auto_map" not in again.to_dict()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"slots": {"fnn": "block.dense"}}, "unknown slot 'fnn'; did you mean 'ffn'"),
        ({"slots": {"ffn": "block.dens"}}, "did you mean 'block.dense'"),
        ({"slots": {"ffn": "block.attention"}}, "slots.ffn: block.attention fills mixer"),
        ({"slots": {"ffn": {"use": "block.moe", "set": {"expert": 2}}}}, "did you mean 'experts'"),
        ({"slots": {"ffn": "merge.ties"}}, "expected a method of shape Part"),
        ({"slots": {"ffn@6": "block.dense"}}, "there is no layer 6 of 6"),
        ({"slots": {"ffn@-7": "block.dense"}}, "there is no layer -7 of 6"),
        ({"slots": {"ffn@x": "block.dense"}}, "unknown slot 'ffn"),
        ({"slots": {"stack@1": "block.dense"}}, "the stack belongs to no layer"),
        ({"slots": {"ffn@0-1": "block.dense", "ffn@1-2": "block.dense"}}, "both name layer 1"),
        ({"slots": {"ffn@1": "block.dense", "ffn@-5": "block.dense"}}, "both name layer 1"),
        ({"slots": {"mixer": {"use": "block.attention", "set": {"kv_heads": 3}}}}, "3 key-value heads do not divide"),
        ({"num_attention_heads": 3}, "is no multiple of 3 heads"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"hiden_size": 8}, "unknown model field 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "model.hidden_size: expected a whole number"),
        ({"slots": ["ffn"]}, "model.slots: expected"),
    ],
)
def test_errors_are_one_line_and_name_the_place(changes, says):
    with pytest.raises(LuthierError) as fault:
        build_model({**SMALL, **changes})
    assert says in str(fault.value) and "\n" not in str(fault.value)


def test_a_map_of_fields():
    assert config_from({**SMALL, "rope_theta": 500}).rope_theta == 500.0
    with pytest.raises(LuthierError, match="unknown model field"):
        config_from({**SMALL, "transformers_version": 3})
