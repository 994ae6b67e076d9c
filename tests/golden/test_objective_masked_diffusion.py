"""objective.masked_diffusion against a twin that goes place by place in plain Python, and hand calculations."""

import math

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.model import build_model
from luthier.objective.masked_diffusion import MaskedDiffusion
from luthier.testing import tiny
from luthier.testing.objective import batch

MASK = 3


def host(**changes):
    return tiny.llama(is_causal=False, mask_token_id=MASK, **changes)


class Seen:
    """A model that keeps what it was given."""

    def __init__(self, model):
        self.model, self.inputs = model, []
        model.model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs):
        self.inputs.append(kwargs)


def noise_of(given, ctx, floor=1e-3, antithetic=False):
    """(t, p, masked places) of each row: from a generator keyed by the row's real tokens, t first."""
    order = torch.randperm(len(given["input_ids"]), generator=ctx.rng("strata", len(given["input_ids"]))).tolist()
    out, seen = [], {}
    for i, (ids, real, labels) in enumerate(
        zip(*(given[k].tolist() for k in ("input_ids", "attention_mask", "labels")), strict=True)
    ):
        content = [token for token, r in zip(ids, real, strict=True) if r]
        nth = seen.get(tuple(content), 0)
        seen[tuple(content)] = nth + 1
        asked = [place for place, label in enumerate(labels) if label != -100 and real[place]]
        u = torch.rand(1 + len(asked), generator=ctx.rng("noise", content, nth)).tolist()
        t = (order[i] + u[0]) / len(order) if antithetic else u[0]
        p = t * (1 - floor) + floor
        out.append((t, p, [place for place, x in zip(asked, u[1:], strict=True) if x < p], len(asked)))
    return out


def slow(model, given, rows, weight=True, average="token"):
    """The loss by the definition, one masked place at a time, each row by itself."""
    sums, lengths = [], []
    for i, (_, p, masked, asked) in enumerate(rows):
        real = given["attention_mask"][i].bool()
        ids = given["input_ids"][i].clone()
        for place in masked:
            ids[place] = MASK
        logits = model(ids[real][None]).logits[0].double()
        shift = int(real.long().argmax())
        total = 0.0
        for place in masked:
            row = logits[place - shift].tolist()
            top = max(row)
            nll = top + math.log(sum(math.exp(x - top) for x in row)) - row[given["labels"][i, place]]
            total += nll / p if weight else nll
        sums.append(total)
        lengths.append(asked)
    if average == "row":
        return sum(s / n for s, n in zip(sums, lengths, strict=True) if n) / sum(n > 0 for n in lengths)
    return sum(sums) / sum(lengths)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("average", ["token", "row"])
@pytest.mark.parametrize("weight", ["inverse", "none"])
def test_twin(seed, average, weight):
    model, given, ctx = host(), batch(), Context(seed=seed, step="golden")
    loss = MaskedDiffusion(average=average, weight=weight).loss(model, given, ctx)
    rows = noise_of(given, ctx)
    assert any(masked for _, _, masked, _ in rows)
    want = slow(model, given, rows, weight == "inverse", average)
    assert loss.total.item() == pytest.approx(want, rel=2e-5)
    assert loss.count == (3 if average == "row" else 15) and set(loss.terms) == {"nll"}


@pytest.mark.parametrize("floor", [0.5, 1.0])
def test_the_floor_is_the_least_probability(floor):
    model, given, ctx = host(), batch(), Context(seed=2, step="golden")
    rows = noise_of(given, ctx, floor)
    assert all(p >= floor for _, p, _, _ in rows)
    loss = MaskedDiffusion(floor=floor).loss(model, given, ctx).total.item()
    assert loss == pytest.approx(slow(model, given, rows), rel=2e-5)


def test_defaults_are_lladas():
    """Uniform times above 1e-3, weighted by 1/p, over all labelled tokens."""
    method = MaskedDiffusion()
    assert (method.times, method.floor, method.weight, method.average) == ("independent", 1e-3, "inverse", "token")
    assert method.rate is None and method.mask_token is None and method.aux == 1.0


def test_by_hand():
    """Rate 1/2 and one word at a time: uniform logits over V words cost ln V for each masked token, times two."""
    model, given = host(), batch()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ctx = Context(seed=1)
    watched = Seen(model)
    loss = MaskedDiffusion(rate=0.5).loss(model, given, ctx)
    masked = int((watched.inputs[0]["input_ids"] == MASK).sum() - (given["input_ids"] == MASK).sum())
    assert 0 < masked < 15
    assert loss.total.item() == pytest.approx(2 * masked * math.log(tiny.VOCAB) / 15, rel=1e-6)
    plain = MaskedDiffusion(rate=0.5, weight="none").loss(model, given, ctx).total.item()
    assert plain == pytest.approx(masked * math.log(tiny.VOCAB) / 15, rel=1e-6)


