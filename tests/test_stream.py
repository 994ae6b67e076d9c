"""Streams: the canonical grid, what is refused, what is written."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.checkpoint.expert import open_expert
from luthier.checkpoint.reader import Checkpoint
from luthier.engine import stream, taking
from luthier.engine.pieces import CHUNK, Inputs, Memory
from luthier.engine.stream import plan_transform, run_transform, transform_tensors
from luthier.errors import LuthierError
from luthier.fields import thaw
from luthier.kit.context import Context
from luthier.merge.breadcrumbs import Breadcrumbs
from luthier.merge.iso_c import IsoC
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.merge.ties import Ties
from luthier.merge.tsv import Tsv
from luthier.shapes import Transform
from luthier.testing import tiny

WIDE = {"vocab_size": 2300, "hidden_size": 32}


class Looks(Transform):
    """Notes what it is shown; gives the base."""

    by: str = "element"

    @property
    def granularity(self):
        return self.by

    def survey(self, inputs, ctx):
        return [(p.name, p.start, tuple(p.base.shape)) for p in inputs.pieces()]

    def transform(self, tensors, ctx):
        assert all(e.shape == tensors.base.shape and e.dtype == torch.float32 for e in tensors.experts)
        ctx.emit("piece", name=tensors.name, start=tensors.start, depth=tensors.depth, role=tensors.role)
        return tensors.base


class Swaps(Transform):
    """Turns the rows of what belongs to a unit upside down; `fault` breaks its promise."""

    by: str = "group"
    of: str = "layer"
    fault: str = ""

    @property
    def granularity(self):
        return self.by

    @property
    def unit(self):
        return self.of

    def survey(self, inputs, ctx):
        for group in inputs.pieces():
            ctx.emit("group", unit=group.unit, layer=group.layer, names=tuple(group.pieces))
        return None

    def transform(self, tensors, ctx):
        made = {n: p.base.flip(0) if tensors.unit else p.base for n, p in tensors.pieces.items()}
        if self.fault == "more":
            return made | {"other": torch.zeros(1)}
        if self.fault == "less":
            return dict(list(made.items())[1:])
        return {n: t[None] for n, t in made.items()} if self.fault == "wide" else made


class Drops(Transform):
    """Leaves the head out."""

    def plan(self, inputs):
        left = {n: t for n, t in inputs.tensors.items() if "lm_head" not in n}
        return dataclasses.replace(inputs, tensors=left, config={**inputs.config, "tie_word_embeddings": True})

    def transform(self, tensors, ctx):
        return tensors.base


class Plans(Transform):
    """Gives what `made` says, with `config` changed: the mean of what it is shown."""

    made: dict[str, Any]
    config: dict[str, Any] | None = None
    roles = ("base",)

    def plan(self, inputs):
        return inputs.giving(thaw(self.made), thaw(self.config))

    def transform(self, tensors, ctx):
        shown = [*([] if tensors.base is None else [tensors.base]), *tensors.experts]
        ctx.emit("made", name=tensors.name, place=(tensors.role, tensors.depth, tensors.base is None, len(shown)))
        return torch.stack(shown).mean(0)


class Widens(Transform):
    """Adds rows to what has the vocabulary's; `rows` are planned, `given` are made."""

    rows: int = 3
    given: int = 3
    granularity = "tensor"
    roles = ("base",)

    def plan(self, inputs):
        made = {
            n: i._replace(shape=(i.shape[0] + self.rows, *i.shape[1:])) if i.role in ("embed", "head") else i
            for n, i in inputs.tensors.items()
        }
        size = inputs.config["vocab_size"] + self.rows
        return dataclasses.replace(inputs, tensors=made, config={**inputs.config, "vocab_size": size})

    def transform(self, tensors, ctx):
        more = self.given if tensors.role in ("embed", "head") else 0
        return torch.nn.functional.pad(tensors.base, (0, 0) * (tensors.base.dim() - 1) + (0, more))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = tiny.checkpoint(root / "base", 0, **WIDE)
    return [base, *(tiny.expert_of(base, seed, root / f"e{seed}") for seed in (1, 2))]


def opened(folders):
    base = Checkpoint.open(folders[0])
    return base, [open_expert(f, base) for f in folders[1:]]


