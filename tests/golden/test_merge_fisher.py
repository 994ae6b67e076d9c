"""Fisher merge against hand calculation, a slow twin by autograd, and numbers from MergeLM."""

import math
import types

import pytest
import torch
from torch import nn

from families import model_of, weights_of
from luthier.engine.pieces import Inputs, Memory
from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit.calibrate import drawn, each_gradient, sampled
from luthier.kit.context import Context
from luthier.merge.fisher import Fisher
from luthier.testing import tiny


class Table(nn.Module):
    """The next letter's logits stand in a row for the letter before: what a Fisher is can be written out."""

    def __init__(self, rows):
        super().__init__()
        self.config = types.SimpleNamespace(model_type="table")
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, input_ids, **rest):
        return types.SimpleNamespace(logits=self.rows[input_ids])


class Letters:
    """a is 0, b is 1, and so on."""

    pad_token_id, eos_token_id, chat_template = 0, None, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) - 97 for c in text]}


def subject(model, name="expert"):
    return tiny.TinySubject(name, model, Letters())


def texts(*several):
    """Items of these texts, each with an id of its own."""
    return tiny.TinyData("text", [tiny.item(text=t, answer=str(i)) for i, t in enumerate(several)], ())


def tables(method, rows, *data, seed=0):
    """The merged table of experts whose logits are `rows`."""
    models = [Table(r) for r in rows]
    roles = {"subjects": [subject(m) for m in models], "data": list(data)}
    tensors = [{"rows": m.rows.detach().clone()} for m in models]
    return transform_tensors(method, None, tensors, Context(seed=seed, step="golden", roles=roles))["rows"]


A, B = [[0.0, 0.0], [1.0, -0.5]], [[0.4, -0.3], [0.2, 0.7]]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_gold_labels_by_hand():
    """Of "ab" and "ba", one place each, the gradient of log p(y) is 1[y] - p, its square the same for both words."""
    made = tables(Fisher(labels="gold", balance=False), [A, B], texts("ab", "ba"))
    f_a = [(1 - sigmoid(-0.0)) ** 2 / 2, (1 - sigmoid(1.5)) ** 2 / 2]  # p(b|a), p(a|b)
    f_b = [(1 - sigmoid(-0.7)) ** 2 / 2, (1 - sigmoid(-0.5)) ** 2 / 2]
    slow = [[(f_a[i] * A[i][j] + f_b[i] * B[i][j]) / (f_a[i] + f_b[i]) for j in range(2)] for i in range(2)]
    torch.testing.assert_close(made, torch.tensor(slow))


def test_floor_is_of_the_mean_over_examples():
    """Of four examples one starts with b: expert B's Fisher there is a quarter of a square, below this floor."""
    f_b = (1 - sigmoid(-0.5)) ** 2 / 4
    data = texts("ab", "ab", "ba", "aa")
    for floor, weight in ((f_b * 0.9, f_b), (f_b * 1.1, f_b * 1.1)):
        made = tables(Fisher(labels="gold", balance=False, floor=floor), [A, B], data)
        f_a = max((1 - sigmoid(1.5)) ** 2 / 4, floor)
        assert made[1, 0].item() == pytest.approx((f_a * 1.0 + weight * 0.2) / (f_a + weight), rel=1e-5)


def test_the_floor_may_vary_by_name():
    """There is one tensor here, which the last pattern that fits decides; what is above the floor does not count it."""
    data = texts("ab", "ab", "ba", "aa")
    for floor in (1e-6, 0.3):
        method = Fisher(labels="gold", balance=False)
        by_name, alone = method.replace(floor={"*": 1e-9, "r*": floor}), method.replace(floor=floor)
        assert torch.equal(tables(by_name, [A, B], data), tables(alone, [A, B], data))
    with pytest.raises(LuthierError, match="floor: no pattern matches 'rows'"):
        tables(Fisher(floor={"x": 1.0}), [A, B], data)


def test_a_batch_adds_before_it_squares():
    """Here "ab" and "aa" pull row a in opposite ways: at even odds the gradients cancel, their squares do not."""
    method = Fisher(labels="gold", balance=False, floor=1e-9)
    alone, together = (tables(method.replace(batch=b), [A, B], texts("ab", "aa")) for b in (1, 2))
    p = sigmoid(0.7)
    squares = (0.25, (p**2 + (1 - p) ** 2) / 2)
    sums = (0.0, (1 - 2 * p) ** 2 / 2)
    for made, (f_a, f_b) in ((alone, squares), (together, sums)):
        f_a = max(f_a, 1e-9)
        assert made[0, 0].item() == pytest.approx(f_b * 0.4 / (f_a + f_b), rel=1e-5)


