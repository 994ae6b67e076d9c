"""probe.curse_of_depth against layers one can compute by hand, and a slow twin of each diagnostic."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.encode import encode
from luthier.model import build_model
from luthier.probe.curse_of_depth import CurseOfDepth
from luthier.testing import tiny

TOKENIZER = tiny.tokenizer()
LENGTHS = ("a few words", "more words than that, and a number: 17", "b c", "the last of the four sentences")
TEXTS = tiny.TinyData("text", (), [tiny.item(text=text) for text in LENGTHS])
LAYERS = 5


@pytest.fixture(scope="module")
def model():
    return tiny.llama(3, num_hidden_layers=LAYERS)


def measured(model, data=TEXTS, **fields):
    """{metric: its one value, or its values by layer}"""
    table = CurseOfDepth(**fields).measure([tiny.subject("m", model)], [data], Context())
    assert table.columns == ("model", "data", "metric", "layer", "value", "n")
    found: dict = {}
    for row in table.dicts():
        assert (row["model"], row["data"]) == ("m", data.name)
        if row["layer"] is None:
            found[row["metric"]] = row["value"]
        else:
            assert row["layer"] == len(found.setdefault(row["metric"], []))
            found[row["metric"]].append(row["value"])
    return found


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"diagnostics": ["variance", "angular"]}, 1), ({"diagnostics": ["drop"]}, 1 + LAYERS), ({"diagnostics": []}, 1)],
)
def test_the_plan_counts_the_passes_there_are(model, fields, expected):
    rows = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    measured(model, **fields)
    hook.remove()
    assert CurseOfDepth(**fields).passes(LAYERS) == expected == sum(rows) / len(LENGTHS)


def test_the_plan_counts_a_backward_pass_twice():
    assert CurseOfDepth(diagnostics=["jacobian"], probes=2).passes(9) == 1 + 2 * 3
    assert CurseOfDepth().passes(9) == 1 + 9 + 3


class Grow(nn.Module):
    """A layer that multiplies by a number, and turns two channels by an angle."""

    def __init__(self, factor, degrees):
        super().__init__()
        turn = math.radians(degrees)
        self.weight = nn.Parameter(factor * torch.eye(4))
        self.weight.data[:2, :2] = factor * torch.tensor(
            [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
        )

    def forward(self, x):
        return x @ self.weight.T


class Growing(nn.Module):
    """Grow layers between an embedding of plus and minus one and a head."""

    def __init__(self, *layers):
        super().__init__()
        self.config = SimpleNamespace(model_type="growing")
        self.table = nn.Parameter(torch.tensor([[1.0, 1.0, -1.0, -1.0], [2.0, -2.0, 2.0, -2.0]]).repeat(150, 1))
        self.layers = nn.ModuleList(Grow(*layer) for layer in layers)

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        x = self.table[input_ids]
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=x @ self.table.T)


def test_by_hand():
    """Factors 3 and 0.5: variances 9 and 9/4 times the start's. Turning two of four channels by 90 degrees turns a
    state of equal entries by 60; J - I of 3I is 2I; of half a turn, R/2 - I has squares 5/4, 5/4, 1/4, 1/4."""
    data = tiny.TinyData("text", (), [tiny.item(text="abc"), tiny.item(text="defgh")])
    found = measured(Growing((3.0, 0.0), (0.5, 90.0)), data)
    ids = [i for item in data.test for i in TOKENIZER(item.text)["input_ids"]]
    start = sum(1.0 if i % 2 == 0 else 4.0 for i in ids) / len(ids)
    assert found["variance"][0] == pytest.approx(9 * start, rel=1e-6)
    assert found["angular"] == pytest.approx([0.0, 60 / 180], abs=1e-6)
    assert found["jacobian"][0] == pytest.approx(2.0, rel=1e-6)
    assert found["jacobian"][1] == pytest.approx(math.sqrt(3 / 4), rel=0.3)
    assert measured(Growing((3.0, 0.0), (0.5, 90.0)), data, probes=200)["jacobian"][1] == pytest.approx(
        math.sqrt(3 / 4), rel=0.02
    )


def rows():
    return [torch.tensor([encode(item, TOKENIZER).input_ids]) for item in TEXTS.test]


@torch.no_grad()
def streams(model, ids):
    """The residual stream before the first layer and after each one, the last one before the final norm."""
    held = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: held.append(args[0]))
    states = list(model(ids, output_hidden_states=True).hidden_states)
    hook.remove()
    return [*states[:-1], held[0]]


@pytest.fixture(scope="module")
def twin(model):
    """One item at a time, nothing padded, a layer's Jacobian entry by entry."""
    found = {"variance": [0.0] * LAYERS, "jacobian": [0.0] * LAYERS, "angular": [0.0] * LAYERS}
    count = size = 0
    for ids in rows():
        stream = streams(model, ids)
        count += ids.shape[1]
        size += stream[0].numel()
        where = torch.arange(ids.shape[1])[None]
        for i, layer in enumerate(model.model.layers):
            x, y = stream[i][0], stream[i + 1][0]
            found["variance"][i] += sum(token.var(correction=0).item() for token in y)
            cosine = torch.cosine_similarity(x[-1].double(), y[-1].double(), dim=0)
            found["angular"][i] += math.acos(cosine.item()) / math.pi / len(rows())

            def run(x_flat, layer=layer, shape=stream[i].shape, where=where):
                x = x_flat.view(shape)
                return layer(x, position_embeddings=model.model.rotary_emb(x, where)).flatten()

            jacobian = torch.autograd.functional.jacobian(run, stream[i].flatten(), vectorize=True)
            found["jacobian"][i] += (jacobian - torch.eye(len(jacobian))).square().sum().item()
    found["variance"] = [v / count for v in found["variance"]]
    found["jacobian"] = [math.sqrt(v / size) for v in found["jacobian"]]
    return found