def test_the_grid_of_elements():
    size = 2 * CHUNK + 5
    tensors = {"model.layers.1.w": torch.arange(size).float().view(1, size), "model.norm.weight": torch.ones(3)}
    seen = []
    ctx = Context(watch=lambda e: seen.append((e["name"], e["start"])) if e["kind"] == "piece" else None)
    made = transform_tensors(Looks(), tensors, [tensors], ctx)
    assert seen == [("model.layers.1.w", s) for s in (0, CHUNK, 2 * CHUNK)] + [("model.norm.weight", 0)]
    assert all(torch.equal(made[n], tensors[n]) for n in tensors)


@pytest.mark.parametrize(
    ("by", "shapes"),
    [("row", [(64, 10), (36, 10), (1, 7), (64, 6)]), ("tensor", [(100, 10), (7,), (4, 16, 6)])],
)
def test_the_grid_of_rows_and_tensors(by, shapes):
    tensors = {"a": torch.randn(100, 10), "b": torch.randn(7), "c": torch.randn(4, 16, 6)}
    method = Looks(by=by)
    inputs = stream._prepare(method, Memory(tensors), [Memory(tensors)], torch.device("cpu"), 1 << 30, 1)
    seen = [shape for _, _, shape in method.survey(inputs, Context())]
    assert seen == shapes
    made = transform_tensors(method, tensors, [tensors], Context())
    assert all(torch.equal(made[n], tensors[n]) for n in tensors)


def test_single_numbers_and_transposed_tensors():
    tensors = {"scale": torch.tensor(3.0), "turned": torch.arange(6.0).view(2, 3).T, "none": torch.zeros(0, 4)}
    for by in ("element", "row", "tensor"):
        made = transform_tensors(Looks(by=by), tensors, [tensors], Context())
        assert all(torch.equal(made[n], tensors[n]) for n in tensors)


@pytest.mark.parametrize(
    ("by", "of", "what"), [("heap", "layer", "granularity 'heap'"), ("group", "limb", "unit 'limb'")]
)
def test_a_granularity_nobody_streams(by, of, what):
    with pytest.raises(LuthierError, match=f"unknown {what}"):
        transform_tensors(Swaps(by=by, of=of), {"w": torch.zeros(2)}, [{"w": torch.zeros(2)}], Context())


def test_groups_are_whole_units_in_one_order():
    names = [f"model.layers.{i}.{n}" for i in (1, 0) for n in ("mlp.up_proj.weight", "self_attn.q_proj.weight",
             "mlp.down_proj.weight", "input_layernorm.weight")]  # fmt: skip
    tensors = {n: torch.randn(6, 4) for n in ["model.norm.weight", *names]}
    shown = {}
    for of in ("attention", "mlp", "layer"):
        seen = shown[of] = []
        ctx = Context(watch=lambda e, seen=seen: seen.append((e["unit"], e["layer"], e["names"])))
        made = transform_tensors(Swaps(of=of), tensors, [tensors], ctx)
        assert all(
            torch.equal(made[n], tensors[n].flip(0) if made[n].ne(tensors[n]).any() else tensors[n]) for n in made
        )
        assert {n for n in made if not torch.equal(made[n], tensors[n])} == {n for u, _, ns in seen if u for n in ns}
    down, up = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert ("mlp", 1, (down, up)) in shown["mlp"] and ("", None, ("model.norm.weight",)) in shown["mlp"]
    assert ("", 1, ("model.layers.1.input_layernorm.weight",)) in shown["mlp"]
    assert ("attention", 0, ("model.layers.0.self_attn.q_proj.weight",)) in shown["attention"]
    assert [(u, layer, len(ns)) for u, layer, ns in shown["layer"]] == [("", None, 1), ("layer", 1, 4), ("layer", 0, 4)]


