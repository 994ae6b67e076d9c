"""GPTailor against hand calculations, numbers of the released code, and every candidate of a tiny search."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from luthier.checkpoint.reader import Checkpoint
from luthier.compress.gptailor import COEFFICIENTS, Gptailor, merged, resolved, told
from luthier.engine.spec import SearchSpec
from luthier.engine.study import run_study
from luthier.errors import LuthierError
from luthier.flows import Space
from luthier.kit.context import Context
from luthier.kit.encode import collate, encode
from luthier.kit.pareto import bounds, chebyshev, normalised, weights
from luthier.testing import tiny
from luthier.testing.study import LAYERS, fresh, study


class Given:
    """A proposal that answers from a map; `asked` is what it was asked, with the bounds."""

    ordinal = 0

    def __init__(self, numbers):
        self.numbers, self.asked = numbers, {}

    def _ask(self, name, *bounds):
        self.asked[name] = bounds
        return self.numbers[name]

    choice = whole = _ask

    def share(self, name, low=0.0, high=1.0):
        return self._ask(name, low, high)


def decoded(method, numbers, layers, experts):
    given = Given(numbers)
    return method._candidate(Space(layers, (layers,) * experts), given).layers, given.asked


def plain(entries):
    return [entry if isinstance(entry, str) else dict(entry) for entry in entries]


def test_numbers_resolve_to_distinct_layers():
    assert resolved([3, 3, 3, 3], range(6)) == [3, 4, 2, 5]  # the nearest one left, of two the later
    assert resolved([5, 5, 5], range(6)) == [5, 4, 3]
    assert resolved([0, 0, 1], range(6)) == [0, 1, 2]
    assert resolved([1, 1, 1], range(1, 4)) == [1, 2, 3]
    assert resolved([], range(3)) == []
    for wanted in itertools.product(range(4), repeat=4):
        assert sorted(resolved(wanted, range(4))) == [0, 1, 2, 3]


def test_entries_by_hand():
    assert merged(7, [], 0.5, 7) == "base.7"
    assert merged(7, [1], 0.5, 7) == "1.7"
    assert merged(7, [0, 2], 0.25, 7) == {"base.7": 0.5, "0.7": 0.25, "2.7": 0.25}
    assert merged(7, [0, 1, 2], 1.0, 7) == {"base.7": -2.0, "0.7": 1.0, "1.7": 1.0, "2.7": 1.0}
    assert merged(7, [0, 1], 0.5, 7) == {"0.7": 0.5, "1.7": 0.5}  # the base cancels
    assert merged(7, [0, 1], 0.25, 4) == {"base.4": 0.5, "0.7": 0.25, "1.7": 0.25}
    assert merged(7, [0, 1], 0.0, 7) == "base.7"


def test_what_a_trial_is_asked():
    """Four layers, two of them gone, two experts; nothing is asked of layers that have gone, h only where it acts."""
    numbers = {"gone.0": 1, "gone.1": 1, "0.0": 0, "0.1": 1, "3.0": 1, "3.1": 1, "3.h": 0.25}
    layers, asked = decoded(Gptailor(layers=2), numbers, 4, 2)
    assert plain(layers) == ["1.0", {"base.3": 0.5, "0.3": 0.25, "1.3": 0.25}]
    bit = (2,)
    assert asked == {"gone.0": (0, 3), "gone.1": (0, 3), "0.0": bit, "0.1": bit, "3.0": bit, "3.1": bit, "3.h": (0.0, 1.0)}  # fmt: skip  # noqa: E501
    layers, _ = decoded(Gptailor(layers=2, origin="slot"), numbers, 4, 2)
    assert plain(layers) == ["1.0", {"base.1": 0.5, "0.3": 0.25, "1.3": 0.25}]
    layers, asked = decoded(
        Gptailor(layers=1, pick="one", first=1, last=1), {"gone.0": 2, "0": 0, "1": 1, "3": 2}, 4, 2
    )
    assert (plain(layers), asked) == (["base.0", "0.1", "1.3"], {"gone.0": (1, 2), "0": (3,), "1": (3,), "3": (3,)})
    layers, asked = decoded(Gptailor(layers=1, pick="base"), {"gone.0": 0}, 3, 2)
    assert (plain(layers), list(asked)) == (["base.1", "base.2"], ["gone.0"])
    layers, asked = decoded(Gptailor(layers=1), {"gone.0": 2}, 3, 0)
    assert (plain(layers), list(asked)) == (["base.0", "base.1"], ["gone.0"])


def test_numbers_at_the_edges():
    for fields, stay in (({}, ["base.0", "base.1"]), ({"last": 1}, ["base.0", "base.3"]), ({"first": 3}, None)):
        numbers = {"gone.0": 3 - fields.get("last", 0), "gone.1": 3 - fields.get("last", 0)}
        if stay:
            assert plain(decoded(Gptailor(layers=2, pick="base", **fields), numbers, 4, 0)[0]) == stay
        else:
            assert plain(decoded(Gptailor(layers=1, pick="base", **fields), numbers, 4, 0)[0]) == [
                f"base.{i}" for i in (0, 1, 2)
            ]


@pytest.mark.parametrize(("first", "last", "most"), [(0, 0, 5), (1, 0, 5), (0, 2, 4), (1, 2, 3), (3, 3, 0), (4, 4, 0)])
def test_how_many_may_go(first, last, most):
    space = Space(6, (6, 6))
    Gptailor(layers=most, first=first, last=last).fits(space)
    assert Gptailor(layers=most).leaves(6) == 6 - most
    with pytest.raises(LuthierError, match=f"{most + 1} layers cannot go from 6.*let {most} go at most"):
        Gptailor(layers=most + 1, first=first, last=last).fits(space)
    with pytest.raises(LuthierError, match="expert 1 has 5 layers, the base 6"):
        Gptailor(layers=0).fits(Space(6, (6, 5)))


def test_notes_say_what_became_of_the_layers():
    layers = ["1.0", "base.2", {"base.3": 0.5, "0.3": 0.25, "1.3": 0.25}, "1.5", {"0.6": 0.5, "2.6": 0.5}]
    assert told(layers, Space(8, (8, 8, 8), ("chat", "math", "code"))) == [
        "layers gone: 1, 4, 7", "from math: 0, 5", "from the base: 2",
        "merged: 3 (chat + math, h 0.25), 6 (chat + code, h 0.50)",
    ]  # fmt: skip
    for names in ((), ("out", "math", "out")):
        assert told(layers[:1], Space(1, (1, 1, 1), names)) == ["layers gone: none", "from expert 1: 0"]
    assert told(["base.0", "base.1"], Space(2)) == ["layers gone: none", "from the base: 0, 1"]


def test_a_published_result_decodes_alike():
    """search_config/prune/7b/1.json of Guinan-Su/auto-merge-llm c45aaac: 9 of 32 layers gone, bits over three models,
    h where it acts; `theirs` is what its generate_genotype makes of them, run there: models and coefficient. It gives
    the same with the file's ten output scales that are not 1 (layer 15: 1.178, layer 8: 1.281) set to 1."""
    bits = {
        0: "100", 1: "111", 2: "100", 3: "100", 4: "100", 5: "101", 6: "001", 7: "001", 8: "100", 9: "100", 10: "000",
        11: "110", 12: "100", 13: "010", 14: "110", 15: "100", 16: "110", 17: "111", 18: "011", 21: "100", 27: "100",
        29: "101", 31: "110",
    }  # fmt: skip
    h = dict.fromkeys(bits, 0.5) | {5: 0.5850273131131, 14: 0.6027322484231, 15: 0.5657513731233, 27: 1.0}
    numbers = {f"gone.{i}": layer for i, layer in enumerate((26, 25, 24, 30, 23, 28, 22, 20, 19))}
    numbers |= {f"{layer}.{i}": int(bit) for layer, row in bits.items() for i, bit in enumerate(row)}
    numbers |= {f"{layer}.h": value for layer, value in h.items()}
    theirs = [
        (0, "0", 1), (1, "012", 0.5), (2, "0", 1), (3, "0", 1), (4, "0", 1), (5, "02", 0.5850273131131), (6, "2", 1),
        (7, "2", 1), (8, "0", 1), (9, "0", 1), (10, "B", 1), (11, "01", 0.5), (12, "0", 1), (13, "1", 1),
        (14, "01", 0.6027322484231), (15, "0", 1), (16, "01", 0.5), (17, "012", 0.5), (18, "12", 0.5), (21, "0", 1),
        (27, "0", 1), (29, "02", 0.5), (31, "01", 0.5),
    ]  # fmt: skip
    layers, asked = decoded(Gptailor(layers=9), numbers, 32, 3)
    assert len(layers) == len(theirs) == 23
    for entry, (layer, models, scale) in zip(plain(layers), theirs, strict=True):
        if len(models) == 1:
            assert entry == (f"base.{layer}" if models == "B" else f"{models}.{layer}")
            continue
        assert {name for name in entry if name[0] != "b"} == {f"{i}.{layer}" for i in models}
        assert {entry[f"{i}.{layer}"] for i in models} == {scale}
        assert entry.get(f"base.{layer}", 0.0) == pytest.approx(1 - len(models) * scale)
    assert not [name for name in asked if "scale" in name]


