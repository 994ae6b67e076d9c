"""Runs: what is done is not repeated, what broke goes on to the same bytes, every attempt is in the ledger."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import luthier
from dying import die, ended, fork
from luthier import recipe_run
from luthier.errors import LuthierError
from luthier.ledger import Ledger, only_one
from luthier.testing import tiny

LINES = "".join(f"the {i} quick brown foxes jump over {7 * i} lazy dogs and {i * i} cats\n" for i in range(300))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.checkpoint(folder / "base")
    (folder / "book.txt").write_text(LINES)
    return folder


def a_recipe(home, **changes):
    train = {"steps": 4, "batch": 2, "max_length": 48, "lr": 1e-2} | changes
    tune = {"model": str(home / "base"), "data": "book", "train": train}
    base = str(home / "base")
    asked = {"resamples": 200, "questions": {"is a better?": {"model": "a", "than": base}}}
    split = {"by": "window", "test": 0.2}
    return {
        "luthier": 1,
        "data": {"book": {"source": f"text:{home}/book.txt", "split": split, "set": {"chars": 120}}},
        "steps": {
            "a": {"use": "tune.full", **tune},
            "b": {"use": "tune.random", **tune, "set": {"share": 0.2}},
            "sum": {"use": "merge.task_arithmetic", "base": base, "experts": ["a", "b"]},
            "table": {"use": "eval.compare", "models": [base, "a", "sum"], "data": "book", "set": asked},
            "words": {"use": "decode.sample", "models": "a", "prompts": ["the 1", "fox"], "set": {"max_new_tokens": 4}},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def first(home):
    events = []
    run = luthier.run(a_recipe(home), folder=home / "run", watch=events.append)
    return run, events


def weights(path):
    return load_file(path / "model.safetensors")


def test_every_step_leaves_what_the_ledger_says(first):
    run, _ = first
    records = Ledger(run.folder).records()
    assert [r.step for r in records] == ["a", "b", "sum", "table", "words"]
    for r in records:
        assert r.status == "done"
        assert all((run.folder / path).exists() for path in r.artefacts.values())
        assert json.loads((run.folder / "steps" / r.step / "record.json").read_text()) == json.loads(r.to_json())
    a, total, table = run.records["a"], run.records["sum"], run.records["table"]
    assert a.metrics["steps"] == 4 and a.metrics["trainable"] == 33184
    assert a.inputs["data"][0]["name"] == "book" and len(a.inputs["model"]["hash"]) == 64
    assert total.inputs["experts"][0] == {"name": "a", "hash": a.output}
    assert set(a.sources) == {"tune.full", "objective.next_token", "optim.adamw"}
    assert set(table.sources) >= {"eval.compare", "eval.perplexity", "eval.accuracy", "decode.sample"}
    assert not (run.folder / "work").exists() or not list((run.folder / "work").iterdir())
    history = json.loads((run.folder / a.artefacts["history"]).read_text())
    assert [h["step"] for h in history] == [1, 2, 3, 4]
    assert len((run.folder / "ledger.jsonl").read_text().splitlines()) == 5


def test_models_load_with_plain_transformers_and_carry_their_recipe(first):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = first
    model = AutoModelForCausalLM.from_pretrained(run.path("sum"))
    tokenizer = AutoTokenizer.from_pretrained(run.path("sum"))
    assert model(**tokenizer("the fox", return_tensors="pt")).logits.isfinite().all()
    card = (run.path("sum") / "README.md").read_text()
    assert "merge.task_arithmetic" in card and "tune.random" in card and "eval.compare" not in card


def test_the_sum_is_the_sum(first, home):
    run, _ = first
    base, a, b, total = (weights(p) for p in (home / "base", run.path("a"), run.path("b"), run.path("sum")))
    for name in base:
        torch.testing.assert_close(total[name], a[name] + b[name] - base[name], atol=1e-6, rtol=0)
    moved = sum(int((b[n] != base[n]).sum()) for n in base)
    assert 0 < moved <= run.records["b"].metrics["trainable"]


def test_tables_traces_and_verdicts(first):
    run, _ = first
    table = run.table("table")
    assert {row["model"] for row in table.dicts()} == {str(Path(run.folder.parent / "base")), "a", "sum"}
    assert any(note.startswith("is a better? -> ") for note in table.notes)
    lines = [json.loads(x) for x in (run.path("words") / "trace.jsonl").read_text().splitlines()]
    assert [x["prompt"] for x in lines] == ["the 1", "fox"] and all(len(x["tokens"]) <= 4 for x in lines)
    with pytest.raises(LuthierError, match="did you mean 'table'"):
        run.table("tabel")


def test_events_tell_the_story(first):
    _, events = first
    kinds = [e["kind"] for e in events if e["kind"] in ("plan", "step", "done")]
    assert kinds == ["plan", *["step", "done"] * 5]
    assert sum(e["kind"] == "metrics" and e["step"] == "a" for e in events) == 4
    plan = events[0]["plan"]
    assert plan.leaked == 0 and plan.data[0].test > 0
    by = {s.name: s for s in plan.steps}
    assert by["a"].trainable == by["a"].params == 33184
    assert 0 < by["b"].trainable < 0.2 * 33184
    assert by["sum"].gives == "model" and by["table"].gives == "table" and by["words"].gives == "trace"


def test_what_is_done_is_not_repeated(first, home):
    run, _ = first
    before = {n: os.stat(run.folder / "steps" / n / "record.json").st_mtime_ns for n in run.records}
    again = luthier.run(a_recipe(home), folder=run.folder)
    assert again.kept == tuple(run.records)
    assert {n: os.stat(run.folder / "steps" / n / "record.json").st_mtime_ns for n in run.records} == before


def test_a_change_reruns_what_depends_on_it_only(first, home, tmp_path):
    import shutil

    run, _ = first
    shutil.copytree(run.folder, tmp_path / "run")
    changed = a_recipe(home)
    changed["steps"]["b"]["set"]["share"] = 0.3
    again = luthier.run(changed, folder=tmp_path / "run")
    assert again.kept == ("a", "words")
    unhurried = a_recipe(home, save_every=1, keep=1)  # how often to save changes no result
    unhurried["steps"]["b"]["set"]["share"] = 0.3
    unhurried["hardware"] = {"device": "cpu", "memory": "64MiB", "threads": 1}
    assert luthier.run(unhurried, folder=tmp_path / "run").kept == ("a", "b", "sum", "table", "words")


def test_deleted_or_damaged_results_are_made_again_to_the_same_bytes(first, home, tmp_path):
    import shutil

    run, _ = first
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "steps" / "a")
    (tmp_path / "run" / "steps" / "sum" / "record.json").write_text("{")
    again = luthier.run(a_recipe(home), folder=tmp_path / "run")
    assert again.kept == ("b", "table", "words")  # a came out the same, so nothing after it changed
    for name in ("a", "sum"):
        assert again.records[name].output == run.records[name].output


def test_changed_data_is_noticed(first, home, tmp_path):
    import shutil

    shutil.copytree(first[0].folder, tmp_path / "run")
    book = tmp_path / "book.txt"
    book.write_text(LINES + "one more line\n")
    changed = a_recipe(home)
    changed["data"]["book"]["source"] = f"text:{book}"
    assert luthier.run(changed, folder=tmp_path / "run").kept == ()
    records = Ledger(tmp_path / "run").records("a")
    assert records[0].inputs["data"][0]["hash"] != records[-1].inputs["data"][0]["hash"]


def test_a_failure_is_recorded_and_placed(home, tmp_path):
    wrong = a_recipe(home, lr=1e30)
    with pytest.raises(LuthierError) as caught:
        luthier.run(wrong, folder=tmp_path)
    assert "recipe.steps.a (step a)" in str(caught.value) and "at training step" in str(caught.value)
    (record,) = Ledger(tmp_path).records()
    assert record.status == "failed" and "at training step" in record.notes[0]
    assert not (tmp_path / "steps").exists() or not list((tmp_path / "steps").iterdir())


def test_nothing_starts_when_something_is_missing(home, tmp_path):
    wrong = a_recipe(home)
    wrong["steps"]["sum"]["experts"].append(str(tmp_path))
    events = []
    with pytest.raises(LuthierError, match="config.json"):
        luthier.run(wrong, folder=tmp_path / "run", watch=events.append)
    assert not [e for e in events if e["kind"] == "step"]


def test_merges_that_cannot_work_are_said_before_the_training(home, tmp_path):
    tiny.checkpoint(tmp_path / "wide", hidden_size=48)
    wrong = a_recipe(home)
    wrong["steps"]["odd"] = {"use": "merge.linear", "experts": [str(home / "base"), str(tmp_path / "wide")]}
    events = []
    with pytest.raises(LuthierError, match=r"recipe\.steps\.odd"):
        luthier.run(wrong, folder=tmp_path / "run", watch=events.append)
    assert not [e for e in events if e["kind"] == "step"]


def test_two_runs_in_one_folder_are_refused(home, tmp_path):
    with only_one(tmp_path), pytest.raises(LuthierError, match="another run"):
        luthier.run(a_recipe(home), folder=tmp_path)


def test_fresh_does_everything_anew(home, tmp_path):
    small = a_recipe(home)
    small["steps"] = {"a": small["steps"]["a"]}
    one = luthier.run(small, folder=tmp_path)
    two = luthier.run(small, folder=tmp_path, fresh=True)
    assert two.kept == () and two.records["a"].output == one.records["a"].output
    assert len(Ledger(tmp_path).records()) == 2


def test_seeds_vary_and_the_varied_step_at_the_root_seed_is_the_plain_one(home, tmp_path):
    plain, varied = a_recipe(home), a_recipe(home)
    plain["steps"] = {"a": plain["steps"]["a"]}
    varied["steps"] = {"a": {**varied["steps"]["a"], "vary": {"seed": [0, 1]}}}
    one = luthier.run(plain, folder=tmp_path / "plain")
    two = luthier.run(varied, folder=tmp_path / "varied")
    assert two.records["a@seed=0"].output == one.records["a"].output != two.records["a@seed=1"].output


def test_the_hash_says_what_matters(home):
    from luthier import recipe
    from luthier.recipe_inputs import Inputs

    def digest(raw, step="a"):
        found = recipe.load(raw)
        inputs = Inputs(found, None, lambda event: None)
        inputs.open()
        return inputs.hash(found.steps[step])

    plain = digest(a_recipe(home))
    assert digest(a_recipe(home)) == plain == digest(a_recipe(home) | {"hardware": {"threads": 1}})
    assert digest(a_recipe(home) | {"seed": 1}) != plain
    assert digest(a_recipe(home, lr=2e-2)) != plain
    assert digest(a_recipe(home), "b") != plain
    assert recipe_run.done(home / "run", "nothing", plain) is None


def training(home, **train):
    raw = a_recipe(home, **train)
    raw["steps"] = {"a": raw["steps"]["a"]}
    return raw


def test_killed_after_a_training_and_before_its_record_no_step_is_trained_again(home, tmp_path):
    raw, events = training(home, save_every=2), []

    def run():
        recipe_run._Running._record = lambda *_, **__: die()
        luthier.run(raw, folder=tmp_path)

    assert ended(fork(run)) == -signal.SIGKILL
    assert [p.name[0] for p in (tmp_path / "steps").iterdir()] == ["."] and Ledger(tmp_path).records() == []
    done = luthier.run(raw, folder=tmp_path, watch=events.append)
    assert any(e["kind"] == "log" and "goes on after step 4" in e["text"] for e in events)
    assert not [e for e in events if e["kind"] == "metrics"] and done.records["a"].metrics["steps"] == 4
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["a"] and not list((tmp_path / "work").iterdir())


def test_killed_before_the_ledger_was_told_the_step_is_done_all_the_same(home, tmp_path):
    raw = training(home, save_every=2)

    def run():
        Ledger.add = lambda *_: die()
        luthier.run(raw, folder=tmp_path)

    assert ended(fork(run)) == -signal.SIGKILL
    assert (tmp_path / "steps" / "a" / "record.json").exists() and list((tmp_path / "work").iterdir())
    again = luthier.run(raw, folder=tmp_path)
    assert again.kept == ("a",) and [r.status for r in Ledger(tmp_path).records()] == ["done"]
    assert not list((tmp_path / "work").iterdir())


def test_a_ledger_that_cannot_be_written_does_not_hide_the_fault(home, tmp_path, monkeypatch):
    def refuse(*_):
        raise LuthierError("the disk is full")

    monkeypatch.setattr(Ledger, "add", refuse)
    with pytest.raises(LuthierError, match="at training step"):
        luthier.run(training(home, lr=1e30), folder=tmp_path)


def test_ctrl_c_is_recorded_and_the_run_goes_on(home, tmp_path, terminal):
    raw = a_recipe(home, steps=60)
    raw["steps"] = {"a": raw["steps"]["a"]}
    stopped = []

    def watch(event):
        if event["kind"] == "metrics" and event["train"]["step"] == 3 and not stopped:
            stopped.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="run again to go on"):
        luthier.run(raw, folder=tmp_path, watch=watch)
    assert [r.status for r in Ledger(tmp_path).records()] == ["interrupted"]
    done = luthier.run(raw, folder=tmp_path)
    assert [r.status for r in Ledger(tmp_path).records()] == ["interrupted", "done"]
    assert done.records["a"].metrics["steps"] == 60


def test_what_a_tune_changed_is_an_expert_of_its_own(first, home, tmp_path):
    run, _ = first
    delta = run.folder / run.records["b"].artefacts["delta"]
    raw = {"luthier": 1, "steps": {"m": {
        "use": "merge.task_arithmetic", "base": str(home / "base"), "experts": [str(delta)]}}}  # fmt: skip
    made = luthier.run(raw, folder=tmp_path)
    tuned, merged = weights(run.path("b")), weights(made.path("m"))
    for name in tuned:
        torch.testing.assert_close(merged[name], tuned[name], atol=1e-7, rtol=0)
    assert len(made.records["m"].inputs["experts"][0]["hash"]) == 64


def test_a_change_whose_base_is_a_step_waits_for_it(first, home, tmp_path):
    raw = a_recipe(home)
    a, b = raw["steps"]["a"], raw["steps"]["b"] | {"model": "a"}
    run = luthier.run(raw | {"steps": {"a": a, "b": b}}, folder=tmp_path / "made")
    delta = str(run.folder / run.records["b"].artefacts["delta"])
    merge = {"use": "merge.linear", "base": "a", "experts": ["a", delta]}
    done = luthier.run(raw | {"steps": {"a": a, "m": merge}}, folder=tmp_path / "again")
    assert done.records["m"].status == "done"
    other, _ = first  # its `b` started from the base, not from `a`
    wrong = merge | {"experts": ["a", str(other.folder / other.records["b"].artefacts["delta"])]}
    with pytest.raises(LuthierError, match="the base holds other values than this change was made from"):
        luthier.run(raw | {"steps": {"a": a, "m": wrong}}, folder=tmp_path / "again")


def test_a_model_from_nothing(home, tmp_path):
    raw = a_recipe(home)
    new = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
           "slots": {"ffn": {"use": "block.moe", "set": {"experts": 4}}}}  # fmt: skip
    step = {**raw["steps"]["a"], "model": {"new": new, "tokenizer": {"train": "book", "size": 300}}}
    raw["steps"] = {"a": step, "loss": {"use": "eval.perplexity", "models": "a", "data": "book"}}
    events = []
    run = luthier.run(raw, folder=tmp_path, watch=events.append)
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(run.path("a"))
    assert config.model_type == "luthier" and config.vocab_size == len(AutoTokenizer.from_pretrained(run.path("a")))
    assert run.table("loss").rows
    plan = next(e["plan"] for e in events if e["kind"] == "plan")
    assert plan.steps[0].params == pytest.approx(run.records["a"].metrics["trainable"], rel=0.05)
    again = luthier.run(raw, folder=tmp_path / "again")
    assert again.records["a"].output == run.records["a"].output


def test_a_tokenizer_alone_brings_no_notes_on_weights(home, tmp_path, monkeypatch):
    """A new model with the bundled model's tokenizer has weights of its own."""
    from luthier.checkpoint import bundled

    raw = a_recipe(home)
    monkeypatch.setattr(bundled, "MODELS", {"smollm2": lambda: home / "base"})
    new = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    said = {}
    for name, model in {"new": {"new": new, "tokenizer": "smollm2"}, "tuned": "smollm2"}.items():
        raw["steps"] = {"a": {**raw["steps"]["a"], "model": model}, "m": {"use": "merge.linear", "experts": ["a"]}}
        run = luthier.run(raw, folder=tmp_path / name)
        said[name] = bundled.NOTES["smollm2"] in (run.path("m") / "README.md").read_text()
    assert said == {"new": False, "tuned": True}


def test_a_launcher_with_several_processes_is_refused(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LuthierError, match="runs in one process"):
        luthier.run(a_recipe(home), folder=tmp_path)
