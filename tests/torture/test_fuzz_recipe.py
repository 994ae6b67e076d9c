"""The readers of recipes and mergekit files under mutated input: a valid result or one placed line, nothing else."""

import random
import re
import time

import pytest

from luthier import recipe
from luthier.engine.mergekit import to_recipe
from luthier.errors import LuthierError
from luthier.kit.plain import to_yaml
from luthier.recipe_set import assign
from luthier.recipe_text import mark, parse

OURS = [path.read_text(encoding="utf-8") for path in recipe.shipped().values()] + [
    "luthier: 1\nsteps: {a: {use: sos.certify, problem: x^4 + 2*x^2*y + 1, set: {largest: 50}}}\n",
    "luthier: 1\nsteps:\n  m: {use: merge.ties, base: smollm2, experts: [smollm2], set: {density: {'*': [0.1, 1]}}}\n",
]
KIT = [
    "merge_method: ties\nbase_model: a/b\ndtype: bfloat16\nparameters: {normalize: true, lambda: 0.9}\nmodels:\n"
    "  - model: a/c\n    parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: 0.5}], density: 0.5}\n"
    "  - model: a/d\n    parameters: {weight: 0.5, density: [0.1, 0.9]}\n",
    "merge_method: task_arithmetic\nbase_model: a/b\nmodels: [{model: a/c, parameters: {weight: 1}}]\n",
]  # fmt: skip
NASTY = [
    "", "~", "null", "true", "-1", "0", "1e999", ".nan", "-.inf", "9" * 39, "9" * 41, "0x1F", "0o7", "1_000", "[]",
    "{}",
    "[[]]", "{a: b}", "*x", "&x y", "&x [*x]", "!!int x", "!!float y", "!!str 3", "!!binary aGk=", "!evil {}",
    "!!bool 2",
    "<<", "<<: {a: 1}", "? a", "- a", "|\n  x", ">-\n  y", "'", '"', '"\\0"', '"\\uD800"', '"\\x1b"', "%", "@", "`",
    "#",
    "---", "...", "../../x", "/etc/passwd", "~nobody/x", "a/b", "x" * 300, "é", "\u202e", "\ufeff", "\x85", "\u2028",
    "\t",
    "seed", "use", "set", "vary", "train", "merge.ties", "tune.full", "smollm2", "2026-01-01", "1:30", "yes", "0.5",
    "cuda:9", "1GiB", "[1, 1]", "{seed: [1, 2, 3]}", "{set.share: [0.1]}", "math@seed=1",
]  # fmt: skip
LEAVES = [None, True, False, 0, -1, 10**38, 0.5, 1e300, -0.0, "", "x", "../x", "\0", "é", "\ud800", "1", "null", "~",
    "#",
          " a", "a\nb", ": ", "- ", [], {}, [1], {"a": 1}, ["a", ["b"]], {"use": "merge.ties"}]  # fmt: skip


def mutated(rng, text):
    """The text after a few changes: of letters, words or lines."""
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        words = [m.span() for m in re.finditer(r"[^\s,:\[\]{}]+", text)] or [(0, 0)]
        a, b = rng.choice(words)
        way = rng.randrange(7)
        if way == 0:
            text = text[:a] + rng.choice(NASTY) + text[b:]
        elif way == 1:
            cut = rng.randrange(len(text) + 1)
            text = text[:cut] + rng.choice(NASTY) + text[cut + rng.randint(0, 3) :]
        elif way == 2:
            lines[at] = lines[other]
            text = "\n".join(lines)
        elif way == 3:
            lines[at] = " " * rng.randint(0, 6) + lines[at].lstrip()
            text = "\n".join(lines)
        elif way == 4:
            text = "\n".join(lines[:at] + lines[at + 1 :])
        elif way == 5:
            c, d = rng.choice(words)
            text = text[:a] + text[c:d] + text[b:]
        else:
            text = text[: rng.randrange(len(text) + 1)]
    return text


def changed(rng, value, depth=0):
    """The values with one of them, somewhere, another."""
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return type(value)(rng.choice([0, 1, 2, 0.5 * value, 2 * value]))
    if rng.random() < 0.05 * depth or not isinstance(value, (dict, list)) or not value:
        return rng.choice(LEAVES)
    if isinstance(value, list):
        i = rng.randrange(len(value))
        return rng.choice([
            [*value[:i], changed(rng, value[i], depth + 1), *value[i + 1 :]], [*value, value[i]],
            value[:i]])  # fmt: skip
    key = rng.choice(list(value))
    if rng.random() < 0.2:
        return {k: v for k, v in value.items() if k != key} | {rng.choice(["x", "use", "", 3, None]): value[key]}
    return value | {key: changed(rng, value[key], depth + 1)}