def test_released_code_merges_onto_another_layer():
    """Weights of one number: the base's layer l is l², the experts' 10 + l and 20 + l; layer 1 goes, the others merge
    both with h = 0.25. MergeUtils of Guinan-Su/auto-merge-llm c45aaac, run there on such tensors, gives 7.5, 9, 11."""
    numbers = {"gone.0": 1} | {f"{layer}.{i}": 1 for layer in (0, 2, 3) for i in (0, 1)}
    numbers |= {f"{layer}.h": 0.25 for layer in (0, 2, 3)}
    weight = {f"base.{n}": n**2 for n in range(4)} | {f"{i}.{n}": 10 * (i + 1) + n for i in (0, 1) for n in range(4)}
    for origin, values in (("layer", [7.5, 10.5, 13.5]), ("slot", [7.5, 9.0, 11.0])):
        layers, _ = decoded(Gptailor(layers=1, origin=origin), numbers, 4, 2)
        assert [sum(weight[name] * factor for name, factor in one.items()) for one in plain(layers)] == values
    for layer, value in ((0, 7.5), (2, 10.5), (3, 13.5)):  # task arithmetic
        assert layer**2 + 0.25 * ((10 + layer - layer**2) + (20 + layer - layer**2)) == value


def test_published_designs():
    """get_initial_params of Guinan-Su/auto-merge-llm c45aaac, run there with 32 layers, 9 gone and three models: 129
    designs, which its generate_genotype makes 84 different models of."""
    assert 3 * (1 + len(COEFFICIENTS) * 7) == 129
    assert 3 * (1 + 3 + len(COEFFICIENTS) * 4) == 84
    ctx = Context(step="test")
    designs = Gptailor(layers=9)._designs(Space(32, (32,) * 3), ctx)
    made = [decoded(Gptailor(layers=9), one, 32, 3) for one in designs]
    assert len(made) == len({json.dumps(plain(layers)) for layers, _ in made}) == 84
    assert all(
        len(layers) == 23 and asked.keys() == one.keys() for (layers, asked), one in zip(made, designs, strict=True)
    )
    gone = [[one[f"gone.{i}"] for i in range(9)] for one in designs[:3]]
    peer = [
        [24, 29, 23, 22, 30, 28, 21, 18, 25],
        [19, 16, 18, 14, 13, 15, 17, 23, 29],
        [24, 9, 18, 8, 21, 12, 30, 2, 26],
    ]
    for higher, middle, turns in (gone, peer):
        assert set(higher) < set(range(16, 31))
        assert set(middle[:7]) == set(range(13, 20)) and set(middle) < set(range(1, 31))
        assert set(turns[::2]) < set(range(16, 31)) and set(turns[1::2]) < set(range(1, 16))
    assert [plain(layers) for layers, _ in made[:3]] == [
        [f"base.{i}" for i in range(32) if i not in set(one)] for one in gone
    ]
    assert {one.get(f"{layer}.h") for one in designs for layer in range(32)} == {None, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0}
    assert designs != Gptailor(layers=9)._designs(Space(32, (32,) * 3), Context(seed=1, step="test"))
    assert designs[3:] != sorted(designs[3:], key=str)


