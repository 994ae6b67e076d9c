"""LaCo against hand calculations and a twin that collapses transformers' own modules."""

import copy
import math

import pytest
import torch

from luthier.compress.laco import Laco, Merged
from luthier.errors import LuthierError
from luthier.kit.calibrate import drawn
from luthier.kit.context import Context
from luthier.kit.genome import of_base
from luthier.testing import tiny
from luthier.testing.study import LAYERS, folders, fresh, sources, study


def collapsed(method):
    """The output layers as maps of coefficients, and the notes."""
    with fresh() as place:
        table, chosen = study(method, place, items=1)
    layers = [{entry: 1.0} if isinstance(entry, str) else dict(entry) for entry in chosen.layers]
    return [{int(name.removeprefix("base.")): factor for name, factor in one.items()} for one in layers], table


def threshold_of(table):
    return float(next(n for n in table.notes if n.startswith("threshold: ")).removeprefix("threshold: "))


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folders()[0]).eval()


def rows(count=2):
    """What is compared: the first items of each data, as the seed has them."""
    ctx = Context(step="contract")
    return [row for source in sources() for _, row in drawn(source, tiny.tokenizer(), count, 512, ctx)]


def twin(whole, threshold, merge=4, interval=1, low=0, high=LAYERS - 1, most=LAYERS - 1, last=False, items=()):
    """The sweep of the paper on modules; (the collapsed model, the original layers of each of its own, cosines)."""

    def states(one):
        found = []
        for row in items:
            with torch.no_grad():
                out = one(torch.tensor([row.input_ids]), output_hidden_states=True, use_cache=False)
            found.append(out.hidden_states[-1].flatten())
        return found

    wanted, now = states(whole), copy.deepcopy(whole)
    spans, cosines, at = [[i] for i in range(LAYERS)], [], high - merge
    while at >= low and LAYERS - len(spans) < most:
        more = min(merge - 1, len(spans) - at - 1, most - LAYERS + len(spans))
        tried = copy.deepcopy(now)
        start = {n: p.detach().clone() for n, p in now.model.layers[at].named_parameters()}
        with torch.no_grad():
            for name, p in tried.model.layers[at].named_parameters():
                for k in range(1, more + 1):
                    other = dict(now.model.layers[at + k].named_parameters())[name]
                    p.copy_(other if last else p + (other - start[name]))
        left = [layer for i, layer in enumerate(tried.model.layers) if not at < i <= at + more]
        tried.model.layers = torch.nn.ModuleList(left)
        cos = [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(states(tried), wanted, strict=True)]
        cosines.append(sum(cos) / len(cos))
        if cosines[-1] > threshold:
            now = tried
            spans = [*spans[:at], sum(spans[at : at + more + 1], []), *spans[at + more + 1 :]]
            at -= interval
        else:
            at -= 1
    return now, spans, cosines


def same_weights(layers, base, made):
    """Whether the sums of coefficients are the twin's layers."""
    assert len(layers) == len(made.model.layers)
    stock = [dict(layer.named_parameters()) for layer in base.model.layers]
    for one, layer in zip(layers, made.model.layers, strict=True):
        for name, p in layer.named_parameters():
            torch.testing.assert_close(sum(stock[i][name] * f for i, f in one.items()), p, rtol=1e-4, atol=1e-4)


def test_by_hand():
    """Six layers, three into one, every collapse kept: 2 + (3-2) + (4-2) = -2 +3 +4; then that and 5 into 1; then the
    sum of those into 0, which one difference replaces."""
    layers, table = collapsed(Laco(layers=None, threshold=-1.0, merge_layers=3))
    assert layers == [{1: -1.0, 2: -1.0, 3: 1.0, 4: 1.0, 5: 1.0}]
    assert "collapsed into one: 0-5" in table.notes
    layers, table = collapsed(Laco(layers=3, threshold=-1.0, merge_layers=3))
    assert layers == [{0: 1.0}, {2: -1.0, 3: 1.0, 4: 1.0}, {5: 1.0}]
    assert "collapsed into one: 1-4" in table.notes
    layers, _ = collapsed(Laco(layers=2, threshold=-1.0, merge_layers=2, interval=2))
    assert layers == [{0: 1.0}, {2: 1.0}, {4: 1.0}, {5: 1.0}]  # 4 stands for 3-4, 2 for 1-2
    layers, _ = collapsed(Laco(layers=None, threshold=-1.0, merge_layers=3, keep="last", low=1))
    assert layers == [{0: 1.0}, {5: 1.0}]
    layers, _ = collapsed(Laco(layers=2, threshold=-1.0, merge_layers=4, high=4))
    assert layers == [{0: -1.0, 1: 1.0, 2: 1.0}, {3: 1.0}, {4: 1.0}, {5: 1.0}]
    layers, _ = collapsed(Laco(layers=3, threshold=-1.0, keep="last", high=99))
    assert layers == [{0: 1.0}, {4: 1.0}, {5: 1.0}]
    layers, _ = collapsed(Laco(layers=1, threshold=-1.0, low=4))
    assert layers == [{0: 1.0}, {1: 1.0}, {2: 1.0}, {3: 1.0}, {5: 1.0}]


