"""Evolve: both encodings by hand, a chain hop by hop, CMA-ES beside its package, a planted optimum, a killed search.

No numbers of a peer: the paper's own code evaluates finished models and has no search in it, and mergekit-evolve
encodes otherwise (weights by absolute value, no data flow).
"""

import copy
import json
import os
import signal
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import pytest
import torch
from torch import nn

from luthier.checkpoint.reader import Checkpoint
from luthier.engine.compose import composed, held, model_of
from luthier.engine.pieces import Memory
from luthier.engine.search import Trials, text_of
from luthier.engine.spec import SearchSpec
from luthier.engine.study import run_study
from luthier.errors import LuthierError
from luthier.fields import Range
from luthier.flows import Space, Table
from luthier.kit.context import Context
from luthier.kit.schedule import at
from luthier.merge.dare import Dare
from luthier.merge.evolve import Evolve
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.shapes import Transform
from luthier.testing import tiny
from luthier.testing.study import UNLIKE, folders, models, sources

PAIR = Space(4, (4, 4))


class Given:
    """Both doors of a Study, with proposals whose numbers are given by name; others are the middle of their range."""

    def __init__(self, *sets, judge=lambda candidate: (0.0,)):
        self.sets, self.judge, self.asked, self.finished = sets, judge, [], []

    def proposals(self, sampler, size=None, population=None):
        self.sampler, self.size, self.population = sampler, size, population
        for ordinal, values in enumerate(self.sets):
            self.asked = []

            def share(name, low, high, values=values):
                self.asked.append((name, low, high))
                return values.get(name, (low + high) / 2)

            yield SimpleNamespace(ordinal=ordinal, share=share)

    def __call__(self, candidate, proposal=None):
        ordinal = -1 if proposal is None else proposal.ordinal
        found = self.judge(candidate)
        self.finished.append(SimpleNamespace(values=found, ordinal=ordinal, candidate=text_of(candidate)))
        return found

    def table(self, chosen, notes=()):
        self.chosen = chosen
        return Table(("chosen",), ((True,),), tuple(notes))


def made(method, space, values, **more):
    """The candidate of these numbers, and the doors."""
    doors = Given(values, **more)
    table = method.study(space, doors, doors, Context())
    assert json.loads(doors.finished[-1].candidate) == doors.chosen.to_dict()
    return doors.chosen, doors, table


def test_defaults_are_the_published_ones():
    assert Evolve().to_dict()["set"] == {
        "space": "parameters", "merge": Dare(vote="majority").to_dict(), "groups": 0, "repeats": 3, "scales": "pairs",
        "ranges": {"weights": [0.0, 1.0], "densities": [0.0, 1.0]}, "span": 0.5, "start": 2.0, "others": 0.0,
        "population": None, "by": "cmaes",
    }  # fmt: skip
    assert Evolve(population=4, span=0.99, groups=0).replace(span=0.0).span == 0.0


# the space of parameters


def test_a_number_for_each_expert_and_field():
    values = {"weights of 0, everywhere": 0.25, "weights of 1, everywhere": 0.5,
              "densities of 0, everywhere": 0.125, "densities of 1, everywhere": 0.75}  # fmt: skip
    chosen, doors, table = made(Evolve(), PAIR, values)
    assert chosen == Dare(vote="majority", weights=(0.25, 0.5), densities=(0.125, 0.75))
    assert doors.asked == [(name, 0.0, 1.0) for name in values]
    assert (doors.sampler, doors.size, doors.population) == ("cmaes", 4, None)
    assert table.notes[1:] == ("weights of expert 0: 0.25", "weights of expert 1: 0.5",
                               "densities of expert 0: 0.125", "densities of expert 1: 0.75")  # fmt: skip
    assert table.notes[0] == "4 numbers evolved"