def test_designs_fit_the_fields():
    ctx, space = Context(step="test"), Space(6, (6, 6))
    assert Gptailor() == Gptailor(layers=1, designs=12, first=0, last=0)
    ways = len({frozenset(way[:2]) for way in Gptailor(layers=2)._ways(space, ctx)})
    assert len(Gptailor(layers=2)._designs(space, ctx)) == ways * (1 + 2 + 6)
    assert len(Gptailor(layers=0)._designs(space, ctx)) == 1 + 2 + 6  # one way to remove nothing
    assert all(sorted(way) == list(range(32)) for way in Gptailor()._ways(Space(32), ctx))
    only = Gptailor(layers=2, pick="base")._designs(space, ctx)
    assert [set(one) for one in only] == [{"gone.0", "gone.1"}] * len(only)
    one = Gptailor(layers=2, pick="one", first=1, last=2)._designs(space, ctx)
    assert all(1 <= d[f"gone.{i}"] <= 3 for d in one for i in (0, 1))
    assert {d[k] for d in one for k in d if not k.startswith("gone")} == {0, 1, 2}
    for count in (1, 2, 3, 4, 5):  # the last and the first layer go last of all
        every = Gptailor(layers=count, pick="base")._designs(space, ctx)
        assert all((5 in d.values(), 0 in d.values()) == (count > 4, False) for d in every)
        assert len({frozenset(d.values()) for d in every}) == len(every)
    drawn = [Gptailor()._ways(Space(5), Context(seed=seed, step="test"))[1][:3] for seed in range(60)]
    assert {one[0] for one in drawn} == {1, 2, 3}  # of five layers all inner ones are near the middle
    assert all(sorted(one) == [1, 2, 3] for one in drawn)
    assert Gptailor(layers=0)._designs(Space(1, (1,)), ctx) == [{"0.0": 0}, {"0.0": 1}]


