"""mergekit's YAML as recipes: what is kept, and the line of what is not."""

import pytest
import torch

from luthier.catalogue import load as method
from luthier.engine.mergekit import METHODS, to_recipe
from luthier.engine.mergekit_sources import WHOLE
from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.schedule import at
from luthier.recipe import load
from luthier.recipe_text import parse
from luthier.shapes import Method

TIES = """merge_method: ties
base_model: base
models:
  - model: base
  - model: one
    parameters: {weight: 0.7, density: 0.5}
  - model: two
    parameters:
      weight: [0.0, 1.0]
parameters:
  density: [{filter: mlp, value: [0.2, 0.4]}, {filter: norm, value: 0}, {value: 0.9}]
  lambda: 1.5
  normalize: false
  int8_mask: true
dtype: float32
out_dtype: bfloat16
"""
INSIDE = {"*layers.*": [0.0, 1.0], "*h.[0-9]*": [0.0, 1.0]}


def recipe(text):
    return to_recipe(parse(text, "file.yaml")).value["steps"]["merged"]


def test_ties_whole():
    step = recipe(TIES)
    inside = ("*mlp*layers.*", "*layers.*mlp*", "*mlp*h.[0-9]*", "*h.[0-9]*mlp*")
    mlp = {"*mlp*": 0.2} | dict.fromkeys(inside, [0.2, 0.4])
    assert step == {
        "use": "merge.ties", "base": "base", "experts": ["one", "two"], "dtype": "bf16",
        "set": {
            "weights": [0.7, {"*": 0.0, **INSIDE}], "densities": [0.5, {"*": 0.9, "*norm*": 0.0, **mlp}],
            "scale": 1.5, "normalize": False, "scope": "tensor", "on_tie": "plus",
        },
    }  # fmt: skip
    made = method(step["use"], **step["set"])
    assert isinstance(made, Method)


def test_it_is_a_recipe(tmp_path):
    from luthier.testing import tiny

    for seed, name in enumerate(("base", "one", "two")):
        tiny.checkpoint(tmp_path / name, seed)
    text = TIES.replace(": base", f": {tmp_path}/base").replace(": one", f": {tmp_path}/one")
    made = load(to_recipe(parse(text.replace(": two", f": {tmp_path}/two"), "file.yaml")))
    step = made.steps["merged"]
    assert step.use == "merge.ties" and step.dtype == "bf16" and len(step.roles["experts"]) == 2


def test_parameters_of_the_file_hold_for_all():
    text = "merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {weight: 2}}]\nparameters: {weight: 1}"
    assert recipe(text) == {
        "use": "merge.linear", "experts": ["a", "b"], "set": {"weights": [1.0, 2.0], "normalize": True}
    }  # fmt: skip


def test_task_arithmetic_normalised():
    text = """{merge_method: task_arithmetic, base_model: base, parameters: {normalize: true, lambda: 0.5},
    models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]}"""
    assert recipe(text)["set"] == {"weights": [0.25, 0.75], "scale": 0.5}
    plain = recipe(text.replace("normalize: true, ", ""))
    assert plain["set"]["weights"] == [1.0, 3.0] and "dtype" not in plain
    zero = recipe(text.replace("weight: 3", "weight: -1"))
    assert zero["set"]["weights"] == [1.0, -1.0]


def test_the_base_is_one_of_whole_models():
    """As mergekit adds it: with the weight of the file."""
    text = "{merge_method: linear, base_model: base, parameters: {weight: 1}, models: [{model: a}, MORE]}"
    more = text.replace("MORE", "{model: b, parameters: {weight: 3}}")
    assert recipe(more)["experts"] == ["a", "b", "base"] and recipe(more)["set"]["weights"] == [1.0, 3.0, 1.0]
    listed = recipe(text.replace("MORE", "{model: base, parameters: {weight: 2}}"))
    assert listed["experts"] == ["a", "base"] and listed["set"]["weights"] == [1.0, 2.0]