def test_sampled_labels_give_the_fisher():
    """p(1 - p), whatever the data's own labels are; 600 places, so to a few percent."""
    many, p = texts(*["ab"] * 600), sigmoid(0.7)
    f_b = p * (1 - p)
    made = tables(Fisher(examples=600, balance=False), [A, B], many)
    assert made[0, 0].item() == pytest.approx(f_b * 0.4 / (0.25 + f_b), rel=0.03)
    gold = tables(Fisher(examples=600, balance=False, labels="gold"), [A, B], many)
    assert gold[0, 0].item() == pytest.approx(p**2 * 0.4 / (0.25 + p**2), rel=1e-5)


def test_balance_divides_by_the_whole_length():
    models, data = [[[0.0, 0.0], [3.0, -3.0]], B], texts("ab", "ba")
    f = [[(1 - sigmoid(0)) ** 2 / 2, (1 - sigmoid(6)) ** 2 / 2], [(1 - sigmoid(-0.7)) ** 2 / 2, 0.0]]
    f[1][1] = (1 - sigmoid(-0.5)) ** 2 / 2
    lengths = [math.sqrt(2 * sum(x * x for x in row)) for row in f]
    made = tables(Fisher(labels="gold", weights=(2.0, 1.0)), models, data)
    w = [2 * max(f[0][0], 1e-6) / lengths[0], max(f[1][0], 1e-6) / lengths[1]]
    assert made[0, 0].item() == pytest.approx(w[1] * 0.4 / sum(w), rel=1e-5)
    w = [2 * max(f[0][1], 1e-6) / lengths[0], f[1][1] / lengths[1]]
    assert made[1, 0].item() == pytest.approx((w[0] * 3.0 + w[1] * 0.2) / sum(w), rel=1e-5)


# yule-BUAA/MergeLM 6d49ad9, MergingMethod.fisher_merging of two such tables, contexts 0 1 1 0, floor 1e-6: with
# normalize_fisher_weight false. Row 0 of the first, where both words are equally likely, weighs nothing to it.
MERGELM = [[0.39993810653686523, -0.2999536097049713], [0.860674262046814, -0.29101163148880005]]


def peers_weight(p):
    """Of an entry: the square of the summed gradients of sqrt(p) log p, in our words."""
    return (math.sqrt(p) * (1 - p) - math.sqrt(1 - p) * p) ** 2


def test_peers_cancel_labels():
    contexts, floor = 0.5, 1e-6  # each row is met in half of the examples
    for row in range(2):
        p = [sigmoid(t[row][0] - t[row][1]) for t in (A, B)]
        f = [contexts * peers_weight(x) + floor for x in p]
        assert MERGELM[row][0] == pytest.approx((f[0] * A[row][0] + f[1] * B[row][0]) / sum(f), rel=1e-4)
    assert peers_weight(0.5) < 1e-12
    ours = tables(Fisher(examples=600, balance=False), [A, B], texts(*["ab"] * 300, *["ba"] * 300))
    p = sigmoid(0.7)
    assert ours[0, 0].item() == pytest.approx(p * (1 - p) * 0.4 / (0.25 + p * (1 - p)), rel=0.05)