@pytest.mark.parametrize(
    "fields",
    [{}, {"merge_layers": 3, "low": 1}, {"merge_layers": 2, "interval": 2, "high": 4},
     {"keep": "last", "merge_layers": 3}],
)  # fmt: skip
def test_the_sweep_of_the_paper(model, fields):
    how = {"merge": fields.get("merge_layers", 4), "last": fields.get("keep") == "last"}
    how |= {k: v for k, v in fields.items() if k in ("low", "interval", "high")}
    how["items"] = rows()
    _, _, first = twin(model, 1.0, **how)
    kept = set()
    for threshold in (max(first) + 1e-4, max(first) - 1e-4, min(first) - 1e-4):
        made, spans, _ = twin(model, threshold, **how)
        layers, table = collapsed(Laco(layers=None, threshold=threshold, examples=2, **fields))
        same_weights(layers, model, made)
        joined = ", ".join(f"{s[0]}-{s[-1]}" for s in spans if len(s) > 1) or "none"
        assert f"collapsed into one: {joined}" in table.notes
        assert threshold_of(table) == pytest.approx(threshold, abs=6e-5)
        kept.add(len(layers))
    assert len(kept) > 1


@pytest.mark.parametrize(("layers", "merge"), [(1, 4), (3, 2), (4, 3)])
def test_exact_counts_at_the_highest_threshold(model, layers, merge):
    found, table = collapsed(Laco(layers=layers, merge_layers=merge, examples=2))
    assert len(found) == LAYERS - layers
    lowered = threshold_of(table)
    made, spans, _ = twin(model, lowered - 1e-4, merge=merge, most=layers, items=rows())
    assert len(spans) == LAYERS - layers
    same_weights(found, model, made)
    for threshold in (1.0, (1 + lowered) / 2, lowered + 0.02, lowered + 1e-4):
        assert len(twin(model, threshold, merge=merge, most=layers, items=rows())[1]) > LAYERS - layers


def test_the_lowering_starts_at_the_threshold():
    found, table = collapsed(Laco(layers=1, threshold=-1.0, merge_layers=2))
    assert [set(one) for one in found] == [{0}, {1}, {2}, {4}, {5}]
    assert threshold_of(table) == -1.0
    assert "1 collapses compared" in table.notes


def test_released_code_leaves_the_last_layer():
    """The notebooks' cell 5 adds (above - layer) to the layer it has just added to: 3 + (5 - 3) = 5, 5 + (11 - 5) = 11,
    whatever the first ones are; the paper's sum is 3 + (5 - 3) + (11 - 3) = 13."""
    theta = [3.0, 5.0, 11.0]
    layer = theta[0]
    for above in theta[1:]:
        layer += above - layer
    assert layer == theta[-1]
    assert theta[0] + sum(above - theta[0] for above in theta[1:]) == 13.0
    for keep, value in (("last", 11.0), ("differences", 13.0)):
        layers, _ = collapsed(Laco(layers=2, threshold=-1.0, merge_layers=3, keep=keep))
        assert sum(theta[i - 2] * f for i, f in layers[2].items()) == value


def test_what_is_left_is_known_where_a_count_is_given():
    assert [Laco(layers=n).leaves(10) for n in (0, 3, None)] == [10, 7, 10]


def test_counts_that_cannot_be():
    with pytest.raises(LuthierError, match="6 layers cannot go from 6.*let 5 go at most"):
        collapsed(Laco(layers=6))
    with pytest.raises(LuthierError, match="5 layers cannot go from 6.*let 4 go at most"):
        collapsed(Laco(layers=5, low=1))
    with pytest.raises(LuthierError, match="1 layers cannot go from 6.*let 0 go at most"):
        collapsed(Laco(low=8))
    with pytest.raises(LuthierError, match="4 layers do not go in one sweep, only 2.*raise merge_layers"):
        collapsed(Laco(layers=4, merge_layers=2, interval=2))
    assert len(collapsed(Laco(layers=5))[0]) == 1