def test_only_labelled_real_places_are_masked():
    """At rate 1: exactly those, and everything else is given as it stands, positions too."""
    model, given = host(), batch()
    given["labels"][2, 8] = 7  # a label on padding is none
    given["position_ids"] = torch.arange(10).expand(3, -1)
    watched = Seen(model)
    loss = MaskedDiffusion(rate=1.0).loss(model, given, Context())
    asked = (given["labels"] != -100) & given["attention_mask"].bool()
    assert torch.equal(watched.inputs[0]["input_ids"], given["input_ids"].masked_fill(asked, MASK))
    assert torch.equal(watched.inputs[0]["position_ids"], given["position_ids"])
    assert loss.count == int(asked.sum()) == 15
    del given["attention_mask"]
    assert MaskedDiffusion(rate=1.0).loss(model, given, Context()).count == 16


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_antithetic_times_fill_the_interval(rows):
    """One time in each of as many parts as there are rows, which row gets which is drawn."""
    given = {k: v.repeat(3, 1)[:rows] for k, v in batch().items()}
    model, placed = host(), set()
    for seed in range(6):
        ctx = Context(seed=seed, step="golden")
        drawn = noise_of(given, ctx, antithetic=True)
        assert sorted(int(t * rows) for t, *_ in drawn) == list(range(rows))
        placed.add(tuple(int(t * rows) for t, *_ in drawn))
        loss = MaskedDiffusion(times="antithetic").loss(model, given, ctx).total.item()
        assert loss == pytest.approx(slow(model, given, drawn), rel=2e-5)
    assert len(placed) > 1


def test_the_probability_is_exact():
    """Noise is k/2^24 for k from 0 on, so that a share p of it is below p: a place that drew p itself stays."""
    model, given, ctx = host(), {k: v[:1] for k, v in batch().items()}, Context(seed=2)
    asked = given["labels"][0] != -100
    u = torch.rand(1 + int(asked.sum()), generator=ctx.rng("noise", given["input_ids"][0].tolist(), 0))[1:]
    watched = Seen(model)
    MaskedDiffusion(rate=u.sort().values[2].item()).loss(model, given, ctx)
    assert int((watched.inputs[0]["input_ids"] == MASK).sum() - (given["input_ids"] == MASK).sum()) == 2


def test_equal_rows_get_noise_of_their_own():
    model, given = host(), {k: v[1:2].repeat(6, 1) for k, v in batch().items()}
    watched = Seen(model)
    MaskedDiffusion(rate=0.5).loss(model, given, Context(seed=3))
    assert len({tuple(row) for row in watched.inputs[0]["input_ids"].tolist()}) > 3


def test_noise_is_a_rows_own():
    """In another batch, in another order, with other padding: the same places are masked."""
    model, given = host(), batch()
    watched = Seen(model)
    ctx = Context(seed=4)
    MaskedDiffusion(rate=0.5).loss(model, given, ctx)
    MaskedDiffusion(rate=0.5).loss(model, {k: v.flip(0) for k, v in given.items()}, ctx)
    first, second = (x["input_ids"] for x in watched.inputs)
    assert torch.equal(first, second.flip(0))
    MaskedDiffusion(rate=0.5).loss(model, given, Context(seed=5))
    assert not torch.equal(first, watched.inputs[2]["input_ids"])


def test_the_weighted_mean_is_the_bound():
    """Over many draws the loss is the mean over k of 1..L masked, times L/k: the form by masked counts."""
    model, given = host(), {k: v[2:3, :3] for k, v in batch().items()}
    with torch.no_grad():
        many = {k: v.repeat(200, 1) for k, v in given.items()}  # equal rows draw noise of their own
        drawn = [MaskedDiffusion(floor=1e-6).loss(model, many, Context(seed=s)).total.item() for s in range(20)]
        exact = 0.0
        for bits in range(1, 8):
            places = [i for i in range(3) if bits >> i & 1]
            ids = given["input_ids"].clone()
            ids[0, places] = MASK
            nll = -model(ids).logits[0].log_softmax(-1)[places, given["labels"][0, places]].sum().item()
            exact += nll / math.comb(3, len(places)) / len(places) / 3  # L/k of 1/L, over 3 counts and equal sets
    mean, spread = sum(drawn) / len(drawn), torch.tensor(drawn).std().item()
    assert abs(mean - exact) < 4 * spread / len(drawn) ** 0.5 and spread / len(drawn) ** 0.5 < 0.05 * exact


