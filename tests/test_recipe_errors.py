"""Every wrong recipe is refused before anything starts, in one line: file and line, what, the nearest right word."""

import pytest

from luthier import recipe
from luthier.errors import LuthierError
from luthier.recipe_text import parse

HEAD = "luthier: 1\n"
DATA = 'data:\n  sums: {source: "text:stdlib", split: {by: file}}\n'
STEPS = "steps:\n"
TUNE = "  math: {use: tune.lift, model: smollm2, data: sums, train: {steps: 2}}\n"
GOOD = HEAD + DATA + STEPS + TUNE

WRONG = {
    "no version": ("seed: 0\n", "r.yaml:1", "write luthier: 1"),
    "a later version": ("luthier: 2\nsteps: {}\n", "r.yaml:1", "version 2 is not known"),
    "not YAML": ("luthier: 1\nsteps: [\n", "r.yaml:", "not YAML"),
    "two documents": ("luthier: 1\n---\nluthier: 1\n", "r.yaml:2", "another document"),
    "a list": ("- 1\n", "r.yaml:1", "must be a map"),
    "top key": (HEAD + "stepps: {}\n", "r.yaml:2", "did you mean 'steps'?"),
    "no steps": (HEAD + DATA, "r.yaml:1", "there are no steps"),
    "a key twice": (HEAD + "seed: 1\nseed: 2\n", "r.yaml:3", "stands twice"),
    "a Python tag": (HEAD + "seed: !!python/object:os.system {}\n", "r.yaml:2", "is refused"),
    "a merge key": (HEAD + "steps:\n  a: {<<: {use: x}}\n", "r.yaml:3", "merge keys"),
    "infinity": (HEAD + "seed: .inf\n", "r.yaml:2", "no finite number"),
    "a seed that is no number": (HEAD + "seed: one\n" + STEPS + TUNE, "r.yaml:2", "a seed is a whole number"),
    "device": (HEAD + "hardware: {device: gpu}\n" + DATA + STEPS + TUNE, "r.yaml:2", "unknown device 'gpu'"),
    "memory": (HEAD + "hardware: {memory: lots}\n" + DATA + STEPS + TUNE, "r.yaml:2", "write it as 1GiB"),
    "hardware key": (HEAD + "hardware: {memmory: 1GiB}\n" + DATA + STEPS + TUNE, "r.yaml:2", "mean 'memory'?"),
    "no use": (HEAD + STEPS + "  math: {model: smollm2}\n", "r.yaml:3", "write use: ID"),
    "unknown method": (HEAD + STEPS + "  m: {use: merge.tie}\n", "r.yaml:3", "did you mean 'merge.ties'?"),
    "method without its stage": (HEAD + STEPS + "  m: {use: ties}\n", "r.yaml:3", "did you mean 'merge.ties'?"),
    "a Part as a step": (HEAD + STEPS + "  m: {use: block.moe}\n", "r.yaml:3", "model: {new: {slots"),
    "step name": (HEAD + STEPS + "  a/b: {use: merge.ties}\n", "r.yaml:3", "cannot be a name"),
    "step called as a bundled model": (HEAD + STEPS + "  smollm2: {use: merge.ties}\n", "r.yaml:3", "bundled model"),
    "role missing": (HEAD + DATA + STEPS + "  m: {use: tune.lift, model: smollm2, train: {steps: 1}}\n", "r.yaml:5",
                     "lacks 'data'"),
    "role unknown": (GOOD.replace("model:", "modell:"), "r.yaml:5", "did you mean 'model'?"),
    "field": (GOOD.replace("train:", "set: {shrae: 0.1}, train:"), "r.yaml:5", "did you mean 'share'?"),
    "field outside set": (GOOD.replace("train:", "share: 0.1, train:"), "r.yaml:5", "write set: {share: ...}"),
    "train key outside train": (GOOD.replace("train:", "lr: 0.1, train:"), "r.yaml:5", "write train: {lr: ...}"),
    "field's value": (GOOD.replace("train:", "set: {share: 2}, train:"), "r.yaml:5", "2.0 is out of range"),
    "field's type": (GOOD.replace("train:", "set: {share: much}, train:"), "r.yaml:5", "tune.lift.share"),
    "fields that exclude each other": (GOOD.replace("train:", "set: {share: 0.1, lora_rank: 2}, train:"), "r.yaml:5",
                                       "give one of them"),
    "train key": (GOOD.replace("steps: 2", "setps: 2"), "r.yaml:5", "did you mean 'steps'?"),
    "train value": (GOOD.replace("steps: 2", "steps: 2, lr: -1"), "r.yaml:5", "train.lr"),
    "no training length": (GOOD.replace("steps: 2", "lr: 0.1"), "r.yaml:5", "exactly one of steps, tokens, epochs"),
    "objective": (GOOD.replace("train:", "objective: objective.next, train:"), "r.yaml:5", "'objective.next_token'"),
    "an optimizer as objective": (GOOD.replace("train:", "objective: optim.adamw, train:"), "r.yaml:5",
                                  "optim.adamw is of shape Optim, not Objective"),
    "optim's field": (GOOD.replace("train:", "optim: {use: optim.adamw, set: {bets: 1}}, train:"), "r.yaml:5",
                      "did you mean 'betas'?"),
    "model": (GOOD.replace("smollm2", "smolm2"), "r.yaml:5", "did you mean 'smollm2'?"),
    "folder": (GOOD.replace("smollm2", "./nowhere/model"), "r.yaml:5", "no such folder"),
    "data": (GOOD.replace("data: sums", "data: sum"), "r.yaml:5", "did you mean 'sums'?"),
    "data key": (GOOD.replace("split:", "splits:"), "r.yaml:3", "did you mean 'split'?"),
    "kind of source": (GOOD.replace("text:stdlib", "txt:stdlib"), "r.yaml:3", "did you mean 'text'?"),
    "no source": (GOOD.replace('source: "text:stdlib", ', ""), "r.yaml:3", "no source"),
    "way to split": (GOOD.replace("by: file", "by: fil"), "r.yaml:3", "did you mean 'file'?"),
    "split's size": (GOOD.replace("by: file", "test: some"), "r.yaml:3", "split.test"),
    "merge that trains": (HEAD + STEPS + "  m: {use: merge.linear, experts: [smollm2], train: {steps: 1}}\n",
                          "r.yaml:3", "which does not train"),
    "a list where one is meant": (GOOD.replace("model: smollm2", "model: [smollm2]"), "r.yaml:5", "takes one name"),
    "a table as a model": (GOOD + "  t: {use: eval.perplexity, models: [math], data: sums}\n"
                           "  m: {use: merge.ties, base: smollm2, experts: [math, t]}\n", "r.yaml:7", "gives a table"),
    "a circle": (HEAD + STEPS + "  a: {use: merge.ties, base: smollm2, experts: [b]}\n"
                 "  b: {use: merge.ties, base: smollm2, experts: [a]}\n", "r.yaml:3", "a -> b -> a"),
    "paired_to": (GOOD + "  t: {use: eval.compare, models: [math], data: sums, paired_to: smollm2}\n", "r.yaml:6",
                  "not among the models"),
    "a question's model": (GOOD + "  t:\n    use: eval.compare\n    models: [smollm2, math]\n    data: sums\n"
                           "    set:\n      questions:\n        q: {model: maths, than: smollm2}\n", "r.yaml:12",
                           "did you mean 'math'?"),
    "a field in a nested method": (GOOD + "  t:\n    use: eval.accuracy\n    models: [math]\n    data: sums\n    set:\n"
                                   "      decode:\n        use: decode.sample\n        set:\n          topk: 3\n",
                                   "r.yaml:14", "did you mean 'top_k'?"),
    "vary": (GOOD.replace("train:", "vary: {share: [0.1]}, train:"), "r.yaml:5", "set.share"),
    "vary without a list": (GOOD.replace("train:", "vary: {seed: 3}, train:"), "r.yaml:5", "takes a list"),
    "vary with a wrong value": (GOOD.replace("train:", "vary: {set.share: [0.1, 7]}, train:"), "r.yaml:5",
                                "7.0 is out"),
    "vary twice the same": (GOOD.replace("train:", "vary: {seed: [1, 1]}, train:"), "r.yaml:5", "stands twice"),
    "one of many": (GOOD.replace("train:", "vary: {seed: [1, 2]}, train:")
                    + "  s: {use: tune.full, model: math, data: sums, train: {steps: 1}}\n", "r.yaml:6", "math@seed=1"),
    "a new model without a tokenizer": (GOOD.replace("smollm2", "{new: {hidden_size: 8}}"), "r.yaml:5",
                                        "needs both new and tokenizer"),
    "a new model's field": (GOOD.replace("smollm2", "{new: {hiden_size: 8}, tokenizer: smollm2}"), "r.yaml:5",
                            "did you mean 'hidden_size'?"),
    "a field of a Part in a new model": (
        GOOD.replace("smollm2", "\n      new:\n        slots:\n          ffn:\n            use: block.moe\n"
                     "            set:\n              exprts: 8\n      tokenizer: smollm2\n   ").replace(
            "{use: tune.lift, model:", "\n    use: tune.lift\n    model:").replace(", data: sums, train: {steps: 2}}",
            " data: sums\n    train: {steps: 2}"), "r.yaml:13", "did you mean 'experts'?"),
    "a tokenizer's data": (GOOD.replace("smollm2", "{new: {}, tokenizer: {train: som}}"), "r.yaml:5", "mean 'sums'?"),
    "dtype": (GOOD + "  t: {use: eval.perplexity, models: [math], data: sums, dtype: fp23}\n", "r.yaml:6", "'fp32'?"),
}  # fmt: skip


