"""The recipe grammar: what it means, that it reads back, and that values change by --set."""

import json

import pytest

from luthier import recipe
from luthier.recipe_text import parse, read

DESIGN = """
luthier: 1
seed: 0
hardware: {device: auto, memory: 1GiB}          # outside every hash
data:
  sums: {source: "gym:countdown", split: {by: hash, train: 4000, test: 256}}
  code: {source: "text:stdlib", split: {by: file, test: 0.2}}
steps:
  math:   {use: tune.lift, model: smollm2, data: sums, set: {share: 0.05}, train: {steps: 60, batch: 16, lr: 1e-4}}
  python: {use: tune.lift, model: smollm2, data: code, set: {share: 0.05}, train: {steps: 40}}
  sum:    {use: merge.task_arithmetic, base: smollm2, experts: [math, python]}
  table:  {use: eval.compare, models: [smollm2, math, python, sum], data: [sums, code], paired_to: smollm2}
"""


def load(text, name="r"):
    return recipe.parse(parse(text, f"{name}.yaml"), name)


def test_the_recipe_of_the_design():
    found = load(DESIGN)
    assert list(found.steps) == ["math", "python", "sum", "table"]
    math, total, table = found.steps["math"], found.steps["sum"], found.steps["table"]
    assert math.method.share == 0.05
    assert (math.train.steps, math.train.batch, math.train.lr) == (60, 16, 1e-4)
    assert (math.objective.id, math.optim.id) == ("objective.next_token", "optim.adamw")
    assert (math.roles["model"], math.roles["data"]) == ("smollm2", ("sums",))
    assert found.needs(total) == ["math", "python"]
    assert table.roles["paired_to"] == "smollm2"
    assert found.outside() == ["smollm2"]
    assert found.hardware.memory == 1 << 30


def test_yaml_1_2_scalars():
    assert parse("{a: 1e-4, b: on, c: 010, d: 0o10, e: 0x1f, f: 2020-01-01, g: ~, h: 1_000, i: No}").value == {
        "a": 1e-4, "b": "on", "c": 10, "d": 8, "e": 31, "f": "2020-01-01", "g": None, "h": 1000, "i": "No",
    }  # fmt: skip


def test_lines_of_keys_items_and_parents():
    marked = parse("a:\n  b:\n    - 1\n    - 2\nc: 3\n", "f.yaml")
    assert [marked.where(*p) for p in [("a", "b", 1), ("a", "b"), ("a", "x", "y"), ("c",)]] == [
        "f.yaml:4", "f.yaml:2", "f.yaml:1", "f.yaml:5",
    ]  # fmt: skip


def test_what_is_written_reads_back_as_the_same_recipe(tmp_path):
    found = load(DESIGN)
    path = tmp_path / "again.yaml"
    path.write_text(found.to_yaml())
    again = recipe.load(path)
    assert {n: s.config() for n, s in again.steps.items()} == {n: s.config() for n, s in found.steps.items()}
    assert read(path).value == found.marked.value


def test_json_is_a_recipe_too(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(parse(DESIGN).value))
    assert list(recipe.load(path).steps) == ["math", "python", "sum", "table"]


def test_steps_may_stand_in_any_order():
    text = "luthier: 1\nsteps:\n  b: {use: merge.linear, experts: [a, smollm2]}\n"
    text += "  a: {use: merge.linear, experts: [smollm2]}\n"
    assert list(load(text).steps) == ["a", "b"]


def test_configs_hold_every_field_and_read_back():
    step = load(DESIGN).steps["math"]
    config = step.config()
    assert config["set"].keys() >= {"share", "rank", "every", "targets"}
    assert config["train"]["clip"] == 1.0
    again = recipe.load({"luthier": 1, "data": parse(DESIGN).value["data"], "steps": {"math": config}})
    assert again.steps["math"].config() == config


def test_globs_and_schedules_pass_through():
    text = "luthier: 1\nsteps:\n  m:\n    use: merge.task_arithmetic\n    base: smollm2\n    experts: [smollm2]\n"
    text += '    set: {scale: {"*": 0.5, "*.mlp.*": [0, 1]}}\n'
    scale = load(text).steps["m"].method.scale
    assert list(scale) == ["*", "*.mlp.*"]
    assert scale["*.mlp.*"] == (0.0, 1.0)


VARIED = """
luthier: 1
seed: 7
data: {sums: {source: "text:stdlib", split: {by: file}}}
steps:
  a: {use: tune.full, model: smollm2, data: sums, train: {steps: 1}, vary: {seed: [0, 1], train.lr: [0.1, 0.2]}}
  b: {use: tune.full, model: smollm2, data: sums, train: {steps: 1}, vary: {seed: [1, 0]}}
  each: {use: merge.linear, experts: [a, b], vary: {seed: [0, 1]}}
  all: {use: merge.linear, experts: [a, b]}
  one: {use: merge.linear, experts: ["b@seed=1", smollm2]}
"""


