"""The one verb from Python: roles by name, lazy merges, trained models, tables and traces."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import luthier
from luthier.cli import main
from luthier.errors import LuthierError
from luthier.merge.linear import Linear
from luthier.testing import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apply")
    base = tiny.checkpoint(folder / "base")
    tiny.expert_of(base, 1, folder / "one")
    tiny.expert_of(base, 2, folder / "two")
    return folder


def test_a_merge_is_lazy_and_saves(home, tmp_path):
    merged = Linear(weights=(1.0, 3.0)).apply(experts=[home / "one", str(home / "two")], dtype="fp32")
    assert merged.plan().write_bytes > 0
    assert not (tmp_path / "out").exists()
    out = merged.save(tmp_path / "out")
    one, two, made = (load_file(p / "model.safetensors") for p in (home / "one", home / "two", out))
    for name, value in made.items():
        torch.testing.assert_close(value, 0.25 * one[name] + 0.75 * two[name], atol=1e-6, rtol=0)
    assert "merge.linear" in (out / "README.md").read_text()


def test_experts_may_be_a_tuple_of_names(home, tmp_path):
    given = [home / "one", home / "two"]
    one, two = (Linear().apply(experts=kind(given)).save(tmp_path / kind.__name__) for kind in (list, tuple))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_a_merge_never_replaces_its_inputs(home, tmp_path):
    """Neither an expert that Luthier wrote, nor one in the folder of another output; from Python and as a command."""
    first, base = Linear().apply(experts=[home / "one", home / "two"]).save(tmp_path / "first"), home / "base"
    before = (first / "model.safetensors").read_bytes()
    with pytest.raises(LuthierError, match="first: holds an input, .*first; choose another folder"):
        Linear().apply(experts=[home / "one", first]).save(first)
    recipe = tmp_path / "m.yaml"
    recipe.write_text(f"luthier: 1\nsteps: {{m: {{use: merge.linear, experts: [{base}, {first}]}}}}\n")
    assert main(["merge", str(recipe), str(first)]) == 2
    assert (first / "model.safetensors").read_bytes() == before
    inner = tiny.expert_of(base, 3, first / "expert")
    (first / "notes.txt").write_text("mine")
    for experts in ([home / "one", inner], [home / "one", home / "two"]):
        with pytest.raises(LuthierError, match="first: holds "):
            Linear().apply(experts=experts).save(first)
    assert (inner / "config.json").exists() and (first / "notes.txt").read_text() == "mine"


def test_the_card_of_a_tune_is_a_recipe_that_reads(home, tmp_path):
    """With data, seed, objective and optimizer: enough to do it again."""
    import re

    from luthier import recipe, recipe_text

    (tmp_path / "book.txt").write_text("the fox jumps\n" * 40)
    data = {
        "source": f"text:{tmp_path}/book.txt",
        "set": {"chars": 60},
        "split": {"by": "window", "train": 4, "test": 1},
    }
    adamw = {"use": "optim.adamw", "set": {"weight_decay": 0.5}}
    (tmp_path / "book.txt").write_text("".join(f"the fox jumps over {i} dogs\n" for i in range(60)))
    tuned = luthier.load("tune.random").apply(
        model=str(home / "base"), data=data, optim=adamw, seed=7, train={"steps": 1, "batch": 2, "max_length": 32}
    )
    card = (tuned.save(tmp_path / "out") / "README.md").read_text()
    found = re.search("```yaml\n(.*?)```", card, re.S)
    assert found
    made = recipe.parse(recipe_text.parse(found[1]), "card")
    step = made.steps["model"]
    assert (made.seed, step.optim.weight_decay, step.objective.id) == (7, 0.5, "objective.next_token")
    assert dict(made.data["data0"]) == data and step.train.steps == 1


def test_the_card_of_a_new_model_names_no_base(home, tmp_path):
    from luthier.engine.runner import NewModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    train = {"steps": 1, "batch": 2, "max_length": 32}
    tuned = luthier.load("tune.full").apply(model=NewModel(sizes, home / "base"), data=tiny.text_data(), train=train)
    card = (tuned.save(tmp_path / "out") / "README.md").read_text()
    assert "Base:" not in card and "base_model" not in card and "hidden_size: 16" in card


def test_the_cards_of_what_came_from_the_bundled_model_say_so():
    from luthier.engine.apply import _notes

    assert "Q4_1" in _notes("smollm2", "smollm2", "other")[0] and not _notes("other", ("model", "tokenizer"))


def test_load_by_id_is_the_same_method(home):
    assert luthier.load("merge.linear", weights=[1.0, 3.0]) == Linear(weights=(1.0, 3.0))


def test_a_tune_gives_a_plain_model(home, tmp_path):
    tuned = luthier.load("tune.random", share=0.1).apply(
        model=home / "base", data=tiny.text_data(), train={"steps": 3, "batch": 2, "max_length": 32, "lr": 1e-2}
    )
    assert [h["step"] for h in tuned.history] == [1, 2, 3] and tuned.stats["trainable"] > 0
    model = AutoModelForCausalLM.from_pretrained(tuned.save(tmp_path / "out"))
    base, made = load_file(home / "base" / "model.safetensors"), model.state_dict()
    moved = sum(int((made[n] != base[n]).sum()) for n in base)
    assert 0 < moved <= tuned.stats["trainable"]


def test_a_tune_from_python_and_from_a_recipe_differ_in_nothing_but_the_step(home, tmp_path):
    train = {"steps": 2, "batch": 2, "max_length": 32}
    live = AutoModelForCausalLM.from_pretrained(home / "base"), tiny.tokenizer()
    given = {"data": tiny.text_data(), "train": train, "seed": 3}
    one = luthier.load("tune.full").apply(model=home / "base", **given)
    two = luthier.load("tune.full").apply(model=live, **given)
    assert [h["loss"] for h in one.history] == [h["loss"] for h in two.history]


def test_a_measure_gives_a_table(home):
    table = luthier.load("eval.perplexity", max_items=4).apply(
        models=[home / "base", home / "one"], data=tiny.text_data()
    )
    assert len(table.rows) == 8 and len({row["model"] for row in table.dicts()}) == 2
    paired = luthier.load("eval.compare", measures=["eval.perplexity"], resamples=100).apply(
        models=[str(home / "base"), str(home / "one")], data=[tiny.text_data()], paired_to=str(home / "one")
    )
    assert {row["against"] for row in paired.dicts()} == {str(home / "one")}


def test_a_decode_gives_a_trace(home):
    trace = luthier.load("decode.sample", max_new_tokens=3).apply(models=home / "base", prompts=["a", "the fox"])
    assert len(trace.texts) == 2 and all(len(t) <= 3 for t in trace.tokens)
    live = (AutoModelForCausalLM.from_pretrained(home / "base"), tiny.tokenizer())
    same = luthier.load("decode.sample", max_new_tokens=3).apply(models=[live], prompts=["a", "the fox"])
    assert same.tokens == trace.tokens


@pytest.mark.parametrize(
    ("id_", "given", "says"),
    [
        ("merge.ties", {"base": "base", "expert": ["one"]}, "did you mean 'experts'?"),
        ("merge.ties", {"experts": ["one"]}, "'base' is missing"),
        ("merge.linear", {"experts": ["one"], "train": {"steps": 1}}, "unknown role or option 'train'"),
        ("tune.full", {"model": "base", "data": "text:stdlib"}, "'train' is missing"),
        ("tune.full", {"model": "base", "data": "text:stdlib", "train": {"setps": 1}}, "did you mean 'steps'?"),
        ("tune.full", {"model": "base", "data": "text:stdlb", "train": {"steps": 1}}, "text:stdlb"),
        ("tune.full", {"model": "bose", "data": "text:stdlib", "train": {"steps": 1}}, "did you mean 'base'?"),
        ("eval.perplexity", {"models": "base", "data": "text:stdlib", "dtype": "fp23"}, "did you mean 'fp32'?"),
        ("eval.perplexity", {"models": "base", "data": "text:stdlib", "device": "gpu"}, "unknown device"),
        ("optim.adamw", {"model": "base", "data": "text:stdlib"}, "is not applied by itself"),
    ],
)
def test_wrong_roles_are_named(home, monkeypatch, id_, given, says):
    monkeypatch.chdir(home)
    with pytest.raises(LuthierError) as caught:
        result = luthier.load(id_).apply(**given)
        result.plan()
    assert says in str(caught.value)