def test_groups_of_layers_and_what_lies_outside_have_their_own():
    places = ["embeddings", "group 0", "group 1", "head"]
    values = {f"weights of 0, {place}": number for place, number in zip(places, (0.1, 0.2, 0.3, 0.4), strict=True)}
    method = Evolve(ranges={"weights": (-0.5, 1.5)}, groups=2, population=6)
    chosen, doors, table = made(method, PAIR, values)
    assert [n for n, *_ in doors.asked] == [f"weights of {e}, {place}" for e in (0, 1) for place in places]
    assert {bounds for _, *bounds in map(tuple, doors.asked) for bounds in [tuple(bounds)]} == {(-0.5, 1.5)}
    assert (doors.size, doors.population) == (8, 6)
    read = {name: at(chosen.weights[0], name, depth) for name, depth in {
        "model.embed_tokens.weight": None, "model.layers.0.mlp.up_proj.weight": 0.0,
        "model.layers.1.self_attn.q_proj.weight": 1 / 3, "model.layers.2.input_layernorm.weight": 2 / 3,
        "model.layers.3.mlp.down_proj.weight": 1.0, "model.norm.weight": None, "lm_head.weight": None,
    }.items()}  # fmt: skip
    assert list(read.values()) == pytest.approx([0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4], abs=1e-12)
    assert at(chosen.weights[1], "transformer.h.3.attn.c_attn.weight", 1.0) == 0.5
    assert table.notes[1:] == (
        "numbers: embeddings | layers 0 to 1 | layers 2 to 3 | what comes after the layers",
        "weights of expert 0: 0.1 | 0.2 | 0.3 | 0.4", "weights of expert 1: 0.5 | 0.5 | 0.5 | 0.5",
    )  # fmt: skip


def test_seven_layers_in_three_groups():
    values = {f"weights of 0, group {g}": g / 10 for g in range(3)}
    chosen, _, table = made(Evolve(ranges={"weights": (0, 1)}, groups=3), Space(7, (7,)), values)
    layered = [at(chosen.weights[0], f"model.layers.{i}.mlp.up_proj.weight", i / 6) for i in range(7)]
    assert layered == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2], abs=1e-12)
    assert "layers 0 to 2 | layers 3 to 4 | layers 5 to 6" in table.notes[1]
    assert table.notes[2].endswith(": 0.5 | 0 | 0.1 | 0.2 | 0.5")


def test_fields_of_all_forms():
    method = Evolve(merge="merge.ties", ranges={"scale": (0.5, 2.0), "densities": (0.1, 0.9), "density": (0.3, 0.3)})
    chosen, doors, _ = made(method, PAIR, {"scale, everywhere": 1.25, "densities of 1, everywhere": 0.5})
    assert chosen == method.merge.replace(scale=1.25, densities=(0.5, 0.5), density=0.3)
    assert doors.asked == [("scale, everywhere", 0.5, 2.0), ("densities of 0, everywhere", 0.1, 0.9),
                           ("densities of 1, everywhere", 0.1, 0.9)]  # fmt: skip


class Plain(Transform):
    """Numbers that cannot vary by place."""

    strength: Annotated[float, Range(0.0)] = 1.0
    parts: tuple[float, ...] | None = None

    def transform(self, tensors, ctx):
        return tensors.base


def test_numbers_that_cannot_vary_are_the_same_everywhere():
    method = Evolve(merge=Plain(), ranges={"strength": (0, 2), "parts": (-1, 1)}, groups=2)
    names = ["strength, everywhere", "parts of 0, everywhere", "parts of 1, everywhere"]
    assert [tuple(n) for n in method._numbers(PAIR)] == [(names[0], 0, 2), (names[1], -1, 1), (names[2], -1, 1)]
    made = method._candidate(PAIR, dict(zip(names, (0.5, -0.25, 0.75), strict=True)))
    assert made == Plain(strength=0.5, parts=(-0.25, 0.75))
    assert method._told(PAIR, made)[1:] == ["strength: 0.5", "parts of expert 0: -0.25", "parts of expert 1: 0.75"]


def test_nothing_to_evolve_is_one_candidate():
    method = Evolve(merge="merge.task_arithmetic", ranges={"weights": (0.5, 0.5)})
    chosen, doors, table = made(method, PAIR, {})
    assert chosen == TaskArithmetic(weights=(0.5, 0.5))
    assert [d.ordinal for d in doors.finished] == [-1] and method.least(4) == 1 and Evolve().least(4) == 0
    assert Evolve(ranges={"weights": (0.5, 0.5)}, space="flow").least(4) == 0
    assert Evolve(ranges={"weights": (0, 1), "densities": (0.5, 0.5)}).least(4) == 0
    assert table.notes == ("weights of expert 0: 0.5", "weights of expert 1: 0.5")