def test_vary_unrolls_a_grid():
    steps = load(VARIED).steps
    assert [n for n in steps if n.startswith("a")] == [
        "a@seed=0,train.lr=0.1", "a@seed=0,train.lr=0.2", "a@seed=1,train.lr=0.1", "a@seed=1,train.lr=0.2", "all",
    ]  # fmt: skip
    one = steps["a@seed=1,train.lr=0.2"]
    assert (one.seed, one.train.lr, one.base, dict(one.vary)) == (1, 0.2, "a", {"seed": 1, "train.lr": 0.2})
    assert steps["all"].seed == 7


def test_equal_keys_of_varied_steps_meet():
    steps = load(VARIED).steps
    assert steps["each@seed=1"].roles["experts"] == ("a@seed=1,train.lr=0.1", "a@seed=1,train.lr=0.2", "b@seed=1")
    assert len(steps["all"].roles["experts"]) == 6
    assert steps["one"].roles["experts"] == ("b@seed=1", "smollm2")


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("math.share=0.1", lambda r: r.steps["math"].method.share == 0.1),
        ("math.set.share=1e-2", lambda r: r.steps["math"].method.share == 0.01),
        ("math.lr=3e-4", lambda r: r.steps["math"].train.lr == 3e-4),
        ("math.train.steps=5", lambda r: r.steps["math"].train.steps == 5),
        ("steps.math.train.clip=null", lambda r: r.steps["math"].train.clip is None),
        ("python.data=[sums, code]", lambda r: r.steps["python"].roles["data"] == ("sums", "code")),
        ("data.sums.split.test=8", lambda r: r.data["sums"]["split"] == {"by": "hash", "train": 4000, "test": 8}),
        ("seed=3", lambda r: r.seed == 3 and r.steps["sum"].seed == 3),
        ("hardware.memory=512MiB", lambda r: r.hardware.memory == 1 << 29),
        (
            "math.vary.seed=[0, 1]",
            lambda r: r.steps["sum"].roles["experts"] == ("math@seed=0", "math@seed=1", "python"),
        ),
        ('sum.scale={"*": 0.25}', lambda r: r.steps["sum"].method.scale == {"*": 0.25}),
    ],
)
def test_assignments(tmp_path, assignment, value):
    path = tmp_path / "r.yaml"
    path.write_text(DESIGN)
    assert not value(recipe.load(path))
    assert value(recipe.load(path, [assignment]))


def test_assigning_through_an_alias_changes_one_step_only(tmp_path):
    path = tmp_path / "r.yaml"
    body = "use: tune.full, model: smollm2, data: d"
    path.write_text(
        "luthier: 1\ndata: {d: {source: 'text:stdlib', split: {by: file}}}\nsteps:\n"
        f"  a: {{{body}, train: &t {{steps: 4}}}}\n  b: {{{body}, train: *t}}\n"
    )
    steps = recipe.load(path, ["b.steps=9"]).steps
    assert (steps["a"].train.steps, steps["b"].train.steps) == (4, 9)


def test_a_new_model_takes_its_tokenizer_from_data():
    text = """
luthier: 1
data: {book: {source: "text:stdlib", split: {by: file}}}
steps:
  m:
    use: tune.full
    model:
      new: {hidden_size: 32, slots: {ffn: {use: block.moe, set: {experts: 4}}}}
      tokenizer: {train: book, size: 512}
    data: book
    train: {steps: 1}
"""
    step = load(text).steps["m"]
    assert step.roles["model"]["tokenizer"] == {"train": "book", "size": 512}
    assert step.names("model") == []
    assert step.names("data") == ["book", "book"]


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 1 << 30), ("1.5 GB", 1_500_000_000), ("64 MB", 64_000_000), (4096, 4096)]
)
def test_amounts_of_memory(text, size):
    from luthier.recipe_check import size as of

    assert of(text, "here") == size


def test_the_name_of_a_shipped_recipe_is_that_recipe_wherever_one_stands(tmp_path, monkeypatch):
    """A run folder of the same name does not stand in its way; a path means the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "recipe.yaml").write_text("luthier: 1")
    assert recipe.find("quickstart") == recipe.shipped()["quickstart"]
    assert recipe.find("./quickstart").samefile(tmp_path / "quickstart" / "recipe.yaml")


def test_shipped_recipes_are_listed_and_load():
    assert {"quickstart", "from-scratch"} <= set(recipe.shipped())
    for name in recipe.shipped():
        assert recipe.load(name).name == name
