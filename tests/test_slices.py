"""Slices of layers: an output made of stretches of several models, by hand and as a checkpoint that loads."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from luthier.checkpoint.reader import Checkpoint
from luthier.engine.layout import Layout
from luthier.engine.stream import plan_transform, run_transform
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.merge.dare import Dare
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.merge.ties import Ties
from luthier.testing import tiny


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A base of four layers and two experts, one of them of six."""
    folder = tmp_path_factory.mktemp("three")
    for seed, (name, layers) in enumerate([("base", 4), ("one", 4), ("two", 6)]):
        tiny.checkpoint(folder / name, seed, num_hidden_layers=layers)
    return {name: Checkpoint.open(folder / name) for name in ("base", "one", "two")}


def merged(method, base, experts, slices, out):
    run_transform(method, base, experts, out, Context(), layout=Layout(slices))
    return load_file(out / "model.safetensors")


def weights(checkpoint):
    return load_file(checkpoint.path / "model.safetensors")


def layer(weights, index):
    stem = f"model.layers.{index}."
    return {name.removeprefix(stem): t for name, t in weights.items() if name.startswith(stem)}


def test_layers_of_two_models_one_after_another(three, tmp_path):
    """Two of one model, then four of another, copied bit for bit; the model loads and answers."""
    one, two = three["one"], three["two"]
    made = merged(Linear(), None, [one, two], (((0, 0, 2),), ((1, 1, 5),)), tmp_path / "out")
    wanted = [(one, 0), (one, 1), (two, 1), (two, 2), (two, 3), (two, 4)]
    for index, (source, at) in enumerate(wanted):
        theirs = layer(weights(source), at)
        assert theirs and all(torch.equal(layer(made, index)[n], t) for n, t in theirs.items())
    assert torch.equal(made["model.embed_tokens.weight"], weights(one)["model.embed_tokens.weight"])
    assert torch.equal(made["lm_head.weight"], weights(two)["lm_head.weight"])
    assert torch.equal(made["model.norm.weight"], weights(two)["model.norm.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        whole = model(ids).logits
        past = model(ids[:, :6]).past_key_values
        rest = model(ids[:, 6:], past_key_values=past).logits
    torch.testing.assert_close(whole[:, 6:], rest, atol=1e-5, rtol=1e-5)


def test_a_layer_may_come_twice(three, tmp_path):
    made = merged(Linear(), None, [three["one"]], (((0, 0, 3),), ((0, 1, 4),)), tmp_path / "out")
    theirs = weights(three["one"])
    for index, at in enumerate([0, 1, 2, 1, 2, 3]):
        assert all(torch.equal(layer(made, index)[n], t) for n, t in layer(theirs, at).items())
    assert not layer(made, 6)


def test_merged_within_a_slice(three, tmp_path):
    """Base layers 0 and 1 move by both experts' changes, layer 2 of the output by the second one's alone."""
    slices = (((None, 0, 2), (0, 0, 2), (1, 2, 4)), ((None, 3, 4), (1, 5, 6)))
    made = merged(TaskArithmetic(weights=(0.5, 0.25)), three["base"], [three["one"], three["two"]], slices,
                  tmp_path / "out")  # fmt: skip
    base, one, two = (weights(three[name]) for name in ("base", "one", "two"))
    for index, (b, a, c) in enumerate([(0, 0, 2), (1, 1, 3), (3, None, 5)]):
        for name, start in layer(base, b).items():
            hand = start + 0.25 * (layer(two, c)[name] - start)
            hand = hand if a is None else hand + 0.5 * (layer(one, a)[name] - start)
            torch.testing.assert_close(layer(made, index)[name], hand, atol=1e-6, rtol=1e-6)


def test_schedules_follow_the_layers_of_the_output(three, tmp_path):
    """A scale from 0 to 1 over the three layers there are."""
    slices = (((None, 1, 4), (0, 1, 4)),)
    made = merged(TaskArithmetic(scale=(0.0, 1.0)), three["base"], [three["one"]], slices, tmp_path / "out")
    base, one = weights(three["base"]), weights(three["one"])
    for index, scale in enumerate([0.0, 0.5, 1.0]):
        for name, start in layer(base, index + 1).items():
            hand = start + scale * (layer(one, index + 1)[name] - start)
            torch.testing.assert_close(layer(made, index)[name], hand, atol=1e-6, rtol=1e-6)


def test_lists_by_layer_in_the_config_follow(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, layer_types=kinds, use_sliding_window=True, sliding_window=8,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "in")
    source = Checkpoint.open(tmp_path / "in")
    merged(Linear(), None, [source], (((0, 1, 2),), ((0, 3, 4),), ((0, 2, 3),)), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3


WRONG = [
    (Linear(), False, (((0, 0, 5),),), r"slices\[0\]: layers \[0, 5\] of a model that has 4"),
    (Linear(), False, (((0, 0, 2), (1, 0, 3)),), r"slices\[0\]: the stretches have different lengths: \[2, 3\]"),
    (TaskArithmetic(), True, (((0, 0, 2), (1, 0, 2)),), r"slices\[0\]: lacks the base"),
    (TaskArithmetic(), True, (((None, 0, 2),),), r"slices\[0\]: names no expert"),
    (Ties(), True, (((None, 0, 2), (0, 0, 2), (1, 0, 2)), ((None, 2, 3), (0, 2, 3))),
     r"slices\[1\]: names 1 of 2 experts; merge.ties must see all of them together"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "based", "slices", "said"), WRONG)
def test_what_cannot_be_is_said_before_anything_is_read(three, method, based, slices, said):
    with pytest.raises(LuthierError, match=said):
        plan_transform(method, three["base"] if based else None, [three["one"], three["two"]], layout=Layout(slices))


@pytest.mark.parametrize("method", [Linear(weights=(1.0, -1.0)), Dare(weights=(1.0, -1.0), normalize=True)])
def test_weights_that_cancel_in_a_slice_are_found_beforehand(three, method):
    """Only where both experts meet; alone, either has a sum."""
    base, experts = three["base"], [three["one"], three["two"]]
    alone = ((None, 0, 2), (0, 0, 2)), ((None, 0, 2), (1, 0, 2))
    plan_transform(method, base, experts, layout=Layout(alone))
    for meet in (((None, 0, 1), (0, 0, 1), (1, 0, 1)),), (*alone, ((None, 0, 1), (0, 0, 1), (1, 0, 1))):
        with pytest.raises(LuthierError, match=r"weights: they sum to 0 at .*; set normalize: false"):
            plan_transform(method, base, experts, layout=Layout(meet))


@pytest.mark.parametrize(("slices", "head"), [
    ([[(0, 0, 1)], [(1, 1, 2)]], lambda tied, own: own["lm_head.weight"]),
    ([[(1, 0, 1)], [(0, 1, 2)]], lambda tied, own: tied["model.embed_tokens.weight"]),
    ([[(0, 0, 2), (1, 0, 2)]], lambda tied, own: (tied["model.embed_tokens.weight"] + own["lm_head.weight"]) / 2),
    ([[(1, 0, 2), (0, 0, 2)]], lambda tied, own: (tied["model.embed_tokens.weight"] + own["lm_head.weight"]) / 2),
    ([[(0, 0, 2)]], None),
])  # fmt: skip
def test_a_tied_model_beside_one_with_a_head_of_its_own(tmp_path, slices, head):
    """The tied one's head is its embedding, and the output, which then has a head, does not say it is tied."""
    for tied in (True, False):
        tiny.checkpoint(tmp_path / str(tied), int(tied), tie_word_embeddings=tied)
    models = [Checkpoint.open(tmp_path / str(tied)) for tied in (True, False)]
    tied, own = map(weights, models)
    assert "lm_head.weight" not in tied and "lm_head.weight" in own
    written = merged(Linear(), None, models, slices, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").config["tie_word_embeddings"] is (head is None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight.float(), written["lm_head.weight" if head else "model.embed_tokens.weight"])
    if head:
        torch.testing.assert_close(written["lm_head.weight"], head(tied, own))


def test_ends_of_two_vocabularies_need_a_tokenizer(tmp_path):
    for size in (280, 300):
        tiny.checkpoint(tmp_path / str(size), vocab_size=size)
    models = [Checkpoint.open(tmp_path / str(size)) for size in (280, 300)]
    with pytest.raises(LuthierError, match=r"slices\[1\]: a head of \[300, 32\] after an embedding of \[280, 32\]"):
        merged(Linear(), None, models, [[(0, 0, 1)], [(1, 1, 2)]], tmp_path / "out")