def test_switches_of_slices():
    """The slice's own, then the file's; all slices must agree."""
    sources = "sources: [{model: base, layer_range: [0, 1]}, {model: a, layer_range: [0, 1], parameters: {weight: 1}}]"
    one = lambda flags: f"{{{sources}, parameters: {{{flags}}}}}"  # noqa: E731
    head = "merge_method: ties\nbase_model: base\nparameters: {normalize: true}\nslices:\n- "
    assert recipe(head + one("normalize: false"))["set"]["normalize"] is False
    assert recipe(head + one(""))["set"]["normalize"] is True
    assert recipe(head + one("normalize: 1.0"))["set"]["normalize"] is True
    with pytest.raises(LuthierError, match="file.yaml:6: 'normalize' is not the same in all slices"):
        recipe(head + one("") + "\n- " + one("normalize: false"))
    dare = head.replace("ties", "dare_linear").replace("normalize: true", "") + one("normalize: yes, rescale: 0")
    assert [recipe(dare)["set"][k] for k in ("normalize", "rescale")] == [True, "none"]
    stock = head.replace("ties", "model_stock") + one("filter_wise: true").replace("weight: 1", "")
    assert recipe(stock)["set"]["filter_wise"] is True
    with pytest.raises(LuthierError, match="file.yaml:5: ties is not rescaled here"):
        recipe(head + one("rescale: true"))


def test_numbers_and_names_as_others_write_them():
    text = """x-w: &w {weight: "0.5"}
name: mine
random_seed: 0
merge_method: linear
base_model: {model: {path: base}}
models: [{model: {model: {path: a}}, parameters: *w}, {model: base, parameters: {weight: 5e-1}}]
dtype: torch.bfloat16
tokenizer_source: {model: {path: a}}"""
    step = recipe(text)
    assert (step["base"], step["experts"], step["set"]["weights"]) == ("base", ["a", "base"], [0.5, 0.5])
    assert (step["dtype"], step["tokenizer"]) == ("bf16", "a")


def test_della_of_different_windows():
    text = """{merge_method: della, base_model: base, parameters: {weight: 1, epsilon: 0.1},
    models: [{model: a, parameters: {density: 0.6}}, {model: b, parameters: {density: 1.0}},
             {model: c, parameters: {density: 0.6, epsilon: 0.05}}]}"""
    fields = recipe(text)["set"]
    assert (fields["densities"], fields["epsilons"]) == ([0.6, 1.0, 0.6], [0.1, 0.0, 0.05])
    assert method("merge.della", **fields).epsilons == (0.1, 0.0, 0.05)


def test_density_is_one_unless_given():
    text = "{merge_method: ties, base_model: base, models: [{model: a, parameters: {weight: 1}}]}"
    fields = recipe(text)["set"]
    assert fields["density"] == 1.0 and "densities" not in fields
    base, expert = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 2.0, 3.0])}
    made = transform_tensors(method("merge.ties", **fields), base, [expert], Context())
    assert made["w"].tolist() == [1.0, 2.0, 3.0]


