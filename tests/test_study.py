"""Studies as steps of a recipe: trials in the ledger, killed ones go on, and what cannot work is said beforehand."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

import luthier
from dying import die, ended, fork
from luthier import catalogue, recipe, report
from luthier.checkpoint.reader import Checkpoint
from luthier.claims import _seeds
from luthier.claims._seeds import source as claims_source
from luthier.cli import main
from luthier.compress.drop import Drop
from luthier.engine.compose import composed, held, model_of
from luthier.engine.finished import BROKEN
from luthier.engine.spec import SearchSpec
from luthier.engine.study import Evaluator
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.genome import stitched
from luthier.ledger import Ledger
from luthier.recipe_inputs import Inputs, sources
from luthier.recipe_plan import plan
from luthier.testing import tiny

LAYERS = 5


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    base = tiny.checkpoint(folder / "base", num_hidden_layers=LAYERS)
    tiny.expert_of(base, 1, folder / "expert", scale=0.05)
    lines = "".join(f"the {i} quick brown foxes jump over {7 * i} lazy dogs\n" for i in range(60))
    (folder / "book.txt").write_text(lines)
    return folder


def a_recipe(home, search=None, **fields):
    split = {"by": "window", "test": 0.2}
    step = {
        "use": "compress.drop",
        "base": str(home / "base"),
        "data": "book",
        "set": {"layers": 2, "by": "loss"} | fields,
    }
    return {
        "luthier": 1,
        "data": {"book": {"source": f"text:{home}/book.txt", "split": split, "set": {"chars": 60}}},
        "steps": {
            "short": step | {"search": {"items": 3} if search is None else search},
            "table": {"use": "eval.perplexity", "models": [str(home / "base"), "short"], "data": "book"},
        },
    }  # fmt: skip


def judged(event):
    return event["kind"] == "trial" and event["here"]


def rows(run, step="short"):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run.table(step).dicts()]


@pytest.fixture(scope="module")
def first(home):
    events = []
    return luthier.run(a_recipe(home), folder=home / "run", watch=events.append), events


def test_a_study_leaves_a_model_and_its_trials(home, first):
    from transformers import AutoModelForCausalLM

    run, events = first
    record = run.records["short"]
    assert record.artefacts == {"model": "steps/short", "table": "steps/short/table.json"}
    model = AutoModelForCausalLM.from_pretrained(run.path("short"))
    assert model.config.num_hidden_layers == LAYERS - 2
    assert record.metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert len([e for e in events if e["kind"] == "trial"]) == record.metrics["trials"] == 1 + 3 + 2
    chosen = [row for row in rows(run) if row["chosen"]]
    assert json.loads(chosen[0]["candidate"]) == json.loads(record.metrics["candidate"])
    assert "layers [" in record.notes[0]
    assert {row["model"] for row in run.table("table").dicts()} == {str(home / "base"), "short"}
    assert not list((run.folder / "work").glob("*"))


def test_layers_of_one_number_are_not_compared_where_some_went(first):
    text = report.build(first[0].folder).read_text()
    assert "Search: short" in text and "Where the changes lie" not in text


def test_every_trial_is_in_the_ledger(first):
    run, _ = first
    trials = [r for r in Ledger(run.folder).records() if r.status == "trial"]
    assert [r.step for r in trials] == [f"short#{i}" for i in range(6)]
    for record, row in zip(trials, run.table("short").dicts(), strict=True):
        assert record.metrics["book nll"] == row["book nll"] and record.hash == run.records["short"].hash
        assert record.config == json.loads(row["candidate"] or "{}")
    assert set(Ledger(run.folder).latest()) == {"short", "table"}


def test_a_killed_study_goes_on_to_the_same_result(home, first, tmp_path):
    for after in (1, 4):
        seen = []

        def dies(event, seen=seen, after=after):
            seen.append(event["kind"])
            if seen.count("trial") == after:
                die()

        place = tmp_path / str(after)
        assert ended(fork(lambda d=dies, p=place: luthier.run(a_recipe(home), folder=p, watch=d))) == -9
        seen = []
        run = luthier.run(a_recipe(home), folder=place, watch=seen.append)
        assert rows(run) == rows(first[0])
        assert len([e for e in seen if judged(e)]) == 6 - after  # what was judged is not judged again
        trials = [r.step for r in Ledger(run.folder).records() if r.status == "trial"]
        assert sorted(trials) == [f"short#{i}" for i in range(6)]  # nor told twice
        mine, whole = (load_file(r.path("short") / "model.safetensors") for r in (run, first[0]))
        assert all(torch.equal(mine[name], whole[name]) for name in whole)


def test_a_done_study_is_kept_and_a_longer_one_is_not(home, first):
    again = luthier.run(a_recipe(home), folder=first[0].folder)
    assert again.kept == ("short", "table")
    planned = recipe.load(a_recipe(home, {"items": 4}))
    assert planned.steps["short"].search.items == 4


def test_a_trial_that_was_judged_before_the_ledger_heard_of_it_is_told_later(home, first, tmp_path, monkeypatch):
    """Killed between the storage and the ledger."""
    tell = Evaluator._tell

    def dies(self, done, here):
        if done.number == 3:
            die()
        tell(self, done, here)

    monkeypatch.setattr(Evaluator, "_tell", dies)
    assert ended(fork(lambda: luthier.run(a_recipe(home), folder=tmp_path / "run"))) == -9
    monkeypatch.setattr(Evaluator, "_tell", tell)
    run = luthier.run(a_recipe(home), folder=tmp_path / "run")
    trials = [r.step for r in Ledger(run.folder).records() if r.status == "trial"]
    assert sorted(trials) == [f"short#{i}" for i in range(6)] and rows(run) == rows(first[0])


def test_searches_of_one_recipe_judge_by_the_same_items(home, tmp_path):
    made = a_recipe(home)
    made["steps"]["other"] = json.loads(json.dumps(made["steps"]["short"]))
    run = luthier.run(made, folder=tmp_path / "run")
    assert rows(run, "other") == rows(run, "short")


def test_what_another_process_has_judged_meanwhile_is_not_judged_again(home, tmp_path, monkeypatch):
    """The other one begins after this one has looked at the storage, and is through before it judges anything."""
    address = f"journal:{tmp_path / 'trials.log'}"
    step = a_recipe(home, {"items": 3, "storage": address})
    events, study = [], Drop.study

    def late(self, *args):
        monkeypatch.setattr(Drop, "study", study)
        luthier.run(step, folder=tmp_path / "other")
        return study(self, *args)

    monkeypatch.setattr(Drop, "study", late)
    run = luthier.run(step, folder=tmp_path / "run", watch=events.append)
    assert len([e for e in events if judged(e)]) == 1  # the base's own
    assert len(rows(run)) == 6


def test_a_candidate_that_cannot_be_built_counts_as_the_worst(home, tmp_path, monkeypatch):
    """It is said once; the search goes on. Where nothing could be built before, it ends."""
    monkeypatch.setattr(Drop, "study", drops)
    events = []
    run = luthier.run(a_recipe(home, {"items": 3, "trials": 3}), folder=tmp_path / "run", watch=events.append)
    trials = rows(run)[1:]
    assert [[v == BROKEN for k, v in row.items() if k.endswith("nll")] for row in trials] == [[False], [True], [False]]
    (said,) = [e["text"] for e in events if e["kind"] == "log" and "cannot be built" in e["text"]]
    assert said.startswith("trial 1 cannot be built (") and said.endswith("; it counts as the worst")
    monkeypatch.setattr("test_study.ORDER", (9, 0, 1))
    with pytest.raises(LuthierError, match="9"):
        luthier.run(a_recipe(home, {"items": 3, "trials": 3}), folder=tmp_path / "other")


ORDER = (0, 9, 1)


def drops(self, space, evaluate, budget, ctx):
    """A stand-in for a method: the first layer goes, then one that is not there, then the second."""
    made = []
    for proposal in budget.proposals("random", size=1):
        proposal.share("nothing")
        gone = ORDER[proposal.ordinal]
        kept = [f"base.{i}" for i in range(LAYERS) if i != gone] if gone < LAYERS else [f"base.{gone}"]
        made.append((evaluate(catalogue.load("compress.stitch", layers=kept), proposal), kept))
    best = min(made)[1]
    return evaluate.table(catalogue.load("compress.stitch", layers=best))


def test_another_source_of_the_candidates_is_another_step(home, monkeypatch):
    """What carries candidates out is part of what a search rests on."""
    step = recipe.load(a_recipe(home)).steps["short"]
    assert set(sources(step)) >= {"compress.drop", "compress.stitch", "eval.perplexity"}
    before, known = claims_source("compress.drop"), catalogue.source_hash
    changed = lambda id_: known(id_) + "x" * (id_ == "compress.stitch")
    monkeypatch.setattr(_seeds, "source_hash", changed)
    assert claims_source("compress.drop") != before


def test_a_shared_storage_is_asked_first(home, tmp_path, first):
    address = f"journal:{tmp_path / 'trials.log'}"
    seen = []
    for place in ("a", "b"):
        events = []
        run = luthier.run(a_recipe(home, {"items": 3, "storage": address}), folder=tmp_path / place,
                          watch=events.append)  # fmt: skip
        seen.append(len([e for e in events if judged(e)]))
        assert rows(run) == rows(first[0])
        assert len([r for r in Ledger(run.folder).records() if r.status == "trial"]) == 6
    assert seen == [6, 0]
    assert "storage" not in run.records["short"].config["search"]


def test_python(home, tmp_path):
    given = {"base": home / "base", "data": [{"source": f"text:{home}/book.txt", "split": {"test": 0.2}}]}
    made = Drop(layers=1).apply(**given, search={"items": 2})
    assert made.table.columns[:3] == ("trial", "state", "items") and made.chosen.id == "compress.stitch"
    out = made.save(tmp_path / "out")
    assert Checkpoint.open(out).config["num_hidden_layers"] == LAYERS - 1
    with pytest.raises(LuthierError, match="did you mean 'items'"):
        Drop(layers=1).apply(**given, search={"item": 2})


def planned(raw):
    made = recipe.load(raw)
    inputs = Inputs(made, None, lambda event: None)
    inputs.open()
    return plan(made, inputs)


def test_plan_counts_what_is_looked_at(home):
    found = []
    for fields, search in (({"by": "influence"}, {"items": 3}), ({}, {"items": 3}), ({}, {"items": 12})):
        found.append(planned(a_recipe(home, {**search, "trials": 1}, **fields)).steps[0])
    assert found[0].flops < found[1].flops < found[2].flops
    assert all(step.gives == "model" and step.disk > 0 for step in found)


def test_plan_knows_the_size_of_what_is_left(home, first):
    """As large as the model that the search made, and every step after it counts with that."""
    raw = a_recipe(home)
    raw["steps"]["table"]["models"] = ["short"]
    made = planned(raw)
    assert made.steps[0].params == made.steps[1].params == first[0].records["short"].metrics["parameters"]
    weights = first[0].path("short") / "model.safetensors"
    assert made.steps[0].disk == sum(t.nbytes for t in load_file(weights).values())


@pytest.mark.parametrize(("use", "fields", "says"), [
    ("compress.drop", {"layers": 4, "by": "loss"}, "4 layers cannot go from 5; drop 3 at most"),
    ("compress.laco", {"layers": 5}, "5 layers cannot go from 5; let 4 go at most"),
    ("compress.gptailor", {"layers": 5}, "5 layers cannot go from 5; let 4 go at most"),
    ("merge.evolve", {"groups": 6}, "6 groups of 5 layers; ask for 5 at most"),
    ("merge.map", {"preference": [1, 1]}, "has 2 weights for 1 objectives; weigh book nll"),
])  # fmt: skip
def test_plan_knows_what_does_not_fit_the_models(home, use, fields, says):
    raw = a_recipe(home)
    step = raw["steps"]["short"] | {"use": use, "set": fields}
    raw["steps"]["short"] = step | ({"experts": [str(home / "expert")]} if use.startswith("merge.") else {})
    (problem,) = planned(raw).problems
    assert "step short" in problem and says in problem


def test_plan_names_what_is_measured(home):
    """The objectives, as the search itself finds them: answers only where there are any."""
    spec = SearchSpec(measures=("eval.perplexity", "eval.accuracy"))
    text, task = (types.SimpleNamespace(name=name, scored=name == "task") for name in ("text", "task"))
    assert spec.objectives([text, task]) == ("text nll", "task nll", "task accuracy")
    assert SearchSpec(measures=("eval.accuracy",)).objectives([task]) == ("task accuracy",)


@pytest.mark.parametrize(("changes", "says"), [
    ({"search": {"trails": 3}}, "unknown search key 'trails'.*did you mean 'trials'"),
    ({"search": {"trials": 0}}, "search.trials"),
    ({"search": {"measures": []}}, "names no measure"),
    ({"search": {"measures": ["tune.full"]}}, "expected a method of shape Measure"),
    ({"search": {"measures": ["eval.compare"]}}, "eval.compare gives no value for each item; take eval.perplexity or"),
    ({"search": {"measures": ["eval.perplexity", "probe.depth"]}}, "probe.depth gives no value for each item"),
    ({"search": {"storage": "foo.db"}}, "'foo.db' is no storage; write journal:PATH or an SQL address"),
    ({"items": 4}, "'items' belongs under search"),
    ({"train": {"steps": 3}}, "does not train"),
    ({"experts": ["a"]}, "experts"),
])  # fmt: skip
def test_errors_before_anything_starts(home, changes, says):
    raw = a_recipe(home)
    raw["steps"]["short"] |= changes
    with pytest.raises(LuthierError, match=says):
        recipe.load(raw)


def test_errors_of_a_run_are_one_line(home, tmp_path):
    with pytest.raises(LuthierError, match="4 layers cannot go from 5.*drop 3 at most"):
        luthier.run(a_recipe(home, layers=4), folder=tmp_path / "a")
    with pytest.raises(LuthierError, match="is no storage.*journal:PATH"):
        luthier.run(a_recipe(home, {"storage": "trials.db"}), folder=tmp_path / "b")
    raw = a_recipe(home)
    raw["data"]["book"]["split"] = {"by": "window", "test": 4, "train": 0}
    with pytest.raises(LuthierError, match="no training items"):
        luthier.run(raw, folder=tmp_path / "c")
    assert not (tmp_path / "a" / "steps" / "short").exists()


def test_without_optuna(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(LuthierError, match=r"a search needs optuna.*pip install 'luthier\[search\]'"):
        luthier.run(a_recipe(home), folder=tmp_path)


def test_show_tells_of_search(capsys):
    main(["show", "compress.drop"])
    told = capsys.readouterr().out
    assert "search: {items: 32}" in told and "data: [...]" in told


def test_a_candidate_shares_what_it_does_not_change(home):
    base = held(Checkpoint.open(home / "base"), torch.float32)
    expert = held(Checkpoint.open(home / "expert"), torch.float32)
    candidate = stitched(["base.3", {"base.1": 0.5, "0.1": 0.5}])
    tensors, config = composed(candidate, base, [expert], Context(), 1)
    name, mixed = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    whole = base.read_flat("model.layers.3.mlp.up_proj.weight", 0, tensors[name].numel())
    assert tensors[name].data_ptr() == whole.data_ptr()
    halves = [m.read_flat(mixed, 0, tensors[mixed].numel()).view(tensors[mixed].shape) for m in (base, expert)]
    assert torch.equal(tensors[mixed], halves[0] * 0.5 + halves[1] * 0.5)
    model = model_of(tensors, config, torch.device("cpu"))
    assert len(model.model.layers) == 2 and not model.training
    assert model.model.layers[0].mlp.up_proj.weight.data_ptr() == whole.data_ptr()


def test_set_on_the_command_line(home):
    made = recipe.load(a_recipe(home), ["short.trials=7", "short.search.items=2", "short.layers=1"])
    step = made.steps["short"]
    assert (step.search.trials, step.search.items, step.method.layers) == (7, 2, 1)
    with pytest.raises(LuthierError, match="did you mean 'trials'"):
        recipe.load(a_recipe(home), ["short.trial=7"])


def test_rungs():
    assert SearchSpec(items=40, first=4).rungs(40) == (4, 12, 36, 40)
    assert SearchSpec(items=40).rungs(40) == (40,)
    assert SearchSpec(items=9, first=3).rungs(9) == (3, 9)
    assert SearchSpec(items=40, first=4, factor=2).rungs(6) == (4, 6)


@pytest.mark.parametrize(("value", "factor", "behind"), [
    (1.5, 3, False), (2.0, 3, False), (2.5, 3, True), (3.5, 2, True), (3.0, 2, False), (0.0, 7, False), (9.0, 7, False),
])  # fmt: skip
def test_one_in_so_many_goes_on(value, factor, behind):
    """Asynchronous successive halving by hand: five have come as far; of them and this one a third, or a half, goes on.
    Of fewer than the factor nobody is stopped."""
    others = [types.SimpleNamespace(rungs={2: (float(v),)}) for v in (5, 3, 1, 4, 2)]
    others.append(types.SimpleNamespace(rungs={1: (0.0,)}))
    judge = object.__new__(Evaluator)
    judge.spec = SearchSpec(factor=factor)
    judge._trials = types.SimpleNamespace(finished=lambda: others)
    assert judge._behind((value,), 2, lambda values: values[0]) is behind


def test_what_was_stopped_is_not_looked_at_again(home, tmp_path):
    """Nor is it where it would be stopped again; where it no longer would be, and where it is asked for beside the
    proposals, it is judged to the end."""

    class Counted(Evaluator):
        looks = 0

        def _look(self, *given):
            self.looks += 1
            super()._look(*given)

    base = Checkpoint.open(home / "base")
    data = Inputs(recipe.load(a_recipe(home)), None, lambda event: None)
    data.open()
    spec = SearchSpec(trials=9, items=4, first=2, factor=2)
    judge = Counted(Drop(), base, [], [data.data["book"]], spec, Context(), tmp_path, 1)
    good, bad = stitched([f"base.{i}" for i in range(LAYERS)]), stitched(["base.0", "base.4"])
    found, behind = [], [False, True, True, False]
    judge._behind = lambda *given: behind[0]
    for candidate, proposal in zip((good, bad, bad, bad), judge.proposals("random"), strict=False):
        proposal.share("x")
        judge.looks = 0
        found.append((judge(candidate, proposal) is None, judge.looks))
        behind.pop(0)
    assert found == [(False, 2), (True, 1), (True, 0), (False, 2)]
    rungs = [done.rungs for done in judge._trials.finished() if done.candidate]
    assert rungs[1] == rungs[2] and set(rungs[1]) == {2} and set(rungs[3]) == {2, 4}


def test_what_was_judged_before_costs_no_look(first):
    """As many looks as items that each row was judged by; a row that took no time was known, and costs none."""
    table = first[0].table("short")
    (cost,) = [n for n in table.notes if "looks at an item" in n]
    looks = sum(row["items"] for row in table.dicts() if row["seconds"])
    assert cost.startswith(f"{len(table.rows) - 1} candidates, {looks} looks at an item") and looks % 3 == 0


def test_a_thread_count_changes_no_value(home, tmp_path):
    given = {"base": home / "base", "data": [{"source": f"text:{home}/book.txt", "split": {"test": 0.2}}]}
    found = [Drop(layers=1).apply(**given, threads=n, search={"items": 2}).table for n in (1, 2)]
    values = [[row["data0 nll"] if "data0 nll" in row else list(row.values())[3] for row in t.dicts()] for t in found]
    assert values[0] == values[1]
