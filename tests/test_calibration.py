"""Transforms that look at models with data: what the door gives, what it refuses, what it leaves behind."""

import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

import luthier
from luthier import recipe, recipe_run
from luthier.checkpoint.delta import Delta
from luthier.checkpoint.expert import open_expert
from luthier.checkpoint.lora import LowRank
from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.roles import live_places
from luthier.checkpoint.totals import Totals
from luthier.engine.stream import run_transform, transform_tensors
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.merge.fisher import Fisher
from luthier.shapes import Transform
from luthier.testing import tiny

GOLD = Fisher(examples=3, labels="gold", max_length=24)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    base = tiny.checkpoint(folder / "base", vocab_size=tiny.VOCAB)
    for n in (1, 2):
        tiny.expert_of(base, n, folder / f"expert{n}")
    for name, line in (("a", "{} is the number before {}.\n"), ("b", "the fox jumps over {} dogs and {} cats\n")):
        (folder / f"{name}.txt").write_text("".join(line.format(i, i + 1) for i in range(150)))
    return folder


def data(*names):
    return [tiny.text_data(train=4, test=0, name=name) for name in names]


def merged(folder, method, base, experts, sources):
    ctx = Context(step="calibration", roles={"data": sources})
    opened = Checkpoint.open(base)
    out = run_transform(method, opened, [open_expert(e, opened) for e in experts], folder, ctx)
    return load_file(out / "model.safetensors")


def alike(mine, other):
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_deltas_and_adapters_are_looked_at_without_a_copy(home, tmp_path):
    """An expert as a checkpoint, as a delta and as an adapter on the base gives the same merge."""
    base, one = Checkpoint.open(home / "base"), Checkpoint.open(home / "expert1")
    Delta.between(base, one).save(tmp_path / "delta")
    gen = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj"
    low = LowRank(torch.randn(2, 32, generator=gen), torch.randn(48, 2, generator=gen) / 8, 0.5)
    Delta({f"{name}.weight": low}).save(tmp_path / "adapter")
    model, tokenizer = tiny.llama(0), tiny.tokenizer()
    with torch.no_grad():
        model.get_submodule(name).weight.add_(low.delta())
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    whole, parts = (
        merged(tmp_path / f"out{i}", GOLD, home / "base", pair, data("text"))
        for i, pair in enumerate([[home / "expert1", tmp_path / "full"], [tmp_path / "delta", tmp_path / "adapter"]])
    )
    alike(parts, whole)


def test_one_source_for_each_or_one_for_all(home, tmp_path):
    experts = [home / "expert1", home / "expert2"]
    both, each = (
        merged(tmp_path / name, GOLD, home / "base", experts, sources)
        for name, sources in (("both", data("x")), ("each", data("x", "x")))
    )
    alike(both, each)
    for count in (0, 3):
        with pytest.raises(LuthierError, match=f"{count} sources of data for 2 experts; give one for each"):
            merged(tmp_path / "none", GOLD, home / "base", experts, data("x", "y", "z")[:count])
    assert not (tmp_path / "none").exists()
    with pytest.raises(LuthierError, match="0 subjects for 1 expert;"):
        transform_tensors(GOLD, None, [{"w": torch.ones(1)}], Context(roles={"data": data("x")}))


class Looks(Transform):
    """Gives the base back, and remembers what it was shown."""

    roles = ("base", "experts*", "data*")
    seen: ClassVar[list] = []

    def survey(self, inputs, ctx):
        for subject in (ctx.role("base"), *ctx.role("subjects")):
            with subject.open() as (model, tokenizer):
                kind = {p.dtype for p in model.parameters()}
                self.seen.append((subject.name, model.training, kind, tokenizer("a b")["input_ids"] != []))
        self.seen.append([source.name for source in ctx.role("data")])

    def transform(self, tensors, ctx):
        assert ctx.scratch.is_dir()
        return tensors.base


def test_what_a_method_finds(tmp_path):
    """The base and the experts in eval mode and in fp32, with tokenizers; a source for each expert."""
    base = tiny.checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    tiny.expert_of(base, 1, tmp_path / "one")
    Looks.seen.clear()
    made = merged(tmp_path / "out", Looks(), base, [tmp_path / "one", base], data("x"))
    shown = [(name, False, {torch.float32}, True) for name in ("base", "one", "base")]
    assert Looks.seen == [*shown, ["x", "x"]]
    assert all(torch.equal(t, made[n]) for n, t in load_file(base / "model.safetensors").items())


