"""mergekit's parameters as schedules: at every tensor the number that mergekit's own rule gives."""

import json
import math
import re
from fnmatch import fnmatchcase, translate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.catalogue import load as method
from luthier.engine.mergekit import to_recipe
from luthier.kit import schedule
from luthier.kit.schedule import at
from luthier.recipe_text import parse

LLAMA = (
    "model.layers.{}.", ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm"),
    ("model.embed_tokens.weight",), ("model.norm.weight", "lm_head.weight"),
)  # fmt: skip
GPT2 = (
    "transformer.h.{}.", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "ln_1"),
    ("transformer.wte.weight", "transformer.wpe.weight"), ("transformer.ln_f.weight",),
)  # fmt: skip
LAYERS = 14


def inside(family, layer):
    return [f"{family[0].format(layer)}{part}.weight" for part in family[1]]


def fields(config):
    return to_recipe(parse(json.dumps(config), "file.yaml")).value["steps"]["merged"]["set"]


def listed(rows):
    return [{"value": v} if part is None else {"filter": part, "value": v} for part, v in rows]


def theirs(rows, name, t):
    """mergekit's rule in our words: rows in order, the first whose filter is in the name; gradients linear in t."""
    for part, value in rows:
        if part in (None, "*") or part in name:
            if not isinstance(value, list):
                return value
            place = t * (len(value) - 1)
            low = min(math.floor(place), len(value) - 1)
            high = min(low + 1, len(value) - 1)
            return value[low] * (1 - place + low) + value[high] * (place - low)
    raise AssertionError


@st.composite
def parts(draw, family):
    """Stretches of the names there are, most of them over a layer's number."""
    layer = draw(st.sampled_from([0, 1, 3, 10, 13]))
    name = draw(st.sampled_from([*inside(family, layer), *inside(family, layer), *family[2], *family[3]]))
    start = draw(st.integers(0, len(name) - 1))
    return name[start : draw(st.integers(start + 1, len(name)))]


def settings(draw, family, most=3):
    value = st.one_of(st.integers(0, 8), st.lists(st.integers(0, 8), min_size=1, max_size=3))
    return draw(st.lists(st.tuples(parts(family), value), max_size=most))


@given(st.data())
def test_filters_of_a_model(data):
    family = data.draw(st.sampled_from([LLAMA, GPT2]))
    own, file = settings(data.draw, family), settings(data.draw, family)
    rows = [*own, *file, (None, [1, 5, 2])]
    models = [{"model": "a", "parameters": {"weight": listed(own)}} if own else {"model": "a"}]
    config = {"merge_method": "linear", "models": models, "parameters": {"weight": listed(rows[len(own) :])}}
    weight = method("merge.linear", **fields(config)).weights[0]
    for layer in range(LAYERS):
        depth = layer / (LAYERS - 1)
        for name in inside(family, layer):
            assert at(weight, name, depth) == pytest.approx(theirs(rows, name, depth)), name
    for name in (*family[2], *family[3]):
        assert at(weight, name, None) == theirs(rows, name, 0.0), name


@given(st.data())
def test_filters_of_slices(data):
    """A model's own are asked for by its layers, the method's by the output's; outside the end slices count."""
    draw = data.draw
    family = draw(st.sampled_from([LLAMA, GPT2]))
    file = {"weight": [*settings(draw, family), (None, [6, 1])], "lambda": [*settings(draw, family), (None, 3)]}
    slices, wanted, start, ends = [], [], 0, {}
    for number in range(count := draw(st.integers(1, 3))):
        first, length = draw(st.integers(0, 10)), draw(st.integers(1, 4))
        own = settings(draw, family)
        shared = {key: settings(draw, family) for key in file}
        written = {key: listed(rows) for key, rows in shared.items() if rows}
        source = {"model": "a", "layer_range": [first, first + length], "parameters": {"weight": listed(own)}}
        base = {"model": "base", "layer_range": [first, first + length]}
        slices.append({"sources": [base, source if own else {**source, "parameters": {}}], "parameters": written})
        weights, scales = [*own, *shared["weight"], *file["weight"]], [*shared["lambda"], *file["lambda"]]
        for i in range(length):
            t = i / (length - 1) if length > 1 else 1.0
            for name, input_ in zip(inside(family, start + i), inside(family, first + i), strict=True):
                wanted.append((name, theirs(weights, input_, t), theirs(scales, name, t)))
        start += length
        ends |= {"before": (weights, scales)} if number == 0 else {}
        ends |= {"after": (weights, scales)} if number == count - 1 else {}
    for names, (weights, scales) in ((family[2], ends["before"]), (family[3], ends["after"])):
        wanted += [(name, theirs(weights, name, 0.0), theirs(scales, name, 0.0)) for name in names]
    config = {"merge_method": "task_arithmetic", "base_model": "base", "slices": slices,
              "parameters": {key: listed(rows) for key, rows in file.items()}}  # fmt: skip
    made = method("merge.task_arithmetic", **fields(config))
    for name, weight, scale in wanted:
        assert at(made.weights[0], name, None) == pytest.approx(weight), name
        assert at(made.scale, name, None) == pytest.approx(scale), name