def slow_fisher(model, rows):
    """Mean squared gradient of the summed log-likelihood of gold labels, one row at a time, by plain autograd."""
    named = dict(model.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    for _, row in rows:
        ids = torch.tensor([row.input_ids])
        logits = model(input_ids=ids).logits[0, :-1]
        nll = -logits.log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum()
        for (name, _), gradient in zip(named.items(), torch.autograd.grad(nll, list(named.values())), strict=True):
            total[name] += gradient**2
    return {n: t / len(rows) for n, t in total.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("balance", [False, True])
def test_equals_a_slow_twin(tied, balance):
    """A tiny Llama and its experts; tied embeddings get the gradient of both uses."""
    base = tiny.llama(0, tie_word_embeddings=tied)
    models = [base, tiny.moved(base, 1), tiny.moved(base, 2)]
    source, ctx = tiny.text_data(train=9, test=0), Context(seed=3, step="golden")
    subjects = [tiny.subject(str(i), m) for i, m in enumerate(models)]
    rows = drawn(source, tiny.tokenizer(), 5, 20, ctx)
    assert [len(row.input_ids) for _, row in rows] == [20] * 5
    fishers = [slow_fisher(m, rows) for m in models]
    method = Fisher(examples=5, max_length=20, labels="gold", floor=1e-5, balance=balance, weights=(1.0, 0.5, 2.0))
    tensors = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    ctx = ctx.with_(roles={"subjects": subjects, "data": [source]})
    made = transform_tensors(method, None, tensors, ctx)
    scale = [1.0, 0.5, 2.0]
    if balance:
        norms = [math.sqrt(sum(float((t.double() ** 2).sum()) for t in f.values())) for f in fishers]
        scale = [s / n for s, n in zip(scale, norms, strict=True)]
    for name in tensors[0]:
        weights = [s * f[name].clamp(min=1e-5) for s, f in zip(scale, fishers, strict=True)]
        slow = sum(w * t[name] for w, t in zip(weights, tensors, strict=True)) / sum(weights)
        torch.testing.assert_close(made[name], slow.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_balance_takes_means():
    """An expert with more of the same data counts no more: its Fisher is a mean, and so is what divides it."""
    method, data = Fisher(labels="gold"), texts("ab", "ba")
    made = tables(method, [A, B], texts(*["ab", "ba"] * 4), data)
    torch.testing.assert_close(made, tables(method, [A, B], data))


def test_an_expert_that_is_certain_of_everything_weighs_the_floor():
    """Its gradients are all 0, and there is no length to divide by; the other's Fisher is f in both entries it met."""
    f, floor = (1 - sigmoid(-0.7)) ** 2, 0.01
    made = tables(Fisher(labels="gold", floor=floor), [[[-200.0, 0.0], [0.0, 0.0]], B], texts("ab"))
    met, unmet = 1 / math.sqrt(2), floor / (f * math.sqrt(2))
    assert made[0].tolist() == pytest.approx([(-200 * floor + 0.4 * met) / (floor + met), -0.3 * met / (floor + met)])
    assert made[1].tolist() == pytest.approx([b * unmet / (floor + unmet) for b in B[1]])


def test_experts_of_one_live_tensor():
    """Mixtral in memory: gate and up of all experts lie in one tensor, which is several on disk."""
    base = model_of("mixtral", num_hidden_layers=1)
    models, source, ctx = [base, tiny.moved(base, 1)], tiny.text_data(train=2, test=0), Context(seed=3, step="golden")
    rows, weights = drawn(source, tiny.tokenizer(), 2, 16, ctx), [weights_of(m) for m in models]
    roles = {"subjects": [tiny.subject(str(i), m) for i, m in enumerate(models)], "data": [source]}
    fishers = [slow_fisher(m, rows) for m in models]
    method = Fisher(examples=2, max_length=16, labels="gold", floor=1e-7, balance=False)
    made = transform_tensors(method, None, weights, ctx.with_(roles=roles))
    stem, inside = "model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"
    for expert in range(4):
        for part, live, own in (("w1", "gate_up_proj", slice(0, 48)), ("w3", "gate_up_proj", slice(48, 96)),
                                ("w2", "down_proj", slice(0, 32))):  # fmt: skip
            f = [one[f"{inside}.{live}"][expert, own].clamp(min=1e-7) for one in fishers]
            name = f"{stem}.{expert}.{part}.weight"
            slow = sum(x * w[name] for x, w in zip(f, weights, strict=True)) / sum(f)
            torch.testing.assert_close(made[name], slow.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_own_data_for_each_expert():
    """Only the expert that is looked at with "ba" knows row b: the other's is the floor."""
    made = tables(Fisher(labels="gold", balance=False), [A, B], texts("ab"), texts("ba"))
    assert made[1].tolist() == pytest.approx(B[1], abs=1e-4)
    assert made[0].tolist() == pytest.approx(A[0], abs=1e-4)


def test_what_the_model_lacks_is_averaged():
    """A tensor on disk that is no part of the loaded model."""
    models = [Table(A), Table(B)]
    tensors = [
        {"rows": m.rows.detach().clone(), "stale": torch.tensor([v])} for m, v in zip(models, (1.0, 4.0), strict=True)
    ]
    roles = {"subjects": [subject(m) for m in models], "data": [texts("ab")]}
    made = transform_tensors(Fisher(weights=(2.0, 1.0)), None, tensors, Context(roles=roles))
    assert made["stale"].tolist() == [2.0]
    with pytest.raises(LuthierError, match="none of the tensors"):
        transform_tensors(Fisher(), None, [{"other": torch.ones(1)}] * 2, Context(roles=roles))


def test_items_without_an_answer_are_passed_over():
    source = tiny.TinyData("tasks", [tiny.item(prompt="a"), *(tiny.item(text=t) for t in ("a", "ab", "ab"))], ())
    (only,) = drawn(source, Letters(), 5, 8, Context())
    assert only[1].input_ids == (0, 1)
    with pytest.raises(LuthierError, match="tasks has no training item"):
        drawn(tiny.TinyData("tasks", [tiny.item(text="a")], ()), Letters(), 5, 8, Context())


def test_words_are_drawn_by_their_probabilities():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)], [0.0, -200.0, 0.0]]).repeat(2000, 1)
    words = sampled(logits, torch.Generator().manual_seed(0)).view(-1, 2)
    shares = torch.stack([(words == w).double().mean(0) for w in range(3)])
    assert torch.allclose(shares[:, 0], torch.tensor([1, 2, 5]).double() / 8, atol=0.035)
    assert torch.allclose(shares[:, 1], torch.tensor([0.5, 0, 0.5]).double(), atol=0.035)