def test_several_objectives_as_one_number():
    rows = [(1.0, 40.0, 7.0), (3.0, 10.0, 7.0), (2.0, 20.0, 7.0)]
    assert bounds(rows) == [(1.0, 3.0), (10.0, 40.0), (7.0, 7.0)]
    assert normalised((2.0, 40.0, 9.0), bounds(rows)) == [0.5, 1.0, 0.0]
    assert normalised((0.0, 70.0), [(1.0, 3.0), (10.0, 40.0)]) == [-0.5, 2.0]
    # 0.25 * 0.4 = 0.1 and 0.75 * 0.8 = 0.6: the larger, and a twentieth of both
    assert chebyshev((0.4, 0.8), (0.25, 0.75)) == pytest.approx(0.6 + 0.05 * 0.7)
    assert chebyshev((0.4, 0.8), (0.75, 0.25), alpha=0.5) == pytest.approx(0.3 + 0.5 * 0.5)
    drawn = torch.tensor([weights(3, torch.Generator().manual_seed(i)) for i in range(2000)], dtype=torch.float64)
    torch.testing.assert_close(drawn.sum(1), torch.ones(2000, dtype=torch.float64))
    assert (drawn > 0).all()
    torch.testing.assert_close(drawn.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.02, rtol=0)
    assert (drawn[:, 0] > 0.5).double().mean().item() == pytest.approx(0.25, abs=0.03)  # (1 - 0.5)² of a triangle


class Front:
    """An Evaluate and Budget of given values: two objectives."""

    objectives = ("a nll", "b nll")

    def __init__(self, values):
        self.values, self.finished, self.scalars = list(values), [], []

    def proposals(self, sampler, first=(), scalar=None, size=None):
        for i, _ in enumerate(self.values):
            self.scalars.append(scalar(i) if scalar else None)
            yield Given(first[i] if i < len(first) else {"gone.0": i})

    def __call__(self, candidate, proposal):
        text = json.dumps(candidate.to_dict())
        self.finished.append(SimpleNamespace(values=self.values[len(self.finished)], candidate=text))

    def table(self, chosen, notes):
        return chosen, list(notes)


