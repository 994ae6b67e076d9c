"""Sens-Merging against hand calculation and a slow twin by autograd; there is no official code to compare with."""

import math
import types

import pytest
import torch
from torch import nn

from luthier.engine.stream import transform_tensors
from luthier.errors import LuthierError
from luthier.kit.calibrate import drawn
from luthier.kit.context import Context
from luthier.merge.sens import Sens
from luthier.testing import tiny

HIGH = {"within": False, "temperature": 0.25}


class Scaled(nn.Module):
    """Two words, one number a layer: the logits are (x·y, 0) whatever was read."""

    def __init__(self, x, y):
        super().__init__()
        self.config = types.SimpleNamespace(model_type="scaled")
        self.x, self.y = nn.Parameter(torch.tensor([x])), nn.Parameter(torch.tensor([y]))

    def get_output_embeddings(self):
        return types.SimpleNamespace(weight=torch.zeros(2, 1))

    def forward(self, input_ids, **rest):
        logit = (self.x * self.y).expand(input_ids.shape)
        return types.SimpleNamespace(logits=torch.stack([logit, torch.zeros_like(logit)], -1))


class Letters:
    pad_token_id, eos_token_id, chat_template = 0, None, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) - 97 for c in text]}


def merged(method, numbers, texts=("ab", "ab", "ab"), base=(0.0, 0.0), kind=Scaled):
    """{"x", "y"} of experts with these numbers, and a base."""
    models = [kind(*pair) for pair in numbers]
    roles = {
        "subjects": [tiny.TinySubject(str(i), m, Letters()) for i, m in enumerate(models)],
        "data": [tiny.TinyData(str(i), [tiny.item(text=texts[i])], ()) for i in range(len(models))],
    }  # fmt: skip
    tensors = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    start = {n: torch.tensor([v]) for n, v in zip("xy", base, strict=True)}
    made = transform_tensors(method, start, tensors, Context(step="golden", roles=roles))
    return made["x"].item(), made["y"].item()


def softmax(values):
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def test_across_tasks_by_hand():
    """Logits of 1, 2 and 4: summed distances 1 + 3, 1 + 2 and 3 + 2 of 12, whatever the data are."""
    numbers = [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)]
    far = softmax([d / 12 / 0.25 for d in (4, 3, 5)])
    near = softmax([(1 - d / 12) / 2 / 0.25 for d in (4, 3, 5)])
    for transfer, shares in (("distance", far), ("closeness", near)):
        x, y = merged(Sens(transfer=transfer, **HIGH), numbers, base=(0.5, 0.5))
        assert x == pytest.approx(0.5 + 3 * sum(s * (n - 0.5) for s, (n, _) in zip(shares, numbers, strict=True)))
        assert y == pytest.approx(0.5 + 3 * 0.5)


def test_within_a_task_by_hand():
    """|x · dloss/dx| = |y · dloss/dy|, since both are |xy · p|: each layer has 1/√2. A layer of 0 has nothing."""
    x, y = merged(Sens(across=False, temperature=0.1, scale=0.5), [(1.0, 3.0), (2.0, 0.0)], ("aab", "ba"))
    shares = softmax([math.sqrt(0.5) / 2 / 0.1, 0.0])
    assert x == pytest.approx(0.5 * 2 * (shares[0] * 1 + shares[1] * 2))
    assert y == pytest.approx(0.5 * 2 * shares[0] * 3)


def test_the_temperature_may_vary_by_name():
    numbers = [(1.0, 3.0), (2.0, 0.5), (4.0, 1.0)]
    hot, cold = (merged(Sens(temperature=t), numbers) for t in (2.0, 0.1))
    assert merged(Sens(temperature={"x": 2.0, "y": 0.1}), numbers) == (hot[0], cold[1])
    assert hot[0] != cold[0] and hot[1] != cold[1]
    with pytest.raises(LuthierError, match="temperature: no pattern matches 'y'"):
        merged(Sens(temperature={"x": 2.0}), numbers)


class Read(Scaled):
    """Logits are multiplied by 1 after an a and by 2 after a b."""

    def forward(self, input_ids, **rest):
        plain = super().forward(input_ids, **rest).logits
        return types.SimpleNamespace(logits=plain * (1 + input_ids)[..., None])


def test_two_experts_by_hand():
    """Logits are 1 and 2 on what the first has read, 2 and 4 on what the second has: distances of 2 and 1."""
    shares = softmax([2 / 3 / 0.25, 1 / 3 / 0.25])
    x, _ = merged(Sens(**HIGH), [(1.0, 1.0), (2.0, 1.0)], ("aa", "bb"), kind=Read)
    assert x == pytest.approx(2 * (shares[0] * 1 + shares[1] * 2))


@pytest.mark.parametrize("transfer", ["distance", "closeness"])
def test_one_expert_has_nobody_to_be_compared_with(transfer):
    """It is looked at once, and counts whole."""
    opened = []

    class Counted(tiny.TinySubject):
        def open(self):
            opened.append(self.name)
            return super().open()

    model = Scaled(1.0, 3.0)
    roles = {"subjects": [Counted("one", model, Letters())], "data": [tiny.TinyData("d", [tiny.item(text="ab")], ())]}
    one = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = {n: torch.tensor([0.5]) for n in "xy"}
    made = transform_tensors(Sens(transfer=transfer), start, [one], Context(roles=roles))
    assert (made["x"].item(), made["y"].item()) == pytest.approx((1.0, 3.0)) and opened == ["one"]


