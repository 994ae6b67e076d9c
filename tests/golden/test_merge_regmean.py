"""RegMean against hand calculation, a slow twin that runs the model by hand, and numbers from the authors' code."""

import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit.calibrate import drawn, each_input, linears, sharing
from luthier.kit.context import Context
from luthier.merge.regmean import RegMean
from luthier.testing import tiny


class Layer(nn.Module):
    """A model whose linear layer sees, for each letter, a row of its own; with a bias and a head tied to it."""

    def __init__(self, inputs, weight, turned=False, bias=0.0):
        super().__init__()
        self.config = types.SimpleNamespace(model_type="layer")
        inputs, weight = torch.tensor(inputs), torch.tensor(weight)
        self.embed = nn.Embedding.from_pretrained(inputs)
        self.l = Conv1D(weight.shape[0], weight.shape[1]) if turned else nn.Linear(weight.shape[1], weight.shape[0])
        self.l.weight.data = weight.T.contiguous() if turned else weight
        self.l.bias.data = torch.full((weight.shape[0],), bias)

    def forward(self, input_ids, **rest):
        return types.SimpleNamespace(logits=self.l(self.embed(input_ids)))


class Letters:
    pad_token_id, eos_token_id, chat_template = 0, None, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) - 97 for c in text]}


def merged(method, models, texts):
    roles = {
        "subjects": [tiny.TinySubject(str(i), m, Letters()) for i, m in enumerate(models)],
        "data": [tiny.TinyData(str(i), [tiny.item(text=t)], ()) for i, t in enumerate(texts)],
    }
    tensors = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    return transform_tensors(method, None, tensors, Context(step="golden", roles=roles))


def test_by_hand():
    """One output, two inputs: expert 1 sees x = (1, 0) only, expert 2 (1, 1) only. With ratio 1 the answer has
    w·(1, 0) = 2 and w·(1, 1) = 1 + 5, so w = (2, 4)."""
    models = [Layer([[1.0, 0.0]], [[2.0, 7.0]]), Layer([[1.0, 1.0]], [[1.0, 5.0]])]
    made = merged(RegMean(ratio=1.0, ridge=0.0), models, ["aa", "aa"])
    assert made["l.weight"][0].tolist() == pytest.approx([2.0, 4.0], abs=1e-5)
    diagonal = merged(RegMean(ratio=0.0, ridge=0.0), models, ["aa", "aa"])
    assert diagonal["l.weight"][0].tolist() == pytest.approx([1.5, 5.0], abs=1e-5)


def test_ridge_is_a_share_of_the_mean_diagonal():
    """Inputs of 2 and of 1, seen twice: Gram matrices of 8 and 2, weights of 2 and 6 around the average of 4."""
    models = [Layer([[2.0]], [[2.0]]), Layer([[1.0]], [[6.0]])]
    for ridge in (0.0, 0.5, 3.0):
        made = merged(RegMean(ridge=ridge), models, ["aa", "aa"])["l.weight"].item()
        left = 8.0 + 2.0
        change = (8 * (2 - 4) + 2 * (6 - 4)) / (left + ridge * left)
        assert made == pytest.approx(4 + change, abs=1e-6)


def test_sums_or_means():
    """The first expert's text is three times as long: as sums it counts three times."""
    models = [Layer([[1.0]], [[2.0]], bias=1.0), Layer([[1.0]], [[6.0]], bias=4.0)]
    for per, answer in (("sum", 3.0), ("token", 4.0)):
        made = merged(RegMean(per=per, ridge=0.0), models, ["aaaaaa", "aa"])
        assert made["l.weight"].item() == pytest.approx(answer) and made["l.bias"].item() == pytest.approx(2.5)
    weighed = merged(RegMean(ridge=0.0, weights=(1.0, 3.0)), models, ["aaaaaa", "aa"])
    assert weighed["l.weight"].item() == pytest.approx(4.0) and weighed["l.bias"].item() == pytest.approx(3.25)