HEAD = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters: {weight: 1}\n"
WRONG = [
    ("merge_method: tie\nmodels: []", "file.yaml:1: unknown merge_method 'tie'; did you mean 'ties'?"),
    ("merge_method: karcher\nmodels: []", "file.yaml:1: unknown merge_method 'karcher'"),
    ("merge_method: slerp\nmodels: []", "file.yaml:1: slerp needs a base_model"),
    ("merge_method: ties\nmodels: [{model: a}]", "file.yaml:1: ties needs a base_model"),
    ("merge_method: linear\nmodels: []", "file.yaml:2: expected a list of models"),
    ("merge_method: linear\nslices: []", "file.yaml:2: expected a list of slices"),
    ("merge_method: linear\nslices: []\nmodels: []", "give models or slices, one of them"),
    ("merge_method: linear\nmodules: {}", "file.yaml:2: 'modules' is not taken over; use mergekit for it"),
    (HEAD + "tokenizer: {source: union, tokens: {a: {}}}", "file.yaml:6: 'tokens' is not taken over"),
    (HEAD + "tokenizer_source: other", "file.yaml:6: unknown tokenizer 'other'"),
    (HEAD + "dtyp: bfloat16", "file.yaml:6: unknown key 'dtyp'; did you mean 'dtype'?"),
    (HEAD + "dtype: bf16", "file.yaml:6: unknown dtype 'bf16'; did you mean 'bfloat16'?"),
    (HEAD + "parameters:\n  rescale: true", "file.yaml:7: ties is not rescaled here; drop it"),
    (HEAD + "parameters:\n  normalize: 2", "file.yaml:7: expected true or false, got 2"),
    (HEAD + "parameters:\n  normalize: [{value: true}]", "file.yaml:7: expected true or false, got [{'value': True}]"),
    (HEAD + "parameters:\n  density: [0.5, 1.5]", "file.yaml:7: density [0.5, 1.5] is out of range"),
    (HEAD + "parameters:\n  lambda: nan", "file.yaml:7: expected a number or a list of numbers, got 'nan'"),
    (HEAD + "parameters:\n  lambda: true", "file.yaml:7: expected a number or a list of numbers, got True"),
    (HEAD + "parameters:\n  density: null\n  lambda: []", "file.yaml:8: expected a number or a list of numbers, got"),
    (HEAD + "parameters:\n  density: [0.1, x]", "file.yaml:7: expected a number or a list of numbers"),
    (HEAD + "  - model: b\n", "file.yaml:6: 'weight' is not given for every tensor"),
    (HEAD + "  - model: b+lora\n", "file.yaml:6: the adapter 'lora' is for 'b', and only adapters of "
     "one base_model are merged here; merge it into 'b' first, and give the folder of the result"),
    (HEAD.replace("base_model: base", "base_model: base+lora"), "file.yaml:2: the adapter 'lora' is for 'base', and"),
    (HEAD + "  - model: b+c+d\n", "file.yaml:6: 'b+c+d' is more than a name; give MODEL+ADAPTER"),
    (HEAD + "  - model: {model: {path: b, revision: main}}\n", "file.yaml:6: 'b@main' is more than a name"),
    (HEAD + "  - model: {model: b, override_architecture: A}\n", "file.yaml:6: 'override_architecture' is not taken"),
    (HEAD + "  - model: {path: b}\n", "file.yaml:6: unknown key 'path'"),
    (HEAD + "  - model: a\n    parameters: {weight: 2}", "file.yaml:6: 'a' stands twice"),
    (HEAD + "  - model: base\n  - model: base\n", "file.yaml:7: 'base' stands twice"),
    (HEAD + "tokenizer_source: base\ntokenizer: {source: union}", "file.yaml:7: tokenizer and tokenizer_source both"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nbase_model: base",
     "file.yaml:3: 'weight' is not given for every tensor"),
    ("merge_method: passthrough\nmodels: [{model: a}]\nbase_model: base", "file.yaml:1: passthrough merges nothing"),
    (HEAD + "  - model: b@main\n", "file.yaml:6: 'b@main' is more than a name"),
    (HEAD + "  - model: 3\n", "file.yaml:6: expected the name of a model"),
    (HEAD + "  - model: b\n    parameters:\n      weight: [{filter: mlp}]", "file.yaml:8: expected {filter:"),
    (HEAD + "  - model: b\n    parameters:\n      gamma: 0.1", "file.yaml:8: unknown key 'gamma'"),
    (HEAD + "  - b", "file.yaml:6: expected a map"),
    ("merge_method: ties\nbase_model: a\nmodels:\n  - model: a", "file.yaml:3: there is nothing to merge but the base"),
    ("{merge_method: task_arithmetic, base_model: x, parameters: {normalize: true}, "
     "models: [{model: a, parameters: {weight: [0, 1]}}]}", "file.yaml:1: normalize needs plain weights"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), WRONG)