def test_a_low_temperature_takes_the_best_alone():
    """Its powers would be too large for any number, or all 0."""
    for transfer, best in (("distance", 4.0), ("closeness", 2.0)):
        made = merged(Sens(within=False, temperature=1e-5, transfer=transfer), [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)])
        assert made == pytest.approx((3 * best, 3.0))


def test_equal_models_count_alike():
    assert merged(Sens(), [(1.0, 2.0)] * 3, base=(0.5, 1.0)) == pytest.approx((0.5 + 3 * 0.5, 1.0 + 3 * 1.0))
    assert merged(Sens(scale=0.25), [(1.0, 2.0)]) == pytest.approx((0.25, 0.5))


def loss_of(model, row):
    ids = torch.tensor([row.input_ids])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -logits[torch.arange(ids.shape[1] - 1), ids[0, 1:]].mean()


def twin(models, data, ctx, temperature, places, transfer):
    """Coefficients by layer, written out: gradients one item at a time, logits of whole items."""
    rows = [drawn(source, tiny.tokenizer(), 3, 20, ctx) for source in data]
    alphas = []
    for model, own in zip(models, rows, strict=True):
        named = dict(model.named_parameters())
        alpha = {}
        for _, row in own:
            gradients = torch.autograd.grad(loss_of(model, row), list(named.values()))
            for (name, p), gradient in zip(named.items(), gradients, strict=True):
                layer = name.split(".")[2] if ".layers." in name else name
                alpha[layer] = alpha.get(layer, 0.0) + (p * gradient).abs().sum().item()
        length = math.sqrt(sum(a * a for a in alpha.values()))
        alphas.append({layer: a / length for layer, a in alpha.items()})
    taus = []
    for i, model in enumerate(models):
        total = 0.0
        for j, own in enumerate(rows):
            for item, row in own if j != i else ():
                at = torch.randperm(row.count, generator=ctx.rng("places", item))[:places]
                mine, theirs = (m(torch.tensor([row.input_ids])).logits[0, :-1][at] for m in (model, models[j]))
                total += (mine - theirs).square().sum(-1).sqrt().mean().item() / len(own)
        taus.append(total)
    taus = [t / sum(taus) for t in taus]
    if transfer == "closeness":
        taus = [sum(other for j, other in enumerate(taus) if j != i) / (len(taus) - 1) for i in range(len(taus))]
    return {
        layer: softmax([a[layer] * t / temperature for a, t in zip(alphas, taus, strict=True)]) for layer in alphas[0]
    }


@pytest.mark.parametrize(("places", "transfer"), [(4, "distance"), (32, "distance"), (32, "closeness")])
def test_equals_a_slow_twin(places, transfer):
    base = tiny.llama(0)
    models = [tiny.moved(base, 1), tiny.moved(base, 2, scale=0.05), tiny.moved(base, 3)]
    data = [tiny.text_data(train=5, test=0, name="a"), tiny.task_data(6, 0), tiny.text_data(train=2, test=0, name="c")]
    data[1] = tiny.TinyData("b", [tiny.item(text=f"{i} or {i} is {i}, so it is") for i in range(4)], ())
    ctx = Context(seed=1, step="golden")
    method = Sens(examples=3, max_length=20, places=places, temperature=0.02, scale=0.4, transfer=transfer)
    roles = {"subjects": [tiny.subject(str(i), m) for i, m in enumerate(models)], "data": data}
    tensors = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in (base, *models)]
    made = transform_tensors(method, tensors[0], tensors[1:], ctx.with_(roles=roles))
    found = twin(models, data, ctx, 0.02, places, transfer)
    assert len(found) == 5 and max(max(shares) for shares in found.values()) > 0.5
    for name, start in tensors[0].items():
        shares = found[name.split(".")[2] if ".layers." in name else name]
        slow = start + 0.4 * 3 * sum(s * (t[name] - start) for s, t in zip(shares, tensors[1:], strict=True))
        torch.testing.assert_close(made[name], slow, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"transfer": "far"}, {"places": 0}])
def test_fields_that_cannot_be(fields):
    with pytest.raises(LuthierError, match="merge.sens"):
        Sens(**fields)


def test_it_asks_for_data():
    start = {"x": torch.ones(1)}
    with pytest.raises(LuthierError, match="0 subjects for 2 experts"):
        transform_tensors(Sens(), start, [start, start], Context())


def test_defaults():
    assert Sens().to_dict()["set"] == {
        "examples": 100, "max_length": 512, "places": 32, "within": True, "across": True, "transfer": "distance",
        "temperature": 1.0, "scale": 1.0,
    }  # fmt: skip
    passes = [Sens(within=w, across=a).passes(4) for w, a in ((True, True), (True, False), (False, True))]
    assert passes == [7.0, 3.0, 4.0]


def test_scale_may_vary_by_name():
    made = merged(Sens(scale={"*": 1.0, "y": 0.5}), [(1.0, 2.0), (1.0, 2.0)])
    assert made == pytest.approx((2.0, 2.0))