# bloomberg/dataless-model-merging 92247ae, FedAvgMerger.regmean_mean_params on means over four tokens.
W = [[[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], [[0.0, 1.0, 2.0], [-1.5, 0.5, 1.0]]]
X = [
    [[1.0, 0.0, 2.0], [0.5, -1.0, 1.0], [2.0, 1.0, 0.0], [-1.0, 0.5, 1.5]],
    [[0.0, 1.0, 1.0], [1.0, 1.0, -1.0], [2.0, -0.5, 0.5], [0.5, 0.5, 3.0]],
]
THEIRS = [
    (0.9, None, [[0.401825, -0.161897, 1.504951], [-0.479259, 2.044668, 0.071656]]),
    (0.9, (0.3, 0.7), [[0.225212, 0.355131, 1.741361], [-0.839848, 1.494401, 0.446338]]),
    (1.0, None, [[0.380096, -0.129807, 1.516463], [-0.471901, 2.086854, 0.052319]]),
    (1.0, (0.3, 0.7), [[0.208943, 0.37688, 1.749147], [-0.831104, 1.531652, 0.428773]]),
    (0.1, None, [[0.532065, -0.393938, 1.421966], [-0.540528, 1.723114, 0.20272]]),
    (0.1, (0.3, 0.7), [[0.328199, 0.185999, 1.682668], [-0.901517, 1.226613, 0.556699]]),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("ratio", "weights", "theirs"), THEIRS)
def test_the_authors_code(ratio, weights, theirs, turned):
    models = [Layer(x, w, turned) for x, w in zip(X, W, strict=True)]
    for per in ("sum", "token"):
        made = merged(RegMean(ratio=ratio, weights=weights, ridge=0.0, per=per), models, ["abcd"] * 2)["l.weight"]
        torch.testing.assert_close(made.T if turned else made, torch.tensor(theirs), atol=2e-6, rtol=1e-5)


def test_dead_inputs():
    """An input that is always 0: their inverse fails, or with rounding is anything; the average stands here."""
    inputs = [[[1.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]]
    models = [Layer(x, [[w, 2 * w]]) for x, w in zip(inputs, (1.0, 3.0), strict=True)]
    grams = [torch.tensor(x).T @ torch.tensor(x) for x in inputs]
    with pytest.raises(RuntimeError, match="singular"):
        torch.inverse(sum(grams))
    for ridge in (0.0, 1e-6):
        made = merged(RegMean(ridge=ridge), models, ["ab", "ab"])["l.weight"][0].tolist()
        assert made == pytest.approx([(5 * 1 + 2 * 3) / 7, 4.0], abs=1e-4)
    blind = [Layer([[0.0, 0.0]], [[w, 2 * w]]) for w in (1.0, 3.0)]
    assert merged(RegMean(), blind, ["aa", "aa"])["l.weight"][0].tolist() == [2.0, 4.0]


def twin(models, tokens, ratio, ridge, weights):
    """RegMean of the first layer's q and down projections in numpy: inputs by the model's own parts, one text."""
    inputs = {"model.layers.0.self_attn.q_proj.weight": [], "model.layers.0.mlp.down_proj.weight": []}
    for model, ids in zip(models, tokens, strict=True):
        with torch.no_grad():
            first, ids = model.model.layers[0], torch.tensor([ids])
            x = model.model.embed_tokens(ids)
            inputs["model.layers.0.self_attn.q_proj.weight"].append(first.input_layernorm(x))
            place = torch.arange(ids.shape[1])[None]
            turn = model.model.rotary_emb(x, place)
            x = x + first.self_attn(first.input_layernorm(x), position_embeddings=turn, attention_mask=None)[0]
            x = first.post_attention_layernorm(x)
            inputs["model.layers.0.mlp.down_proj.weight"].append(
                nn.functional.silu(first.mlp.gate_proj(x)) * first.mlp.up_proj(x)
            )
    made = {}
    for name, several in inputs.items():
        values = [dict(m.named_parameters())[name].detach().double().numpy() for m in models]
        grams = [w * x[0].double().numpy().T @ x[0].double().numpy() for w, x in zip(weights, several, strict=True)]
        grams = [g * (ratio + (1 - ratio) * np.eye(len(g))) for g in grams]
        pull = ridge * np.trace(sum(grams)) / len(grams[0])
        average = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        right = sum(g @ v.T for g, v in zip(grams, values, strict=True)) + pull * average.T
        made[name] = np.linalg.inv(sum(grams) + pull * np.eye(len(grams[0]))) @ right
    return {name: torch.from_numpy(value.T).float() for name, value in made.items()}


def test_equals_a_slow_twin():
    """A tiny Llama and its experts; norms and embeddings are averaged, an untied head is solved."""
    base = tiny.llama(0)
    models, weights = [base, tiny.moved(base, 1), tiny.moved(base, 2)], (1.0, 0.5, 2.0)
    texts = ["the first of several", "one more text, and longer than that", "another"]
    data = [tiny.TinyData(str(i), [tiny.item(text=t)], ()) for i, t in enumerate(texts)]
    tokens = [drawn(d, tiny.tokenizer(), 1, 512, Context())[0][1].input_ids for d in data]
    roles = {"subjects": [tiny.subject(str(i), m) for i, m in enumerate(models)], "data": data}
    tensors = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    made = transform_tensors(RegMean(ridge=0.01, weights=weights), None, tensors, Context(roles=roles))
    for name, slow in twin(models, tokens, 0.9, 0.01, weights).items():
        torch.testing.assert_close(made[name], slow, atol=2e-5, rtol=1e-4, msg=name)
    average = {n: sum(w * t[n] for w, t in zip(weights, tensors, strict=True)) / 3.5 for n in tensors[0]}
    for name, value in made.items():
        kept = "norm" in name or "embed" in name
        assert torch.allclose(value, average[name], atol=1e-6) == kept, name


def test_a_tied_head_is_averaged_and_inputs_are_shared():
    model = tiny.llama(0, tie_word_embeddings=True)
    found = linears(model)
    assert "lm_head.weight" not in found and "lm_head.weight" in linears(tiny.llama(0))
    layers = {name: layer for name, (layer, _) in found.items()}
    owner = sharing(layers, lambda: model(torch.tensor([[5, 6, 7]])))
    first = "model.layers.0."
    shared = {name for name in owner if owner[name] == f"{first}self_attn.q_proj.weight"}
    assert shared == {f"{first}self_attn.{p}_proj.weight" for p in "qkv"}
    assert owner[f"{first}mlp.up_proj.weight"] == f"{first}mlp.gate_proj.weight"
    assert len(owner) == 14 and len(set(owner.values())) == 8
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_that_are_called_alike_only_at_first_do_not_share():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)

    def run():
        one(x), two(x), one(torch.zeros(1, 2))

    assert sharing({"one": one, "two": two, "never": nn.Linear(2, 2)}, run) == {"one": "one", "two": "two"}
    seen = []
    with each_input({"two": two}, lambda name, given: seen.append((name, given))):
        run()
    assert seen == [("two", x)]


@pytest.mark.parametrize("fields", [{"ratio": 1.5}, {"ridge": -1.0}, {"per": "item"}, {"max_length": 4}])
def test_fields_that_cannot_be(fields):
    with pytest.raises(LuthierError, match="merge.regmean"):
        RegMean(**fields)


def test_weights_that_cannot_be():
    models = [Layer([[1.0]], [[w]]) for w in (1.0, 2.0)]
    for weights, says in (((1.0, -1.0), "none below 0"), ((1.0,), "1 numbers for 2 experts")):
        with pytest.raises(LuthierError, match=says):
            merged(RegMean(weights=weights), models, ["aa", "aa"])


def test_defaults():
    """The paper's factor, and as many items as the released codes take."""
    assert RegMean().to_dict()["set"] == {
        "examples": 256, "max_length": 512, "ratio": 0.9, "per": "sum", "ridge": 1e-6, "weights": None,
    }  # fmt: skip
    assert RegMean().passes(3) == 1.0 and RegMean.kept == 1.0


def test_fields_may_vary_by_name():
    models = [Layer(x, w) for x, w in zip(X, W, strict=True)]
    plain = merged(RegMean(ratio=0.1, ridge=0.5), models, ["abcd"] * 2)["l.weight"]
    by_name = RegMean(ratio={"*": 1.0, "l.*": 0.1}, ridge={"*": 0.0, "l.weight": 0.5})
    assert torch.equal(merged(by_name, models, ["abcd"] * 2)["l.weight"], plain)
    only = merged(RegMean(weights=(1.0, {"*": 1.0, "l.weight": 0.0})), models, ["abcd"] * 2)
    torch.testing.assert_close(only["l.weight"], torch.tensor(W[0]))


def test_as_many_items_and_tokens_as_asked():
    """The first expert has six items of one letter seen twice; only what is looked at counts."""
    models = [Layer([[1.0]], [[2.0]]), Layer([[1.0]], [[6.0]])]
    several = [tiny.item(text="a" * (12 + i)) for i in range(6)]
    roles = {
        "subjects": [tiny.TinySubject(str(i), m, Letters()) for i, m in enumerate(models)],
        "data": [tiny.TinyData("many", several, ()), tiny.TinyData("one", [tiny.item(text="a" * 8)], ())],
    }
    tensors = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    for examples, length, tokens in ((3, 8, 24), (2, 10, 20), (9, 9, 54)):
        method = RegMean(examples=examples, max_length=length, ridge=0.0)
        made = transform_tensors(method, None, tensors, Context(roles=roles))["l.weight"].item()
        assert made == pytest.approx((tokens * 2 + 8 * 6) / (tokens + 8))


class Idle(Layer):
    """Never calls its layer, as an expert that no token is sent to."""

    def forward(self, input_ids, **rest):
        return types.SimpleNamespace(logits=self.embed(input_ids))


def test_nothing_is_kept_for_a_next_word():
    """A row is read once: a cache of keys and values would only be in the way."""
    asked = []

    class Asked(Layer):
        def forward(self, input_ids, use_cache=True):
            asked.append(use_cache)
            return super().forward(input_ids)

    merged(RegMean(), [Asked([[1.0]], [[2.0]]), Asked([[1.0]], [[6.0]])], ["aa", "aa"])
    assert asked and not any(asked)


@pytest.mark.parametrize("order", [1, -1])
def test_a_layer_that_one_expert_never_calls_is_averaged(order):
    models = [Layer([[1.0]], [[2.0]]), Idle([[1.0]], [[6.0]])][::order]
    assert merged(RegMean(ridge=0.0), models, ["aaaa", "aa"])["l.weight"].item() == 4.0


def test_what_a_plan_counts():
    """The system of all experts is solved once, what stands on its right is computed for each."""
    assert [RegMean().cubic(experts) for experts in (1, 3)] == pytest.approx([0.7, 1.4])