def read(text, ours=True):
    """The recipe in a text, or None where it is refused; every other ending is a failure."""
    started = time.process_time()
    try:
        marked = parse(text, "r.yaml")
        values = marked.value
        made = recipe.parse(marked, "r") if ours else recipe.load(to_recipe(marked), name="r")
    except LuthierError as fault:
        line = " ".join(str(fault).split())
        assert len(line) < 1300 and line
        for number in re.findall(r"\br\.yaml:(\d+)", fault.where or ""):
            assert (
                1 <= int(number) <= text.count("\n") + text.count("\r") + text.count("\x85") + 1 + text.count("\u2028")
            ), line
        return None
    finally:
        assert time.process_time() - started < 10
    again = parse(to_yaml(values), "r.yaml")
    assert again.value == values and repr(again.value) == repr(values)
    return made


def same(one, other):
    assert {n: s.config() for n, s in one.steps.items()} == {n: s.config() for n, s in other.steps.items()}
    assert (one.seed, one.hardware, one.data) == (other.seed, other.hardware, other.data)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_recipes(seed, times, tell):
    rng, valid, count = random.Random(seed), 0, times(80, 1500)
    for _ in range(count):
        made = read(mutated(rng, rng.choice(OURS)))
        if made is not None:
            valid += 1
            same(made, recipe.parse(parse(made.to_yaml(), "r.yaml"), "r"))
    assert valid
    tell(f"recipes by mutated text: {count}, {valid} of them valid and read back the same")


@pytest.mark.parametrize("seed", range(2))
def test_recipes_with_other_values(seed, times, tell):
    """By structure, as from Python: the same readers without a text."""
    rng, valid, count = random.Random(seed), 0, times(80, 1500)
    seeds = [parse(text).value for text in OURS]
    for _ in range(count):
        value = rng.choice(seeds)
        for _ in range(rng.randint(1, 2)):
            value = changed(rng, value)
        try:
            made = recipe.parse(mark(value, "recipe"), "r")
        except LuthierError:
            continue
        valid += 1
        same(made, recipe.parse(parse(made.to_yaml(), "r.yaml"), "r"))
    assert valid
    tell(f"recipes by mutated values: {count}, {valid} of them valid and read back the same")


def test_mutated_mergekit_files(times, tell):
    rng, valid, count = random.Random(9), 0, times(200, 4000)
    for _ in range(count):
        valid += read(mutated(rng, rng.choice(KIT)), ours=False) is not None
    assert valid
    tell(f"mergekit files: {count}, {valid} of them valid")


def test_mutated_assignments(times, tell):
    rng, count = random.Random(5), times(200, 4000)
    words = [
        "math",
        "steps",
        "data",
        "set",
        "train",
        "share",
        "lr",
        "vary",
        "seed",
        "hardware",
        "use",
        "sums",
        "",
        "a.b",
    ]
    text = "luthier: 1\ndata: {sums: {source: 'text:stdlib'}}\nsteps:\n  math: {use: tune.lift, model: a/b, data: sums,"
    for _ in range(count):
        key = ".".join(rng.choice(words) for _ in range(rng.randint(1, 4)))
        assignment = mutated(rng, f"{key}={rng.choice(NASTY)}") if rng.random() < 0.3 else f"{key}={rng.choice(NASTY)}"
        marked = parse(text + " train: {steps: 2}}\n", "r.yaml")
        try:
            assign(marked, assignment)
            recipe.parse(marked, "r")
        except LuthierError as fault:
            assert str(fault)
    tell(f"assignments: {count}")


def test_raw_letters(times, tell):
    rng, count = random.Random(7), times(1000, 30_000)
    letters = "ab1:- \n\t\"'[]{}&*!|>%@`#,?.~0xe+_<=\\/\0\x07\x85\u2028\ufeffé𝄞"
    for _ in range(count):
        text = "".join(rng.choice(letters) for _ in range(rng.randint(0, 40)))
        head = rng.choice(["", "luthier: 1\n", "luthier: 1\nsteps:\n  "])
        assert read(head + text) is None
    tell(f"raw letters as recipes: {count}")


def test_raw_bytes(tmp_path, times, tell):
    rng, path, count = random.Random(8), tmp_path / "r.yaml", times(150, 4000)
    for _ in range(count):
        raw = bytearray(rng.choice(OURS).encode()[: rng.randint(1, 600)])
        for _ in range(rng.randint(0, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(bytes(raw))
        try:
            recipe.load(path)
        except LuthierError as fault:
            assert str(path) in str(fault) or "recipe" in str(fault)
    tell(f"raw bytes as recipes: {count}")
