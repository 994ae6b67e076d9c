"""Drop against twins that cut a model by hand and look at transformers' own hidden states and loss."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from luthier.compress.drop import Drop
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.encode import collate, encode
from luthier.testing import tiny
from luthier.testing.study import LAYERS, folders, fresh, sources, study


def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folders()[0]).eval()


def dropped(method, **search):
    """The layers that go, and the table."""
    with fresh() as place:
        table, chosen = study(method, place, **search)
    kept = [int(entry.removeprefix("base.")) for entry in chosen.layers]
    assert kept == sorted(kept)
    return sorted(set(range(LAYERS)) - set(kept)), table


def rows():
    return [encode(item, tiny.tokenizer()) for source in sources() for item in source.train]


def states():
    """For each row the residual stream before every layer and after the last one, by transformers."""
    whole, found = model(), []
    last = []
    whole.model.layers[-1].register_forward_hook(lambda m, a, y: last.append(y[0] if isinstance(y, tuple) else y))
    for row in rows():
        with torch.no_grad():
            inner = whole.model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
        found.append([h[0].double() for h in (*inner[:-1], last[-1])])  # the last of them stands behind the final norm
    return found


def loss_without(gone):
    """The mean over the data of the loss a token of the model without these layers, one row at a time."""
    cut = model()
    cut.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(cut.model.layers) if i not in gone)
    for place, layer in enumerate(cut.model.layers):
        layer.self_attn.layer_idx = place
    means = []
    for source in sources():
        total = count = 0.0
        for item in source.train:
            row = encode(item, tiny.tokenizer())
            with torch.no_grad():
                batch = collate([row], 0, multiple=1)
                total += cut(**batch, use_cache=False).loss.item() * row.count
            count += row.count
        means.append(total / count)
    return sum(means)


def test_influence_is_one_minus_the_cosine_over_tokens():
    turned = []
    for layer in range(LAYERS):
        found = [1 - torch.cosine_similarity(h[layer], h[layer + 1], dim=-1) for h in states()]
        turned.append(torch.cat(found).mean().item())
    least = sorted(sorted(range(LAYERS), key=lambda i: turned[i])[:2])
    gone, table = dropped(Drop(layers=2))
    assert gone == least
    said = next(n for n in table.notes if n.startswith("turned: ")).removeprefix("turned: ").split(", ")
    assert [float(v) for v in said] == pytest.approx(turned, abs=6e-5)


def test_angular_takes_the_block_across_which_the_last_token_turns_least():
    for count in (1, 2, 3):
        turned = []
        for start in range(LAYERS - count + 1):
            cosines = [torch.cosine_similarity(h[start][-1], h[start + count][-1], dim=0).item() for h in states()]
            turned.append(sum(math.acos(c) / math.pi for c in cosines) / len(cosines))
        start = turned.index(min(turned))
        gone, table = dropped(Drop(layers=count, by="angular"))
        assert gone == list(range(start, start + count))
        said = next(n for n in table.notes if n.startswith("turned: ")).removeprefix("turned: ").split(", ")
        assert [float(v) for v in said] == pytest.approx(turned, abs=6e-5)


def test_loss_takes_one_layer_a_round_and_leaves_the_ends():
    gone = []
    for _ in range(2):
        left = [layer for layer in range(1, LAYERS - 1) if layer not in gone]
        costs = [loss_without([*gone, layer]) for layer in left]
        gone.append(left[costs.index(min(costs))])
    mine, table = dropped(Drop(layers=2, by="loss"), items=8, trials=1)
    assert mine == sorted(gone)
    assert (
        len(table.rows) == 1 + 4 + 3
    )  # the base, then every layer but the ends, twice; the best of them is not judged again


def test_a_judged_value_is_the_cut_models_loss():
    gone, table = dropped(Drop(layers=1), items=8)
    row = table.where(chosen=True)[0]
    assert row["sums nll"] + row["text nll"] == pytest.approx(loss_without(gone), rel=1e-5)
    assert json.loads(row["candidate"])["use"] == "compress.stitch"


def test_dumb_rules():
    assert dropped(Drop(layers=2, by="last"))[0] == [LAYERS - 3, LAYERS - 2]
    inner = list(range(1, LAYERS - 1))
    order = torch.randperm(len(inner), generator=Context(step="contract").rng("layers")).tolist()
    assert dropped(Drop(layers=2, by="random"))[0] == sorted(inner[i] for i in order[:2])


def test_the_model_is_smaller_and_plain():
    whole = model()
    inside = sum(p.numel() for p in whole.model.layers[0].parameters())
    _, table = dropped(Drop(layers=2))
    rows_ = table.dicts()
    assert rows_[1]["parameters"] == rows_[0]["parameters"] - 2 * inside


@pytest.mark.parametrize(("by", "most"), [("influence", 5), ("angular", 5), ("loss", 4), ("last", 4), ("random", 4)])
def test_too_many_layers(by, most):
    assert len(dropped(Drop(layers=most, by=by))[0]) == most
    with pytest.raises(LuthierError, match=f"{most + 1} layers cannot go from {LAYERS}.*drop {most} at most"):
        dropped(Drop(layers=most + 1, by=by))


def test_defaults_are_these():
    assert Drop().to_dict()["set"] == {"layers": 1, "by": "influence", "examples": 32, "max_length": 512}


def test_how_many_candidates_it_takes():
    """Greedy asks for each layer but the ends, once a round; a rule asks for its one choice."""
    assert [Drop(layers=n, by="loss").least(10) for n in (0, 1, 3)] == [0, 8, 24]
    assert [Drop(layers=3, by=by).least(10) for by in ("influence", "angular", "last", "random")] == [1, 1, 1, 1]
    assert not Drop.proposes and Drop(layers=3).leaves(10) == 7


@pytest.mark.parametrize("by", ["influence", "loss", "last", "random"])
def test_a_model_that_has_nothing_to_spare(by):
    """Before anything is opened: of two layers one may go by what they do, none where both ends stay."""
    space = SimpleNamespace(layers=1 if by == "influence" else 2)
    with pytest.raises(LuthierError, match=f"1 layers cannot go from {space.layers}.*drop 0 at most"):
        Drop(layers=1, by=by).fits(space)


def test_rounds_are_told():
    told = []
    space, values = SimpleNamespace(layers=5), {(0, 2, 3, 4): 1.0, (0, 2, 4): 3.0, (0, 3, 4): 2.0}

    class Judge:
        def __call__(self, candidate):
            kept = tuple(int(entry.removeprefix("base.")) for entry in candidate.layers)
            return (values.get(kept, 9.0),)

        def table(self, candidate, notes):
            return candidate, notes

    context = Context(watch=told.append)
    made, notes = Drop(layers=2, by="loss").study(space, Judge(), None, context)
    assert [entry.removeprefix("base.") for entry in made.layers] == ["0", "3", "4"]
    assert notes == ("loss: layers [1, 2] go",)
    assert list(dict.fromkeys(e["what"] for e in told if e["kind"] == "progress")) == ["round 1", "round 2"]