PARTS = ["mlp", ".mlp.", ".self_attn.", "layers.3", "layers.3.mlp", "model.layers", "3.mlp", "layers", "s.13", "embed"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("sliced", [False, True])
def test_every_kind_of_part(part, sliced):
    """A part before a layer's number, in it, over its ends or after it, ahead of one that it shares names with."""
    rows = [(part, [0.9, 0.3]), ("mlp", 0.4), (None, [0.1, 0.8])]
    models = [{"model": "a", "layer_range": [0, LAYERS]}, {"model": "b", "layer_range": [0, LAYERS]}]
    config = {"merge_method": "slerp", "base_model": "a", "parameters": {"t": listed(rows)}}
    config |= {"slices": [{"sources": models}]} if sliced else {"models": [{"model": "a"}, {"model": "b"}]}
    t = method("merge.slerp", **fields(config)).t
    for layer in range(LAYERS):
        depth = layer / (LAYERS - 1)
        for name in inside(LLAMA, layer):
            assert at(t, name, depth) == pytest.approx(theirs(rows, name, depth)), name
    for name in (*LLAMA[2], *LLAMA[3]):
        assert at(t, name, None) == pytest.approx(theirs(rows, name, 0.0)), name


def test_a_numbered_filter_comes_first():
    """Where it stands before filters of modules in a slice, after others of the slice's own."""
    weight = [{"filter": "layers.3.", "value": 2}, {"filter": "up_proj", "value": [1, 0]}]
    sources = [{"model": "base", "layer_range": [2, 4]},
               {"model": "a", "layer_range": [2, 4], "parameters": {"weight": weight}}]  # fmt: skip
    early = [{"model": m, "layer_range": [0, 2]} for m in ("base", "a")]
    slices = [{"sources": early}, {"sources": sources, "parameters": {"weight": [{"filter": "norm", "value": 0.05}]}}]
    config = {"merge_method": "task_arithmetic", "base_model": "base", "slices": slices, "parameters": {"weight": 0.7}}
    found = method("merge.task_arithmetic", **fields(config)).weights[0]
    seen = lambda layer: [at(found, name, None) for name in inside(LLAMA, layer)]  # noqa: E731
    assert seen(3) == [2.0] * 5
    assert seen(2) == [0.7, 0.7, 1.0, 0.7, 0.05]


WORDS = ["*", "?", "layers.", "h.", "3.", "13.", "3", "mlp", "[0-9]", "[l]ayers.3.", ".", "path.3.", "[!a]"]
NAMES = ["model.", "layers.", "h.", "3.", "13.", "4.", "self_attn", "mlp.", "path.", "l", "h"]


@given(
    globs=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join), max_size=6, unique=True),
    name=st.lists(st.sampled_from(NAMES), min_size=1, max_size=6).map("".join),
)
def test_patterns_sorted_by_layer_match_as_one_by_one(globs, name):
    slow = [glob for glob in globs if fnmatchcase(name, glob)]
    assert schedule._Globs(globs).last(name) == (slow[-1] if slow else None)


def test_a_tensor_is_asked_about_its_own_layer(monkeypatch):
    """Patterns for a hundred layers cost it no more than those for one, so that tensors times layers stay cheap."""
    asked = []

    def compiled(glob):
        asked.append(glob)
        return re.compile(translate(glob))

    monkeypatch.setattr(schedule, "_compiled", compiled)
    globs = ["*", *(f"*layers.{i}.{part}*" for i in range(100) for part in ("mlp", "self_attn"))]
    made = schedule._Globs(globs)
    assert made.last("model.layers.7.mlp.up_proj.weight") == "*layers.7.mlp*" and len(asked) == 2
    assert made.last("model.norm.weight") == "*" and len(asked) == 3