def fault_of(text):
    with pytest.raises(LuthierError) as caught:
        recipe.parse(parse(text, "r.yaml"), "r")
    return str(caught.value)


def test_what_the_wrong_ones_are_made_from_is_right():
    assert list(recipe.parse(parse(GOOD, "r.yaml"), "r").steps) == ["math"]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_recipes_are_refused_with_line_and_word(name):
    text, where, says = WRONG[name]
    fault = fault_of(text)
    assert fault.startswith(where), fault
    assert says in fault
    assert "\n" not in fault and len(fault) < 260


def test_aliases_are_counted_where_they_expand():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "use fewer aliases" in fault_of(HEAD + "\n".join(lines))


@pytest.mark.parametrize("text", ["[" * 5000, HEAD + "seed: &x [*x]\n", HEAD + "seed: " + "[" * 60 + "]" * 60])
def test_bottomless_recipes_are_refused(text):
    fault_of(text)


def test_a_large_file_is_refused(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text("# " + "x" * (1 << 20))
    with pytest.raises(LuthierError, match="small file"):
        recipe.load(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"luthier: 1\n\xff\xfe")
    with pytest.raises(LuthierError, match="no UTF-8"):
        recipe.load(path)


def test_a_map_from_python_names_the_dotted_path():
    with pytest.raises(LuthierError, match=r"recipe\.steps\.m\.use: unknown method 'merge\.tie'"):
        recipe.load({"luthier": 1, "steps": {"m": {"use": "merge.tie"}}})


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("math.shrae=1", "did you mean 'share'?"),
        ("maths.share=1", "did you mean 'math'?"),
        ("math=1", "say which key of 'math'"),
        ("math.share", "expected KEY=VALUE"),
        ("math.share=2", "2.0 is out of range"),
        ("math.share=[", "not YAML"),
        ("math.data=summs", "did you mean 'sums'?"),
        ("seed=x", "a seed is a whole number"),
        ("hardware.device=gpu", "unknown device"),
        ("data.sums.splt=1", "did you mean 'split'?"),
        ("math.train.lr=fast", "train.lr"),
        ("math.use.x=1", "holds no keys"),
    ],
)
def test_wrong_assignments_name_themselves(tmp_path, assignment, says):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    with pytest.raises(LuthierError) as caught:
        recipe.load(path, [assignment])
    assert f"--set {assignment}" in str(caught.value)
    assert says in str(caught.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(LuthierError, match="did you mean 'quickstart'"):
        recipe.load("quikstart")