def test_what_lies_outside_units_comes_in_stretches():
    """A large embedding is never held whole beside a lock of small layers, and the memory asked for says so."""
    embedding, up = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    tensors = {n: torch.randn(shape) for n, shape in ((embedding, (3000, 50)), (up, (6, 4)), ("lm_head.weight", (0,)))}
    inputs = stream._prepare(Swaps(), Memory(tensors), [Memory(tensors)], torch.device("cpu"), 1 << 30, 1)
    inputs = dataclasses.replace(inputs, batch=CHUNK)
    assert inputs.held == 2 * CHUNK and inputs.steps == 4
    parts = [next(iter(group.pieces.values())) for group in inputs.pieces() if not group.unit]
    assert [(part.start, part.base.numel()) for part in parts] == [(0, CHUNK), (CHUNK, CHUNK), (2 * CHUNK, 18928)]
    assert torch.equal(torch.cat([part.base for part in parts]), tensors[embedding].flatten())
    made = transform_tensors(Swaps(), tensors, [tensors], Context())
    assert torch.equal(made[embedding], tensors[embedding]) and torch.equal(made[up], tensors[up].flip(0))


def test_a_scale_that_misses_a_tensor_is_refused_before_anything_is_read(folders):
    base, experts = opened(folders)
    with pytest.raises(LuthierError, match="^scale: no pattern matches '"):
        plan_transform(Ties(scale={"*.mlp.*": 0.5}), base, experts)


def test_groups_stream_like_they_do_in_memory(folders, tmp_path):
    base, experts = opened(folders)
    weights = [load_file(f / "model.safetensors") for f in folders]
    expected = transform_tensors(Swaps(), weights[0], weights[1:], Context())
    for threads in (1, 2):
        out = run_transform(Swaps(), base, experts, tmp_path / f"out{threads}", Context(), threads=threads)
        made = load_file(out / "model.safetensors")
        assert made.keys() == expected.keys() and all(torch.equal(made[n], expected[n]) for n in made)
    largest = max(sum(i.numel for i in base.tensors.values() if i.layer == n) for n in (0, 1))
    alone = max(i.numel for i in base.tensors.values())
    plan = plan_transform(Swaps(), base, experts, threads=1)
    assert plan.memory_bytes == taking.FLOOR + max(largest, alone) * taking.HELD * 3


def renamed(names, layers):
    """{output's name: names it is made from}: the tensors outside the layers, and these layers, or lists of them."""
    made = {n: n for n in names if ".layers." not in n}
    for to, of in enumerate(layers):
        for name in (n for n in names if ".layers.0." in n):
            there = [(None, name.replace(".0.", f".{i}.", 1)) for i in (of if isinstance(of, list) else [of])]
            made[name.replace(".0.", f".{to}.", 1)] = there
    return made


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("deep") / "base", 0, num_hidden_layers=4)


def test_layers_go_move_and_join(deep, tmp_path):
    from transformers import AutoModelForCausalLM

    base, seen = Checkpoint.open(deep), {}
    method = Plans(made=renamed(base.tensors, [3, [1, 2]]), config={"num_hidden_layers": 2})
    ctx = Context(watch=lambda e: seen.update({e["name"]: e["place"]}) if e["kind"] == "made" else None)
    out = run_transform(method, base, [], tmp_path / "out", ctx)
    model, ids = AutoModelForCausalLM.from_pretrained(deep), torch.arange(12)[None]
    kept, other = model.model.layers[3], model.model.layers[2]
    joined = model.model.layers[1]
    with torch.no_grad():
        for mine, yours in zip(joined.parameters(), other.parameters(), strict=True):
            mine.copy_((mine + yours) / 2)
    kept.self_attn.layer_idx, joined.self_attn.layer_idx = 0, 1
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList([kept, joined]), 2
    small = AutoModelForCausalLM.from_pretrained(out)
    assert small.config.num_hidden_layers == 2 and Checkpoint.open(out).tensors.keys() == method.made.keys()
    torch.testing.assert_close(small(ids).logits, model(ids).logits)
    assert seen["model.layers.1.mlp.up_proj.weight"] == ("mlp.up", 1.0, False, 2)
    assert seen["model.layers.0.mlp.up_proj.weight"] == ("mlp.up", 0.0, False, 1)
    weights = load_file(deep / "model.safetensors")
    made, written = transform_tensors(method, weights, [], Context()), load_file(out / "model.safetensors")
    assert made.keys() == written.keys() and all(torch.equal(made[n], written[n]) for n in made)