def test_the_lowest_mean_of_the_objectives_is_chosen():
    name = "weights of 0, everywhere"
    method = Evolve(merge="merge.task_arithmetic", ranges={"weights": (0.0, 1.0)})
    worth = {0.2: (1.0, 1.25), 0.1: (0.0, 3.0), 0.3: (2.0, 0.5), 0.4: (1.5, 1.0)}
    doors = Given(*({name: v} for v in worth), judge=lambda c: worth[c.weights[0]])
    method.study(Space(2, (2,)), doors, doors, Context())
    assert doors.chosen.weights == (0.2,)


# the space of data flow


def test_slots_indicators_and_pairs_by_hand():
    """A base of three layers (0, 1, 2 among all) and an expert of two (3, 4), laid out twice; the path is A0 (fixed),
    A1 and B1 of the first round, B0 of the second, A2 (fixed)."""
    values = {"base.1, round 0": 0.01, "0.0, round 0": 0.0, "0.1, round 0": 2.0, "base.0, round 1": -0.5,
              "base.1, round 1": -1e-9, "base.2, round 1": -3.0, "0.0, round 1": 1.0, "0.1, round 1": -1.0,
              "from 0 to 1": 0.5, "from 1 to 4": 1.25, "from 4 to 3": 0.8, "from 3 to 2": 1.5}  # fmt: skip
    chosen, doors, table = made(Evolve(space="flow", repeats=2), Space(3, (2,)), values)
    assert list(chosen.layers) == ["base.0", "base.1", "0.1", "0.0", "base.2"]
    assert list(chosen.gains) == pytest.approx([1, 2, 2 / 1.25, 2, 2 / 1.5])
    slots, scales = doors.asked[:8], doors.asked[8:]
    assert slots == [(f"{word}, round {r}", *((-1.0, 5.0) if (word, r) == ("base.1", 0) else (-3.0, 3.0)))
                     for r, words in enumerate((["base.1", "0.0", "0.1"], ["base.0", "base.1", "base.2", "0.0", "0.1"]))
                     for word in words]  # fmt: skip
    assert scales == [(f"from {i} to {j}", 0.5, 1.5) for i in range(5) for j in range(5)]
    assert doors.size == 8 + 25
    assert table.notes[1] == "path: base.0, x0.50 base.1, x1.25 0.1, x0.80 0.0, x1.50 base.2"


def test_scales_by_slot():
    """A repeated layer has one scale in each round, the last layer its own."""
    method = Evolve(space="flow", repeats=2, scales="slots", span=0.25, start=0.5, others=-1.0)
    values = {"base.0, round 1": 1.0, "base.1, round 1": -1.0, "to base.0, round 1": 0.8, "to base.1, round 0": 1.25}
    chosen, doors, _ = made(method, Space(2), values)
    assert list(chosen.layers) == ["base.0", "base.0", "base.1"]
    assert list(chosen.gains) == pytest.approx([1, 1.25, 1])
    assert doors.asked == [
        ("base.0, round 1", -4.0, 2.0), ("base.1, round 1", -4.0, 2.0), ("to base.0, round 1", 0.75, 1.25),
        ("to base.1, round 1", 0.75, 1.25), ("to base.1, round 0", 0.75, 1.25),
    ]  # fmt: skip


def test_without_scales_there_are_no_gains():
    method = Evolve(space="flow", repeats=1, scales="none", start=0.5)
    chosen, doors, table = made(method, Space(3, (3,)), {"base.1, round 0": -0.5, "0.0, round 0": 1.0})
    assert list(chosen.layers) == ["base.0", "0.0", "base.2"] and chosen.gains is None
    assert [low for _, low, _ in doors.asked] == [-2.5, -3.0, -3.0, -3.0]
    assert table.notes[1] == "path: base.0, 0.0, base.2"
    still, doors, _ = made(Evolve(space="flow", repeats=1, span=0.0), Space(3, (3,)), {})
    assert still.gains is None and doors.size == 4