def test_what_cannot_be_kept_is_named(text, says):
    with pytest.raises(LuthierError) as fault:
        recipe(text)
    assert says in str(fault.value) and "\n" not in str(fault.value)


SLICES = """merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: one, layer_range: [1, 3], parameters: {weight: [0.0, 1.0]}}
  - sources:
      - {model: one, layer_range: [0, 3], parameters: {weight: 0.5, density: [{filter: mlp, value: [0.1, 0.5]}]}}
      - {model: base, layer_range: [1, 4]}
    parameters: {lambda: [{filter: layers.3., value: 2}, {value: [1, 3]}]}
parameters: {density: 0.25}
"""


def test_slices():
    """Gradients run over the layers of their slice; what stands before belongs to the first, after to the last."""
    step = recipe(SLICES)
    assert step["slices"] == [{"base": [0, 2], "one": [1, 3]}, {"one": [0, 3], "base": [1, 4]}]
    (weight,), density, scale = step["set"]["weights"], step["set"]["density"], step["set"]["scale"]
    layers = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(5)]
    outside = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert [at(weight, n, None) for n in layers] == [0.0, 1.0, 0.5, 0.5, 0.5]
    assert [at(weight, n, None) for n in outside] == [0.0, 0.5, 0.5]
    mlp = [n.replace("self_attn.q", "mlp.up") for n in layers]
    assert [at(density, n, None) for n in mlp] == pytest.approx([0.25, 0.25, 0.1, 0.3, 0.5])
    assert [at(density, n, None) for n in [*layers, *outside]] == [0.25] * 8
    assert [at(scale, n, None) for n in layers] == [1.0, 1.0, 1.0, 2.0, 3.0]
    assert [at(scale, n, None) for n in outside] == [1.0, 1.0, 1.0]


def test_passthrough_and_tokenizer():
    text = """{merge_method: passthrough, tokenizer: {source: b, pad_to_multiple_of: 8}, slices: [
    {sources: [{model: a, layer_range: [0, 1]}]}, {sources: [{model: b, layer_range: [0, 1]}]}]}"""
    assert recipe(text) == {
        "use": "merge.linear", "experts": ["a", "b"], "set": {"weights": [1.0, 1.0], "normalize": False},
        "slices": [{"a": [0, 1]}, {"b": [0, 1]}], "tokenizer": {"source": "b", "pad_to_multiple_of": 8},
    }  # fmt: skip


def test_adapters_stand_on_the_base():
    text = "{merge_method: ties, base_model: base, models: [{model: base+folder/lora, parameters: {weight: 1}}]}"
    assert recipe(text)["experts"] == ["folder/lora"]
    as_map = "{model: {path: base}, lora: {path: folder/lora}}"
    assert recipe(text.replace("base+folder/lora", as_map))["experts"] == ["folder/lora"]


def test_an_adapter_names_its_base_where_nobody_else_does():
    step = recipe("{merge_method: passthrough, models: [{model: base+lora}]}")
    assert (step["base"], step["experts"]) == ("base", ["lora"])
    with pytest.raises(LuthierError, match="file.yaml:4: the adapter 'b' is for 'two'"):
        recipe("merge_method: linear\nmodels:\n- model: one+a\n- model: two+b\nparameters: {weight: 1}")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_of_ours(name):
    """What the table makes of an empty parameter list constructs, and every field is known."""
    way = METHODS[name]
    needed = {"slerp": "t: 0.5"}.get(name, "weight: 1" if "weight" in way.parameters else "")
    base = "" if name in WHOLE else "base_model: base, "
    text = f"{{merge_method: {name}, {base}parameters: {{{needed}}}, models: [{{model: a}}]}}"
    step = recipe(text)
    assert method(step["use"], **step["set"]).id == way.use
    if not {"normalize", "rescale"} & set(step["set"]) and name != "task_arithmetic":
        idle = "int8_mask: true, normalize: true, rescale: false, embed_slerp: true"
        assert recipe(text.replace(f"{{{needed}}}", f"{{{', '.join(filter(None, (needed, idle)))}}}")) == step