def test_an_output_is_made_from_the_models_it_names(folders, tmp_path):
    base, experts = opened(folders)
    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    made = {norm: norm, up: [(1, up)], "lm_head.weight": [(0, "model.embed_tokens.weight"), (None, "lm_head.weight")]}
    seen = {}
    ctx = Context(watch=lambda e: seen.update({e["name"]: e["place"][2:]}) if e["kind"] == "made" else None)
    out = load_file(run_transform(Plans(made=made), base, experts, tmp_path / "out", ctx) / "model.safetensors")
    weights = [load_file(f / "model.safetensors") for f in folders]
    assert seen == {norm: (False, 3), up: (True, 1), "lm_head.weight": (False, 2)} and out.keys() == made.keys()
    assert torch.equal(out[up], weights[2][up])
    both = weights[1]["model.embed_tokens.weight"], weights[0]["lm_head.weight"]
    assert torch.equal(out["lm_head.weight"], (both[1] + both[0]) / 2)
    assert torch.allclose(out[norm], sum(w[norm] for w in weights) / 3)


def test_shapes_may_change_where_tensors_are_whole(deep, tmp_path):
    from transformers import AutoModelForCausalLM

    base = Checkpoint.open(deep)
    out = run_transform(Widens(), base, [], tmp_path / "out", Context())
    model = AutoModelForCausalLM.from_pretrained(out)
    rows = model.get_input_embeddings().weight
    old = load_file(deep / "model.safetensors")["model.embed_tokens.weight"]
    assert len(rows) == len(old) + 3 and torch.equal(rows[:-3], old) and not rows[-3:].any()
    with pytest.raises(LuthierError, match=r"lm_head.weight': gave the shape \[\d+, 32\] for"):
        run_transform(Widens(given=2), base, [], tmp_path / "bad", Context())
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("made", "what"),
    [({"a": [(None, "nowhere")]}, "tensor 'nowhere': there is no such tensor"),
     ({"a": [(0, "lm_head.weight")]}, "there is no expert 0"),
     ({"lm_head.weight": [(None, "lm_head.weight"), (None, "model.norm.weight")]}, "needs granularity tensor or")],
)  # fmt: skip
def test_outputs_that_cannot_be_made(deep, tmp_path, made, what):
    with pytest.raises(LuthierError, match=what):
        run_transform(Plans(made=made), Checkpoint.open(deep), [], tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "what"), [("less", "gave nothing for"), ("more", "gave more"), ("wide", "gave the shape")]
)
def test_a_group_comes_back_whole(folders, tmp_path, fault, what):
    base, experts = opened(folders)
    with pytest.raises(LuthierError, match=what):
        run_transform(Swaps(fault=fault), base, experts, tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


def looked(tensors, **changes):
    inputs = stream._prepare(Looks(), Memory(tensors), [Memory(tensors)], torch.device("cpu"), 1 << 30, 1)
    return list(dataclasses.replace(inputs, **changes).pieces(sample=True))


def test_a_sample_is_one_entry_in_seventeen():
    tensors = {"a": torch.arange(CHUNK + 100).float(), "b": torch.zeros(7)}
    assert [(p.name, p.start) for p in looked(tensors)] == [("a", 0), ("a", CHUNK), ("b", 0)]
    assert torch.cat([p.base for p in looked(tensors)][:2]).tolist() == [
        *range(0, CHUNK, 17), *range(CHUNK, CHUNK + 100, 17)]  # fmt: skip


def test_a_sample_of_much_is_one_piece_in_sixteen():
    places = [(p.name, p.start // CHUNK) for p in looked({"a": torch.zeros(5 * CHUNK), "b": torch.zeros(4095 * CHUNK)})]
    assert places == [("a", 0), *(("b", n) for n in range(11, 4095, 16))]


def test_a_sample_of_rows_is_one_row():
    seen = looked({"a": torch.zeros(130, 24), "b": torch.zeros(100)}, granularity="row")
    assert [(p.name, p.start, tuple(p.base.shape)) for p in seen] == [
        ("a", 0, (1, 91)), ("a", 64 * 24, (1, 91)), ("a", 128 * 24, (1, 3)), ("b", 0, (1, 6))]  # fmt: skip


def test_depth_and_role_reach_the_method(folders, tmp_path):
    seen = {}
    ctx = Context(watch=lambda e: seen.update({e["name"]: (e["depth"], e["role"])}) if e["kind"] == "piece" else None)
    base, experts = opened(folders)
    run_transform(Looks(), base, experts, tmp_path / "out", ctx)
    assert seen["model.layers.0.self_attn.q_proj.weight"] == (0.0, "attn.q")
    assert seen["model.layers.1.mlp.down_proj.weight"] == (1.0, "mlp.down")
    assert seen["lm_head.weight"] == (None, "head")


def test_what_is_written_loads_in_transformers(folders, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, experts = opened(folders)
    out = run_transform(Linear(), base, experts, tmp_path / "out", Context(), card="# Mean\n")
    model = AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    assert (out / "README.md").read_text().startswith("# Mean\n\nLoad it with plain transformers:")
    one, two = (load_file(f / "model.safetensors") for f in folders[1:])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(model.state_dict()[name], (one[name] + two[name]) / 2)


def test_dtype_of_the_output(folders, tmp_path):
    base, experts = opened(folders)
    out = run_transform(TaskArithmetic(), base, experts, tmp_path / "out", Context(), dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert plan_transform(TaskArithmetic(), base, experts, dtype=torch.bfloat16).write_bytes == base.nbytes // 2


def test_plan_reads_no_weights(folders):
    base, experts = opened(folders)
    base.read_flat = experts[0].read_flat = None  # type: ignore[method-assign]
    plan = plan_transform(Ties(), base, experts, memory=1 << 20, threads=3)
    assert [t.name for t in plan.tensors] == list(base.tensors)
    assert plan.write_bytes == base.nbytes and plan.read_bytes == 3 * base.nbytes
    assert plan.seconds > 0 and plan.memory_bytes > 0


@pytest.mark.parametrize(("use", "shape", "memory", "said"), [
    (TaskArithmetic(), (4000, 4000), 512 << 20, None), (Tsv(), (400, 400), 512 << 20, None),
    (Tsv(), (4000, 4000), 512 << 20, "merge.tsv takes the largest tensor of every model whole"),
    (TaskArithmetic(), (4000, 4000), 1 << 20, "merge.task_arithmetic takes one piece of every model whole"),
])  # fmt: skip
def test_a_plan_says_where_more_is_needed_than_given(use, shape, memory, said):
    source = Memory({"model.layers.0.mlp.up_proj.weight": torch.zeros(1).expand(shape)})
    notes = plan_transform(use, source, [source] * 2, memory=memory, threads=1).notes
    assert notes == () if said is None else len(notes) == 1 and notes[0].endswith(said)


def test_memory_does_not_grow_with_experts():
    """The batch shrinks as models are added, down to one piece."""
    tensors = {"a": torch.zeros(8)}
    for experts in (1, 3, 15):
        for threads in (1, 4):
            held = [Memory(tensors)] * experts
            inputs = stream._prepare(Looks(), held[0], held, torch.device("cpu"), 64 << 20, threads)
            assert inputs.batch % CHUNK == 0 and CHUNK <= inputs.batch <= stream.BATCH
            assert inputs.threads * inputs.batch * taking.HELD * (experts + 1) <= 64 << 20
    assert stream._prepare(Looks(), held[0], held, torch.device("cpu"), 1, 1).batch == CHUNK


def test_the_plan_knows_what_is_cubic():
    """Twice the width is eight times the work of a decomposition, and four times that of a pass."""

    def seconds(method, width):
        held = [Memory({"model.layers.0.mlp.up_proj.weight": torch.zeros(width, width)})] * 3
        return plan_transform(method, held[0], held[1:], threads=1).seconds

    for method, growth in ((Ties(), 4), (IsoC(), 8), (Tsv(), 8)):
        assert seconds(method, 4096) / seconds(method, 2048) == pytest.approx(growth, rel=0.05)
    assert seconds(Tsv(), 2048) > seconds(IsoC(), 2048) > 2 * seconds(Ties(), 2048)


def test_whole_tensors_in_hand_at_once_are_bounded():
    """Few at once rather than more memory; one tensor larger than that comes alone, small ones beside others."""
    tensors = {"large": torch.zeros(1 << 20), **{f"small {n}": torch.zeros(1 << 17) for n in range(16)}}
    held = [Memory(tensors)] * 2
    whole = (1 << 20) * 2 * taking.HELD
    for several in (4, 1, 0.5, 0.25, 0.01):
        memory = int(several * whole * 4 / 3) + 16  # a quarter is for order statistics
        inputs = stream._prepare(Looks(by="tensor"), held[0], held[1:], torch.device("cpu"), memory, 4)
        lock, now, seen = threading.Lock(), [], []

        def look(piece, lock=lock, now=now, seen=seen):
            with lock:
                now.append(piece.base.numel() * 2)
                seen.append((sum(now), len(now)))
            time.sleep(0.005)
            with lock:
                now.remove(piece.base.numel() * 2)
            return piece.name

        assert list(inputs.each(look)) == list(tensors) and inputs.held == 1 << 21
        assert all(held <= inputs.most or count == 1 for held, count in seen)
        most = min(4, max(1, int(inputs.most) >> 18))
        assert (1 < max(count for _, count in seen) <= most) if most > 1 else seen == [(held, 1) for held, _ in seen]


MERGE = """
import sys
from pathlib import Path
import luthier
from luthier.catalogue import load
from luthier.checkpoint.reader import Checkpoint
from luthier.engine.stream import run_transform
from luthier.kit.context import Context
base, *experts = map(Checkpoint.open, sorted(Path(sys.argv[2]).iterdir()))
method = load(sys.argv[1])
def peak():  # of this program alone; what getrusage gives may be the parent's
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
run_transform(method, base, experts[:1], sys.argv[3], Context(), memory=1, threads=1)  # everything is imported now
before = peak()
run_transform(method, base, experts, sys.argv[3], Context(), memory=48 << 20, threads=2)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("use", [
    "merge.linear", "merge.ties", "merge.dare", "merge.della", "merge.breadcrumbs", "merge.cabs", "merge.pcb",
    "merge.model_stock", "merge.widen",
])  # fmt: skip
def test_a_merge_stays_below_the_memory_it_was_given(use, tmp_path):
    """Seventeen models of 3.2 million entries in a process of its own, which grows by 48 MiB at most."""
    gen = torch.Generator().manual_seed(0)
    for number in range(17):
        (folder := tmp_path / "models" / f"m{number:02}").mkdir(parents=True)
        tensor = (torch.randn(1600, 2000, generator=gen) * 0.02).bfloat16()
        save_file({"model.layers.0.mlp.up_proj.weight": tensor}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    command = [sys.executable, "-c", MERGE, use, str(tmp_path / "models"), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown <= 48


@pytest.mark.parametrize("method", [
    Ties(density=0.4, scope="tensor", on_tie="plus"),
    Breadcrumbs(density=0.4, gamma=0.1, scope="tensor"),
])  # fmt: skip
def test_what_one_piece_shows_whole_is_read_once(folders, tmp_path, monkeypatch, method):
    """Trims of tensor after tensor survey large ones alone; both ways give the same bytes."""
    base, *experts = map(Checkpoint.open, folders)
    reads, read_flat = [], Checkpoint.read_flat

    def counted(self, name, start, count):
        reads.append((self.path, name))
        return read_flat(self, name, start, count)

    monkeypatch.setattr(Checkpoint, "read_flat", counted)
    once = run_transform(method, base, experts, tmp_path / "once", Context())
    small = [name for name, info in base.tensors.items() if len(info.shape) == 1]
    assert small and all(reads.count((base.path, name)) == 1 for name in small)
    monkeypatch.setattr(Inputs, "at_once", lambda self, name: False)
    reads.clear()
    twice = run_transform(method, base, experts, tmp_path / "twice", Context())
    assert all(reads.count((base.path, name)) > 1 for name in base.tensors)
    assert (once / "model.safetensors").read_bytes() == (twice / "model.safetensors").read_bytes()


def test_a_plan_may_leave_tensors_out(folders, tmp_path):
    base, experts = opened(folders)
    out = run_transform(Drops(), base, experts, tmp_path / "out", Context())
    assert set(load_file(out / "model.safetensors")) == set(base.tensors) - {"lm_head.weight"}
    assert Checkpoint.open(out).config["tie_word_embeddings"] is True


def test_integers_are_the_bases(tmp_path):
    def folder(name, value):
        path = tiny.checkpoint(tmp_path / name, 0)
        tensors = load_file(path / "model.safetensors") | {"model.steps": torch.full((70_000,), value)}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    base = Checkpoint.open(folder("base", 7))
    out = run_transform(Linear(), base, [Checkpoint.open(folder("e", 9))], tmp_path / "out", Context())
    assert load_file(out / "model.safetensors")["model.steps"].tolist() == [7] * 70_000
    made = transform_tensors(Linear(), {"n": torch.tensor([1]), "w": torch.zeros(2)},
                             [{"n": torch.tensor([2]), "w": torch.ones(2)}], Context())  # fmt: skip
    assert made["n"].tolist() == [1] and made["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [Ties(), Linear()])
def test_values_that_are_not_finite(folders, tmp_path, method, value):
    bad = tiny.expert_of(folders[0], 5, tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    base, experts = opened([*folders, bad])
    with pytest.raises(LuthierError) as fault:
        run_transform(method, base, experts, tmp_path / "out", Context(), threads=2)
    text = str(fault.value)
    assert "bad/model.safetensors" in text and "model.layers.1.mlp.up_proj.weight" in text and "\n" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_sums_that_overflow_are_finite_values():
    big = {"w": torch.full((8,), 3e38)}
    assert transform_tensors(TaskArithmetic(), big, [big], Context())["w"].tolist() == big["w"].tolist()


def test_other_models_are_refused(folders, tmp_path):
    base, experts = opened(folders)

    def refused(other, *words):
        with pytest.raises(LuthierError) as fault:
            run_transform(Linear(), base, [*experts, Checkpoint.open(other)], tmp_path / "out", Context())
        assert all(w in str(fault.value) for w in words), fault.value
        assert not (tmp_path / "out").exists()

    words = "set tokenizer", "lm_head", "[2200, 32]", "[2300, 32]", str(folders[0])
    refused(tiny.checkpoint(tmp_path / "v", 1, **{**WIDE, "vocab_size": 2200}), *words)
    refused(tiny.checkpoint(tmp_path / "i", 1, **WIDE, intermediate_size=64), "one architecture", "mlp.")
    refused(tiny.checkpoint(tmp_path / "more", 1, **WIDE, num_hidden_layers=3), "layers.2.", "is in this model only")
    refused(tiny.checkpoint(tmp_path / "less", 1, **WIDE, num_hidden_layers=1), "layers.1.", "has no such tensor")
    refused(tiny.checkpoint(tmp_path / "tied", 1, **WIDE, tie_word_embeddings=True), "lm_head", "has no such tensor")


def test_roles_are_needed(folders, tmp_path):
    base, experts = opened(folders)
    with pytest.raises(LuthierError, match="merge.ties: needs a base"):
        run_transform(Ties(), None, experts, tmp_path / "out", Context())
    with pytest.raises(LuthierError, match="merge.linear: needs at least one expert"):
        run_transform(Linear(), base, [], tmp_path / "out", Context())
    out = run_transform(Linear(), None, experts[:1], tmp_path / "out", Context())
    assert load_file(out / "model.safetensors").keys() == base.tensors.keys()


def test_experts_may_be_deltas_and_adapters(folders, tmp_path):
    """A LoRA adapter as an expert is the model with the adapter merged in."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folders[0]), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    base, experts = opened([folders[0], tmp_path / "adapter"])
    out = run_transform(TaskArithmetic(), base, experts, tmp_path / "out", Context())
    made = load_file(out / "model.safetensors")
    for name, p in merged.named_parameters():
        assert torch.allclose(made[name], p, atol=1e-6), name
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(made[name], load_file(Path(folders[0]) / "model.safetensors")[name])


def test_torchs_own_threads_are_given_back(folders, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        base, experts = opened(folders)
        run_transform(Linear(), base, experts, tmp_path / "out", Context())
        assert torch.get_num_threads() == 2
        with pytest.raises(LuthierError):
            run_transform(Ties(weights=[1.0]), base, experts, tmp_path / "out", Context())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_progress_counts_pieces(folders, tmp_path):
    seen = []
    ctx = Context(watch=lambda e: seen.append(e) if e["kind"] == "progress" else None)
    base, experts = opened(folders)
    run_transform(Linear(), base, experts, tmp_path / "out", ctx)
    pieces = sum(-(-t.numel // CHUNK) for t in base.tensors.values())
    assert seen[-1]["done"] == seen[-1]["total"] == pieces and seen[0]["what"] == "merge.linear"