def test_gradients_are_met_and_not_kept():
    """Also of a model whose own gradients and flags are in use."""
    model = Table(A)
    model.rows.grad = torch.ones(2, 2)
    model.rows.requires_grad_(False)
    seen = []
    with each_gradient(model, lambda name, gradient: seen.append((name, gradient.clone()))):
        model(torch.tensor([[1]])).logits.sum().backward()
        assert model.rows.grad is None
    assert seen[0][0] == "rows" and seen[0][1].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert not model.rows.requires_grad and model.rows.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (0.0, {"*": 0.0})])
def test_weights_that_cannot_be(weights):
    with pytest.raises(LuthierError, match="none below 0"):
        tables(Fisher(weights=weights), [A, B], texts("ab"))


def test_defaults():
    """The numbers of the released codes."""
    assert Fisher().to_dict()["set"] == {
        "examples": 256, "max_length": 512, "labels": "sampled", "batch": 1, "floor": 1e-6, "balance": True,
        "weights": None,
    }  # fmt: skip
    assert Fisher().passes(3) == 3.0


def test_what_is_kept_on_disk_as_planned(tmp_path):
    """One fp32 number for every entry of every expert, and a header."""
    models = [tiny.llama(0), tiny.llama(1)]
    memories = [Memory({n: p.detach() for n, p in m.named_parameters()}) for m in models]
    inputs = Inputs(None, tuple(memories), memories[0].tensors)
    roles = {"subjects": [tiny.subject(str(i), m) for i, m in enumerate(models)], "data": [tiny.text_data()] * 2}
    Fisher(examples=1).survey(inputs, Context(roles=roles, scratch=tmp_path))
    found = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert found == pytest.approx(2 * 4 * inputs.count * Fisher.kept, rel=0.05)


def test_nothing_to_learn_is_averaged():
    """With one word everything is certain: every gradient is 0, and so is the length to divide by."""
    assert tables(Fisher(), [[[0.25]], [[0.75]]], texts("aa")).tolist() == [[0.5]]


def test_it_says_how_much_lies_below_the_floor():
    """Row b is never met: two of four entries."""
    said = []
    models = [Table(A), Table(B)]
    roles = {"subjects": [subject(m, n) for m, n in zip(models, ("one", "two"), strict=True)], "data": [texts("ab")]}
    ctx = Context(roles=roles, watch=said.append)
    transform_tensors(Fisher(labels="gold"), None, [{"rows": m.rows.detach()} for m in models], ctx)
    texts_said = [event["text"] for event in said if event["kind"] == "log"]
    assert texts_said == [f"{n}: 50% of its Fisher lies below the floor of 1e-06" for n in ("one", "two")]
    ctx = ctx.with_(roles=roles | {"data": [texts("ab", "ab", "ab")]})
    transform_tensors(Fisher(labels="gold", floor=0.3), None, [{"rows": m.rows.detach()} for m in models], ctx)
    texts_said = [event["text"] for event in said if event["kind"] == "log"]
    assert texts_said[2:] == ["one: 100% of its Fisher lies below the floor of 0.3",
                              "two: 50% of its Fisher lies below the floor of 0.3"]  # fmt: skip
    assert {e["what"] for e in said if e["kind"] == "progress"} == {"one on text", "two on text"}


def test_of_one_entry_all_lies_below_the_floor():
    said = []
    ctx = Context(roles={"subjects": [subject(Table([[0.25]]))], "data": [texts("aa")]}, watch=said.append)
    transform_tensors(Fisher(), None, [{"rows": torch.tensor([[0.25]])}], ctx)
    assert [e["text"] for e in said if e["kind"] == "log"] == [
        "expert: 100% of its Fisher lies below the floor of 1e-06"
    ]


def test_weights_may_vary_by_name():
    made = tables(Fisher(labels="gold", weights=(1.0, {"*": 5.0, "rows": 0.0})), [A, B], texts("ab", "ba"))
    torch.testing.assert_close(made, torch.tensor(A))


def test_labels_are_drawn_for_each_item():
    """Keyed by the item: the order of the data does not change what is drawn, another seed does."""
    method = Fisher(examples=5, balance=False)
    data = texts(*["ab"] * 5)
    back = tiny.TinyData("text", data.train[::-1], ())
    first, turned = tables(method, [A, B], data), tables(method, [A, B], back)
    assert torch.allclose(first, turned)
    assert any(not torch.allclose(first, tables(method, [A, B], data, seed=seed)) for seed in range(1, 4))