def test_slices_and_other_vocabularies_are_refused(home, tmp_path):
    """The statistics are of the models as they are on disk, not as a layout would have them."""
    from luthier.engine.layout import Layout
    from luthier.engine.stream import plan_transform

    opened = Checkpoint.open(home / "base")
    with pytest.raises(LuthierError, match="merge.fisher: looks at the models as they are; merge without slices"):
        plan_transform(Fisher(), opened, [opened], layout=Layout(tokenizer="base"))


class Broken:
    """Data that end with an error after the first items."""

    name, test, scored = "broken", (), False
    train = (tiny.item(prompt="a", messages=None), tiny.item(text="a b c"), None)


def test_scratch_is_gone_whatever_happens(home, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    experts = [home / "expert1", home / "expert2"]
    merged(tmp_path / "good", GOLD, home / "base", experts, data("x"))
    assert not [p.name for p in (tmp_path / "good").iterdir() if "scratch" in p.name]
    with pytest.raises(Exception, match="'NoneType'|NoneType"):
        merged(tmp_path / "bad", GOLD, home / "base", experts, [Broken()])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good"]


def test_memory_is_freed_between_experts(home, tmp_path, monkeypatch):
    """No model is alive while the next one is loaded."""
    import gc

    from transformers import LlamaForCausalLM

    from luthier.engine import subject

    alive, real = [], subject.load

    def load(source):
        alive.append(sum(type(o) is LlamaForCausalLM for o in gc.get_objects()))
        return real(source)

    monkeypatch.setattr(subject, "load", load)
    merged(tmp_path / "out", GOLD, home / "base", [home / "expert1", home / "expert2", home / "base"], data("x"))
    assert len(alive) == 3 and len(set(alive)) == 1


def test_fused_experts_by_their_names_on_disk(tmp_path):
    """A mixture whose experts lie in one tensor in memory: the Fisher of each lies under its name on disk."""
    config = MixtralConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        models = [tiny.redraw_(MixtralForCausalLM(config).eval(), seed) for seed in (1, 2)]
    for i, model in enumerate(models):
        tiny.save(model, tmp_path / f"m{i}")
    names = Checkpoint.open(tmp_path / "m0").tensors
    places = live_places(models[0], names)
    assert set(places) == set(names) and "lm_head.weight" not in names
    assert live_places(models[0], ["lm_head.weight"])["lm_head.weight"].live == places["model.embed_tokens.weight"].live
    made = merged(tmp_path / "out", GOLD, tmp_path / "m0", [tmp_path / "m0", tmp_path / "m1"], data("x"))
    tensors = [load_file(tmp_path / f"m{i}" / "model.safetensors") for i in range(2)]
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    share = (made[name] - tensors[1][name]) / (tensors[0][name] - tensors[1][name])
    assert share.min() > -0.01 and share.max() < 1.01 and share.std() > 0.05
    live = [m.model.layers[0].mlp.experts.gate_up_proj for m in models]
    for p in live:
        assert torch.equal(p[1, 24:], tensors[live.index(p)][name]) if False else p.shape == (2, 48, 16)


def test_names_without_the_outermost_prefix():
    model = tiny.llama()
    assert live_places(model, ["layers.0.mlp.up_proj.weight", "norm.weight", "nowhere.weight"]).keys() == {
        "layers.0.mlp.up_proj.weight", "norm.weight",
    }  # fmt: skip


def test_totals(tmp_path):
    made = Totals(tmp_path / "t", {"a": (2, 3), "b": (4,), "none": (0,)})
    made.add_("a", torch.tensor([[1.0, 2.0], [3.0, 4.0]]), start=1)
    made.add_("a", torch.full((2, 3), 0.5))
    made.add_("b", torch.full((4,), 2.0, dtype=torch.bfloat16))
    assert made.read("a").tolist() == [[0.5, 1.5, 2.5], [3.5, 4.5, 0.5]]
    assert made.read_flat("a", 2, 3).tolist() == [2.5, 3.5, 4.5] and made.read_flat("none", 0, 0).numel() == 0
    assert made.norm(["b"]) == 4.0 and made.norm() ** 2 == pytest.approx(16 + 41.5)
    assert made.below(dict.fromkeys(made.tensors, 2.0)) == 3
    assert torch.equal(load_file(tmp_path / "t" / "model.safetensors")["a"], made.read("a"))
    for wrong in ((-1, 1), (5, 2)):
        with pytest.raises(ValueError, match="no entries"):
            made.read_flat("a", *wrong)


STEP = "  m: {{use: merge.fisher, experts: [{0}/expert1, {0}/expert2], data: [{1}], set: {{examples: {2}}}}}\n"


def written(home, sources="a, b", examples=4, chars=60):
    split = "split: {by: window, train: 40, test: 4}"
    lines = [
        f'  {n}: {{source: "text:{home}/{n}.txt", set: {{chars: {chars if n == "b" else 60}}}, {split}}}\n'
        for n in "ab"
    ]
    return "luthier: 1\ndata:\n" + "".join(lines) + "steps:\n" + STEP.format(home, sources, examples)


def load(folder, text):
    (folder / "r.yaml").write_text(text)
    return recipe.load(folder / "r.yaml")


def test_a_recipe_step_hangs_on_its_data(home, tmp_path):
    """What is done is kept; other data, or fields, are another step. The plan counts the passes."""
    first = recipe_run.run(load(tmp_path, written(home)), folder=tmp_path / "run")
    again = recipe_run.run(load(tmp_path, written(home)), folder=tmp_path / "run")
    assert (first.kept, again.kept) == ((), ("m",))
    assert [d["name"] for d in first.record("m").inputs["data"]] == ["a", "b"]
    flops = first.record("m").metrics["flops"]
    assert flops == pytest.approx(2 * 3 * 2 * 4 * 33184 * 22, rel=0.25)  # 3 passes, 2 experts, 4 items of 22 tokens
    other = recipe_run.run(load(tmp_path, written(home, chars=61)), folder=tmp_path / "run")
    twice = recipe_run.run(load(tmp_path, written(home, sources="a, a")), folder=tmp_path / "run")
    assert other.kept == twice.kept == ()
    assert len({r.hash for r in (x.record("m") for x in (first, other, twice))}) == 3
    assert "data: [a, b]" in (tmp_path / "r.yaml").read_text() or first.recipe.steps["m"].roles["data"] == ("a", "b")


@pytest.mark.parametrize(("sources", "says"), [("a, b, a", "3 sources of data for 2 experts"), ("c", "unknown data")])
def test_a_recipe_with_the_wrong_data_is_refused(home, tmp_path, sources, says):
    with pytest.raises(LuthierError, match=says) as fault:
        load(tmp_path, written(home, sources=sources))
    assert "r.yaml:6" in str(fault.value)


def test_killed_in_the_middle_it_leaves_nothing_and_is_done_again(home, tmp_path):
    (tmp_path / "r.yaml").write_text(written(home, examples=40))
    env = os.environ | {"LUTHIER_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "luthier", "run", "r.yaml", "--folder", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = tmp_path / "run" / "steps"
    deadline = time.monotonic() + 60
    while not list(steps.glob(".m.tmp-*/.scratch-*/fisher*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (steps / "m").exists()
    done = recipe_run.run(tmp_path / "r.yaml", folder=tmp_path / "run")
    assert done.kept == () and [p.name for p in steps.iterdir()] == ["m"]


def test_from_python(home, tmp_path):
    source = {"source": f"text:{home}/a.txt", "set": {"chars": 60}, "split": {"by": "window", "train": 8, "test": 2}}
    experts = [home / "expert1", home / "expert2"]
    merge = luthier.load("merge.fisher", examples=2).apply(experts=experts, data=source)
    assert merge.plan().write_bytes > 0
    out = merge.save(tmp_path / "out")
    assert "data0" in (out / "README.md").read_text()
    with pytest.raises(LuthierError, match="'data' is missing"):
        Fisher().apply(experts=experts)
    with pytest.raises(LuthierError, match="3 sources of data"):
        Fisher().apply(experts=experts, data=[source] * 3).plan()