def without(model, place):
    other = copy.deepcopy(model)
    del other.model.layers[place]
    for i, layer in enumerate(other.model.layers):
        layer.self_attn.layer_idx = i
    other.config.num_hidden_layers = LAYERS - 1
    return other


@torch.no_grad()
def loss(model):
    """Nats a token, over all tokens that have one before them."""
    total = sum(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in rows())
    return total / sum(ids.shape[1] - 1 for ids in rows())


def test_against_the_slow_twin(model, twin):
    got = measured(model, probes=24)
    assert got["variance"] == pytest.approx(twin["variance"], rel=1e-5)
    assert got["angular"] == pytest.approx(twin["angular"], abs=1e-6)
    assert got["jacobian"] == pytest.approx(twin["jacobian"], rel=0.02)
    assert got["nll"] == pytest.approx(loss(model), rel=1e-5)
    for i in range(LAYERS):
        assert got["drop"][i] == pytest.approx(loss(without(model, i)) - loss(model), abs=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_change_nothing(model, batch):
    one, four = measured(model, batch=batch), measured(model, batch=4)
    for name in one:
        assert one[name] == pytest.approx(four[name], rel=1e-4, abs=1e-6)


def test_sums_over_the_layers(model):
    """Of five layers the deeper half are the last three."""
    found = measured(model)
    assert list(found)[:5] == [
        "nll",
        "variance growth",
        *(f"{n}, deeper half" for n in ("angular", "drop", "jacobian")),
    ]
    assert found["variance growth"] == pytest.approx(found["variance"][4] / found["variance"][0])
    for name in ("angular", "drop", "jacobian"):
        assert found[f"{name}, deeper half"] == pytest.approx(sum(found[name][2:]) / 3)


def test_span(model):
    """Distances between states two layers apart: one fewer, each from a layer's input to the next one's output."""
    got, ends = measured(model, span=2, diagnostics=["angular"]), []
    for ids in rows():
        stream = streams(model, ids)
        pairs = [(stream[i][0, -1], stream[i + 2][0, -1]) for i in range(LAYERS - 1)]
        ends.append([math.acos(torch.cosine_similarity(a.double(), b.double(), dim=0)) / math.pi for a, b in pairs])
    assert got["angular"] == pytest.approx([sum(column) / 4 for column in zip(*ends, strict=True)], abs=1e-6)
    assert list(got) == ["nll", "angular, deeper half", "angular"]


def test_a_span_beyond_the_model_is_noted(model):
    table = CurseOfDepth(span=6).measure([tiny.subject("m", model)], [TEXTS], Context())
    assert table.notes == ("m: no two states are 6 layers apart",)
    assert "angular" not in {row["metric"] for row in table.dicts()}
    assert CurseOfDepth(span=5).measure([tiny.subject("m", model)], [TEXTS], Context()).notes == ()


def test_probes_are_keyed_by_item_and_seed(model):
    first = measured(model)["jacobian"]
    assert measured(model)["jacobian"] == first
    table = CurseOfDepth().measure([tiny.subject("m", model)], [TEXTS], Context(seed=1))
    assert [r["value"] for r in table.where(metric="jacobian")] != first
    alone = tiny.TinyData("text", (), TEXTS.test[1:2])
    twice = tiny.TinyData("text", (), [TEXTS.test[1], TEXTS.test[1]])
    assert measured(model, alone)["jacobian"] == pytest.approx(measured(model, twice)["jacobian"], rel=1e-5)


def test_frozen_weights_have_the_same_jacobian(model):
    """The derivative is by the layers' inputs: no weight has to want a gradient."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert measured(frozen, diagnostics=["jacobian"]) == measured(model, diagnostics=["jacobian"])
    assert not any(p.requires_grad for p in frozen.parameters())


def test_limits_and_what_is_left_out(model):
    data = tiny.TinyData("d", (), [tiny.item(text="a"), tiny.item(prompt="unanswered"), *TEXTS.test])
    table = CurseOfDepth(max_items=4).measure([tiny.subject("m", model)], [data], Context())
    assert {row["n"] for row in table.dicts()} == {2}
    short = tiny.TinyData("d", (), [tiny.item(text=text[:8]) for text in LENGTHS])
    cut = measured(model, max_length=8)
    assert cut["nll"] != pytest.approx(measured(model)["nll"], rel=1e-3)
    assert len(TOKENIZER(LENGTHS[1])["input_ids"]) > 8 and measured(model, short)["nll"] > 0
    with pytest.raises(LuthierError, match="nothing|anything to predict"):
        measured(model, tiny.TinyData("d", (), [tiny.item(text="a")]))


def test_tasks_count_the_answer_only(model):
    data = tiny.task_data(test=4)
    total = count = 0.0
    for item in data.test:
        row = encode(item, TOKENIZER)
        with torch.no_grad():
            total += model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item() * row.count
        count += row.count
    assert measured(model, data)["nll"] == pytest.approx(total / count, rel=1e-5)


def test_a_model_of_ours_with_and_without_lns():
    """At the same weights the stream of LNS grows less and each deep layer is nearer to the identity."""
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4,
             "intermediate_size": 64, "initializer_range": 0.1}  # fmt: skip
    plain, lns = (measured(build_model(sizes | {"slots": slots}, 1).eval()) for slots in ({}, {"norm": "norm.lns"}))
    assert plain["variance"] == sorted(plain["variance"]) and plain["variance growth"] > 2 * lns["variance growth"]
    assert plain["variance"][0] == pytest.approx(lns["variance"][0], rel=1e-6)


def test_released_code_looks_at_padding(model):
    """The released importance pads on the right to a fixed length and takes position -1 of every text."""
    ids = rows()[0]
    padded = torch.cat([ids, torch.zeros(1, 32 - ids.shape[1], dtype=torch.long)], dim=1)
    mask = (torch.arange(32) < ids.shape[1]).long()[None]
    with torch.no_grad():
        states = model(padded, attention_mask=mask, output_hidden_states=True).hidden_states
    released = math.acos(torch.cosine_similarity(states[0][0, -1], states[1][0, -1], dim=0).item()) / math.pi
    ours = measured(model, tiny.TinyData("text", (), TEXTS.test[:1]))["angular"][0]
    stream = streams(model, ids)
    paper = math.acos(torch.cosine_similarity(stream[0][0, -1], stream[1][0, -1], dim=0).item()) / math.pi
    assert ours == pytest.approx(paper, abs=1e-5) and abs(released - paper) > 0.01


def test_released_code_ends_after_the_final_norm(model):
    """transformers' last hidden state is the normed one; with gains that differ, the angle is another."""
    other = copy.deepcopy(model)
    other.model.norm.weight.data = torch.linspace(0.1, 3, 32)
    ids = rows()[1]
    with torch.no_grad():
        states = other(ids, output_hidden_states=True).hidden_states
    released = math.acos(torch.cosine_similarity(states[-2][0, -1], states[-1][0, -1], dim=0).item()) / math.pi
    ours = measured(other, tiny.TinyData("text", (), TEXTS.test[1:2]))["angular"][-1]
    before = measured(model, tiny.TinyData("text", (), TEXTS.test[1:2]))["angular"][-1]
    assert ours == before and abs(released - ours) > 0.02


def test_what_is_measured_unless_told_otherwise():
    assert CurseOfDepth().to_dict()["set"] == {
        "diagnostics": ["variance", "angular", "drop", "jacobian"], "span": 1, "probes": 1, "max_items": 64,
        "max_length": 256, "batch": 16,
    }  # fmt: skip
    assert CurseOfDepth(max_length=8).max_length == 8