def test_the_chain_hop_by_hop():
    """The stock model computes what layers of two models compute when each reads the stream times its scale."""
    base, expert = (
        tiny.llama(0, num_hidden_layers=3, rms_norm_eps=1e-14),
        tiny.llama(5, num_hidden_layers=3, rms_norm_eps=1e-14),
    )
    values = {"base.1, round 0": 1.0, "0.0, round 0": -1.0, "0.1, round 0": 1.0, "0.2, round 0": 1.0,
              "from 0 to 1": 0.6, "from 1 to 4": 1.4, "from 4 to 5": 0.7, "from 5 to 2": 1.3}  # fmt: skip
    chosen, _, _ = made(Evolve(space="flow", repeats=1), Space(3, (3,)), values)

    class Hop(nn.Module):
        def __init__(self, layer, scale):
            super().__init__()
            self.layer, self.scale = layer, scale

        def forward(self, hidden, *args, **kwargs):
            return self.layer(hidden * self.scale, *args, **kwargs)

    hops = [(base, 0, 1.0), (base, 1, 0.6), (expert, 1, 1.4), (expert, 2, 0.7), (base, 2, 1.3)]
    chain = copy.deepcopy(base)
    chain.model.layers = nn.ModuleList(Hop(model.model.layers[layer], scale) for model, layer, scale in hops)
    chain.config.num_hidden_layers = len(hops)
    memory = [Memory(dict(m.state_dict()), m.config.to_dict()) for m in (base, expert)]
    stock = model_of(*composed(chosen, memory[0], memory[1:], Context(), 1), torch.device("cpu"))
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        wanted, found = (m(input_ids=ids, use_cache=False).logits for m in (chain, stock))
        plain = base(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, wanted, atol=2e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


# the search


def test_evolves_as_the_cmaes_package_does(tmp_path):
    """Two generations and a half of the package, driven by hand, on a bowl around weights of 0.3 and 0.9."""
    from cmaes import CMA

    ctx, method = Context(seed=3, step="bowl"), Evolve(merge="merge.task_arithmetic", ranges={"weights": (-1.0, 3.0)})

    def bowl(weights):
        return (weights[0] - 0.3) ** 2 + 4 * (weights[1] - 0.9) ** 2

    trials, seen = Trials(tmp_path / "log", "bowl", "me"), []

    class Doors:
        def proposals(self, sampler, size=None, population=None):
            return trials.proposals(15, sampler, ctx, size=size, population=population)

        def __call__(self, candidate, proposal=None):
            seen.append(candidate.weights)
            return proposal.tell(text_of(candidate), {1: (bowl(candidate.weights),)}, False, 0.0, 1).values

        @property
        def finished(self):
            return trials.finished()

        def table(self, chosen, notes=()):
            self.chosen = chosen
            return Table((), ())

    doors = Doors()
    method.study(Space(2, (2, 2)), doors, doors, ctx)
    twin, told, wanted = CMA(mean=np.array([0.5, 0.5]), sigma=1 / 6, bounds=np.array([[0.0, 1.0]] * 2), seed=9), [], []
    assert twin.population_size == 4 + int(3 * np.log(2)) == 6
    for ordinal in range(15):
        twin.reseed_rng(ctx.key("trial", ordinal) % 2**31)
        place = twin.ask()
        wanted.append(tuple((-1 + 4 * place).tolist()))
        told.append((place, bowl(wanted[-1])))
        if len(told) == 6:
            twin.tell(told)
            told = []
    assert np.allclose(seen, wanted, rtol=0, atol=1e-12)
    assert doors.chosen.weights == min(seen, key=bowl)


def test_a_planted_optimum_is_found(tmp_path):
    """Of two experts one was trained on the items, the other is noise: the weight of the first goes up, the other's
    down. Random draws stay in the ranges, too."""
    folders_, items = _trained(tmp_path)
    base, *experts = (Checkpoint.open(folder) for folder in folders_)
    chosen = {}
    for by, trials in (("cmaes", 30), ("random", 6)):
        method = Evolve(merge="merge.task_arithmetic", ranges={"weights": (0.0, 1.0)}, by=by)
        spec = SearchSpec(trials=trials, items=6)
        table, chosen[by] = run_study(method, base, experts, [items], spec, Context(seed=1), tmp_path / by, threads=1)
        assert table.where(chosen=True)[0]["text nll"] == min(row["text nll"] for row in table.dicts()[1:])
    weights = chosen["cmaes"].weights
    assert weights[0] > 0.85 and weights[1] < 0.15
    assert all(0 <= w <= 1 for w in chosen["random"].weights) and chosen["random"] != chosen["cmaes"]


def _trained(place):
    """Folders of a base, of the base trained on eight items, and of the base with noise; the items."""
    items = tiny.text_data(train=8)
    base = tiny.checkpoint(place / "base")
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    words = [torch.tensor([tiny.tokenizer()(item.text)["input_ids"]]) for item in items.train]
    for step in range(60):
        loss = sum(model(input_ids=w, labels=w, use_cache=False).loss for w in words[step % 2 :: 2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [base, tiny.save(model.eval(), place / "expert"), tiny.expert_of(base, 2, place / "noise", 0.05)], items


@pytest.mark.parametrize("space", ["parameters", "flow"])
def test_a_killed_search_goes_on_as_if_nothing_had_been(space, tmp_path):
    method = Evolve(space=space, repeats=1, scales="slots", population=4)
    folders()

    def search(folder, watch=None):
        base, experts = models()
        spec = SearchSpec(trials=8, items=3)
        return run_study(method, base, experts, sources(), spec, Context(seed=2, watch=watch), folder, threads=1)

    def dies(event):
        seen.append(event["kind"])
        if seen.count("trial") == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    whole, chosen = search(tmp_path / "whole")
    seen = []
    child = os.fork()
    if not child:
        search(tmp_path / "killed", dies)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    again, taken = search(tmp_path / "killed")
    assert len(whole.rows) == 9 and taken == chosen
    assert _plain(again) == _plain(whole)
    made = [composed(c, *_held(), Context(step="x"), 1)[0] for c in (chosen, taken)]
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def _plain(table):
    return [{k: v for k, v in row.items() if k not in UNLIKE} for row in table.dicts()]


def _held():
    base, experts = models()
    return held(base, torch.float32), [held(e, torch.float32) for e in experts]


# what is refused


@pytest.mark.parametrize(("fields", "says"), [
    ({"ranges": {"weigths": (0, 1)}}, "'weights'"),
    ({"ranges": {}}, "names no field"),
    ({"ranges": {"weights": (1, 0)}}, "merge.evolve.ranges.weights: 1.0 is above 0.0"),
    ({"ranges": {"densities": (0, 1.5)}}, "merge.evolve.ranges.densities: merge.dare takes no 1.5 there"),
    ({"ranges": {"densities": (-0.5, 1)}}, "takes no -0.5"),
    ({"ranges": {"normalize": (0, 1)}}, "merge.dare takes no 0.0 there; see luthier show merge.dare"),
    ({"merge": "merge.fisher", "ranges": {"weights": (0, 1)}}, "merge.fisher looks at models with data"),
    ({"merge": "merge.ties", "groups": 2}, "set scope: tensor"),
    ({"population": 3}, "population"), ({"span": 1.0}, "span"), ({"repeats": 0}, "repeats"),
])  # fmt: skip
def test_refused_at_once(fields, says):
    with pytest.raises(LuthierError) as fault:
        Evolve(**fields)
    assert says in str(fault.value) and "\n" not in str(fault.value)


def test_refused_for_these_models():
    with pytest.raises(LuthierError, match="5 groups of 4 layers; ask for 4 at most"):
        Evolve(groups=5).fits(PAIR)
    Evolve(groups=4).fits(PAIR)
    with pytest.raises(LuthierError, match="the base has one layer"):
        Evolve(space="flow").fits(Space(1, (4,)))
    Evolve(space="flow", groups=5).fits(Space(2, (1,)))