def test_nothing_goes():
    with fresh() as place:
        table, chosen = study(Laco(layers=0), place, items=1)
    assert chosen == of_base(range(LAYERS))
    assert "0 collapses compared" in table.notes
    assert Laco() == Laco(layers=1, threshold=1.0, merge_layers=4, interval=1, low=0, examples=5, max_length=512)
    assert Laco(layers=0).least(9) == 0
    assert Laco().least(9) == 9
    assert math.isclose(threshold_of(table), 1.0)


def test_a_sum_of_sums_by_hand():
    """Layer 0 already holds 2 (θ_1) - θ_0, say; with θ_2 and θ_3 on top: -1 times it, plus both."""
    bottom = Merged(0, 1, ((0, -1.0), (1, 2.0)))
    above = [Merged(2, 2, ((2, 1.0),)), Merged(3, 4, ((3, 0.5), (4, 0.5)))]
    made = Laco()._merged([bottom, *above])
    assert (made.first, made.last) == (0, 4)
    assert dict(made.share) == {0: 1.0, 1: -2.0, 2: 1.0, 3: 0.5, 4: 0.5}
    assert dict(Laco(keep="last")._merged([bottom, *above]).share) == {3: 0.5, 4: 0.5}


def test_a_cosine_at_the_threshold_is_refused():
    method = Laco(layers=None, merge_layers=2, high=LAYERS - 1)
    stack, refused = method._sweep(LAYERS, 0.5, lambda candidate: 0.5, Context(step="contract"))
    assert (len(stack), refused) == (LAYERS, 0.5)
    stack, refused = method._sweep(LAYERS, 0.5, lambda candidate: math.nextafter(0.5, 1), Context(step="contract"))
    assert len(stack) < LAYERS and refused is None


def test_the_highest_refused_cosine_is_told():
    """The next threshold lies just below it: the first refusal is no bound."""
    cosines = iter([0.2, 0.4, 0.1, 0.3, 0.05, 0.0])
    method = Laco(layers=None, merge_layers=2, low=0)
    _, refused = method._sweep(LAYERS, 0.9, lambda candidate: next(cosines), Context(step="contract"))
    assert refused == 0.4


def test_a_sweep_ends_at_the_lowest_layer():
    """Every place from the start down to `low` is looked at once, and none below it."""
    for low in (0, 1):
        seen = iter(range(100))
        stack, refused = Laco(layers=None, merge_layers=2, low=low)._sweep(
            LAYERS, 200.0, lambda candidate, seen=seen: next(seen), Context(step="contract")
        )
        assert (len(stack), next(seen), refused) == (LAYERS, LAYERS - 2 - low, LAYERS - 3 - low)


def test_states_that_are_no_numbers_never_collapse(monkeypatch):
    """A mean that is no number counts as the least cosine there is, -1: no threshold that can be set lets it pass."""
    import luthier.compress.laco as module

    monkeypatch.setattr(module, "_last", lambda model, row: torch.full((3,), math.nan, dtype=torch.float64))
    table = collapsed(Laco(layers=None, threshold=-1.0))[1]
    assert any(note == "collapsed into one: none" for note in table.notes)
    forced, table = collapsed(Laco(layers=1, threshold=-1.0))  # but a count that is asked for is kept
    assert len(forced) == LAYERS - 1 and threshold_of(table) == -1.0


def test_one_layer_alone_does_not_collapse():
    layers, table = collapsed(Laco(layers=None, threshold=-1.0, low=LAYERS - 1))
    assert layers == [{i: 1.0} for i in range(LAYERS)]
    assert "0 collapses compared" in table.notes


@pytest.mark.parametrize(("low", "places"), [(0, 4), (1, 3), (3, 1)])
def test_as_many_steps_are_told_as_there_are_places(low, places):
    """Of six layers the sweep starts two below the last one."""
    told = []
    context = Context(step="contract", watch=told.append)
    Laco(layers=None, merge_layers=2, low=low)._sweep(LAYERS, 1.0, lambda candidate: 0.5, context)
    seen = [event for event in told if event["kind"] == "progress"]
    assert {event["total"] for event in seen} == {places} and not Laco.proposes