def test_bert_is_a_mask_predictor():
    """A masked language model of transformers; its loss at a fixed rate is BERT's own."""
    config = BertConfig(vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    bert = tiny.redraw_(BertForMaskedLM(config), 0).eval()
    given = batch()
    loss = MaskedDiffusion(rate=1.0, mask_token=MASK).loss(bert, given, Context()).total
    asked = given["labels"] != -100
    ids = given["input_ids"].masked_fill(asked, MASK)
    want = bert(ids, attention_mask=given["attention_mask"], labels=given["labels"]).loss
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_our_decoder_and_its_experts():
    """Aux losses come on top, times `aux`."""
    slots = {
        "mixer": {"use": "block.attention", "set": {"causal": False}},
        "ffn": {"use": "block.moe", "set": {"experts": 4, "top_k": 2, "width": 16, "balance_weight": 0.5}},
    }
    model = build_model({"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "mask_token_id": MASK,
                         "num_attention_heads": 4, "intermediate_size": 32, "slots": slots}).train()  # fmt: skip
    given, ctx = batch(), Context(seed=1)
    none, one, two = (MaskedDiffusion(aux=a).loss(model, given, ctx) for a in (0.0, 1.0, 2.0))
    assert "aux" not in none.terms and set(one.terms) == {"nll", "aux"}
    assert not any(term.requires_grad for term in (*one.terms.values(), *none.terms.values()))
    gain = one.total.item() - none.total.item()
    assert gain > 1e-3 and gain == pytest.approx(one.terms["aux"].item(), rel=1e-4)
    assert two.total.item() - none.total.item() == pytest.approx(2 * gain, rel=1e-4)


def test_logits_come_in_stretches(monkeypatch):
    """As many masked places at once as fit the budget of logits; the head runs again in the backward pass."""
    from luthier.objective import masked_diffusion

    model, given, seen = host(), batch(), []
    whole = MaskedDiffusion(rate=1.0).loss(model, given, Context()).total
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    monkeypatch.setattr(masked_diffusion, "AT_ONCE", 4 * tiny.VOCAB + 5)
    parts = MaskedDiffusion(rate=1.0).loss(model, given, Context()).total
    assert seen == [4, 4, 4, 3] and parts.item() == pytest.approx(whole.item(), rel=1e-6)
    one, two = (torch.autograd.grad(x, model.lm_head.weight)[0] for x in (whole, parts))
    torch.testing.assert_close(one, two)
    monkeypatch.setattr(masked_diffusion, "AT_ONCE", 1)
    seen.clear()
    MaskedDiffusion(rate=1.0).loss(model, given, Context())
    assert seen == [1] * 15


@pytest.mark.parametrize(
    ("sizes", "fields", "says"),
    [
        ({"is_causal": False}, {}, "names no mask token; set mask_token"),
        ({"is_causal": False}, {"mask_token": tiny.VOCAB}, f"token {tiny.VOCAB} is not among the model's {tiny.VOCAB}"),
        ({"mask_token_id": 3}, {}, "attention is causal, a mask predictor looks both ways"),
    ],
)
def test_what_it_cannot_do_is_one_line(sizes, fields, says):
    with pytest.raises(LuthierError, match=says) as fault:
        MaskedDiffusion(**fields).loss(tiny.llama(**sizes), batch(), Context())
    assert "\n" not in str(fault.value) and "objective.masked_diffusion" in str(fault.value)


def test_the_field_goes_before_the_models_word():
    model, given = host(), batch()
    watched = Seen(model)
    MaskedDiffusion(rate=1.0, mask_token=tiny.VOCAB - 1).loss(model, given, Context())
    assert (watched.inputs[0]["input_ids"][given["labels"] != -100] == tiny.VOCAB - 1).all()
    MaskedDiffusion(rate=1.0, mask_token=0).loss(model, given, Context())
    assert (watched.inputs[1]["input_ids"][given["labels"] != -100] == 0).all()


def test_rows_of_one_label_and_of_none():
    """By row: a row with one label counts as much as any, a row without does not count."""
    model, given, ctx = host(), batch(), Context(seed=6, step="golden")
    given["labels"][1, 1:] = -100
    given["labels"][2] = -100
    loss = MaskedDiffusion(average="row", floor=1.0).loss(model, given, ctx)
    want = slow(model, given, noise_of(given, ctx, floor=1.0), average="row")
    assert loss.count == 2 and loss.total.item() == pytest.approx(want, rel=2e-5)