def test_the_scalar_of_a_trial_and_the_choice():
    values = [(1.0, 500.0), (2.0, 450.0), (3.0, 400.0)]
    front, ctx = Front(values), Context(step="test")
    chosen, notes = Gptailor(pick="base", designs=0).study(Space(3), front, front, ctx)
    assert notes == ["layers gone: 2", "from the base: 0, 1"]  # 403 is the lowest mean
    for i, (a, b) in ((0, (0.0, 1.0)), (2, (1.0, 500.0))):
        wa, wb = weights(2, ctx.rng("weights", i))
        x, y = (a, b) if i == 0 else ((a - 1) / 1, (b - 450) / 50)  # ranges of the two trials before it
        assert front.scalars[i]((a, b)) == pytest.approx(max(wa * x, wb * y) + 0.05 * (wa * x + wb * y))
    front = Front([(1.0, 500.0), (2.0, 450.0), (2.1, 400.0), (3.0, 399.0)])
    chosen, notes = Gptailor(pick="base", designs=0, final="normalised").study(Space(4), front, front, ctx)
    assert notes[0] == "layers gone: 2"
    front = Front([(2.0, 2.0), (1.0, 3.0)])  # of equals the first
    assert (
        Gptailor(pick="base", designs=0, objectives="mean").study(Space(3), front, front, ctx)[1][0] == "layers gone: 0"
    )
    assert front.scalars == [None, None]
    front = Front(values)
    front.objectives = ("a nll",)
    Gptailor(pick="base", designs=0).study(Space(3), front, front, ctx)
    assert front.scalars == [None] * 3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A base of four layers and an expert of it."""
    base = tiny.checkpoint(tmp_path_factory.mktemp("small") / "base", num_hidden_layers=4)
    return base, tiny.expert_of(base, 1, scale=0.05)


def searched(method, folders, place, **search):
    base, *experts = (Checkpoint.open(path) for path in folders)
    text = tiny.text_data(train=2, test=0)
    spec = SearchSpec.of({"items": 2, **search})
    return run_study(method, base, experts, [text], spec, Context(step="test"), place, threads=1)


def every_candidate(folders):
    """The loss of each of the 4 * 8 models by transformers alone, by their layers."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in folders]
    rows = [encode(item, tiny.tokenizer()) for item in tiny.text_data(train=2, test=0).train]
    found = {}
    for gone, bits in itertools.product(range(4), itertools.product((0, 1), repeat=3)):
        kept = [layer for layer in range(4) if layer != gone]
        cut = copy.deepcopy(models[0])
        cut.model.layers = torch.nn.ModuleList(
            copy.deepcopy(models[bit].model.layers[k]) for bit, k in zip(bits, kept, strict=True)
        )
        total = 0.0
        for row in rows:
            with torch.no_grad():
                total += cut(**collate([row], 0, multiple=1), use_cache=False).loss.item() * row.count
        names = [f"{'0' if bit else 'base'}.{k}" for bit, k in zip(bits, kept, strict=True)]
        found[tuple(names)] = total / sum(row.count for row in rows)
    return found


def test_the_search_finds_what_trying_everything_finds(small, tmp_path):
    every = every_candidate(small)
    table, chosen = searched(Gptailor(layers=1, designs=4), small, tmp_path, trials=60)
    rows = [row for row in table.dicts() if row["candidate"]]
    assert len(rows) == 60
    for row in rows:
        layers = tuple(json.loads(row["candidate"])["set"]["layers"])
        assert row["text nll"] == pytest.approx(every[layers], rel=1e-4)
    assert tuple(chosen.layers) == min(every, key=lambda one: every[one])
    assert any("from base-expert1: " in note for note in table.notes) == any(n[0] == "0" for n in chosen.layers)
    assert len(every) == 32 and f"layers gone: {6 - sum(int(n[-1]) for n in chosen.layers)}" in table.notes


def test_dumb_control_proposes_other_trials(small, tmp_path):
    tables = [
        searched(Gptailor(layers=1, designs=2, sampler=s), small, tmp_path / s, trials=14)[0] for s in ("tpe", "random")
    ]
    tpe, dumb = ([row["candidate"] for row in t.dicts()] for t in tables)
    assert tpe[:3] == dumb[:3] and tpe != dumb  # the base and the designs are the same


def test_killed_and_begun_again(tmp_path):
    """Two objectives, halving, several kills: the trials are those of one run."""
    method = Gptailor(layers=2, designs=3)

    def plain_(table):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in table.dicts()]

    whole, chosen = study(method, tmp_path / "whole", trials=16)
    left = [5, 4, 3]

    def breaks(event):
        if event["kind"] == "trial" and left:
            left[0] -= 1
            if not left[0]:
                left.pop(0)
                raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            study(method, tmp_path / "killed", trials=16, watch=breaks)
    again, same = study(method, tmp_path / "killed", trials=16, watch=breaks)
    assert (plain_(again), same) == (plain_(whole), chosen)
    assert {row["state"] for row in whole.dicts()} == {"whole", "stopped"}
    counts = {len(json.loads(r["candidate"])["set"]["layers"]) for r in whole.dicts() if r["candidate"]}
    assert counts == {LAYERS - 2}


def test_what_cannot_be(small, tmp_path):
    with pytest.raises(LuthierError, match="6 layers cannot go from 6.*let 5 go at most"), fresh() as place:
        study(Gptailor(layers=6), place)
    other = tiny.checkpoint(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(LuthierError, match="expert 0 has 3 layers, the base 4.*name variants of the base"):
        searched(Gptailor(), (small[0], other), tmp_path, trials=1)
