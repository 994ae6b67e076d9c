"""Deltas to the byte, LoRA adapters against PEFT itself, and experts that read alike."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from luthier.checkpoint.delta import Change, Delta, same_bits
from luthier.checkpoint.expert import open_expert
from luthier.checkpoint.lora import LowRank
from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.writer import save_model
from luthier.errors import LuthierError
from luthier.testing import tiny

Q = "model.layers.0.self_attn.q_proj.weight"


def equal(a, b) -> bool:
    return set(a) == set(b) and all(same_bits(a[n], b[n]) for n in a)


def copy(tensors):
    return {n: t.clone() for n, t in tensors.items()}


def touched(tensors, share: float, seed: int = 0):
    """A copy in which about this share of the entries of each tensor has another value."""
    gen = torch.Generator().manual_seed(seed)
    made = copy(tensors)
    for t in made.values():
        mask = torch.rand(t.shape, generator=gen) < share
        t[mask] = torch.randn(int(mask.sum()), generator=gen).to(t.dtype)
    return made


@pytest.fixture
def pair(request, tmp_path):
    dtype = getattr(request, "param", torch.bfloat16)
    old = {n: t.detach() for n, t in tiny.llama(dtype=dtype).state_dict().items()}
    return old, touched(old, 0.05)


@pytest.mark.parametrize("share, kind", [(0.05, "sparse"), (1.0, "dense")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_apply_and_revert_restore_every_byte_also_through_the_disk(tmp_path, share, kind, dtype):
    old = {n: t.detach().to(dtype) for n, t in tiny.llama().state_dict().items()}
    new = touched(old, share)
    made = Delta.between(old, new, base="abc", steps=3)
    made.save(tmp_path / "d")
    delta = Delta.open(tmp_path / "d")
    assert delta.kind == made.kind == kind and delta.base == "abc" and delta.notes == {"steps": 3}
    assert delta.nbytes == made.nbytes
    state = copy(old)
    delta.apply_(state)
    assert equal(state, new)
    delta.revert_(state)
    assert equal(state, old)
    model = tiny.llama(dtype=dtype)
    delta.apply_(model)
    assert equal(model.state_dict(), new)


def test_the_size_of_a_sparse_delta_is_two_values_and_an_int32_an_entry(pair):
    old, new = pair
    delta = Delta.between(old, new)
    moved = sum(int((old[n].view(torch.int16) != new[n].view(torch.int16)).sum()) for n in old)
    assert all(c.index.dtype == torch.int32 for c in delta.changes.values() if c.index is not None)
    assert delta.kind == "sparse" and delta.nbytes == moved * (2 + 2 + 4)


def test_special_values_are_bytes_like_others():
    old = {"w": torch.tensor([0.0, -0.0, 1.0, float("nan"), 5.0, 5.0, 5.0, 5.0, 5.0])}
    new = {"w": torch.tensor([-0.0, -0.0, float("nan"), float("nan"), 5.0, 5.0, 5.0, 5.0, 5.0])}
    delta = Delta.between(old, new)
    assert delta.changes["w"].index.tolist() == [0, 2]
    state = copy(old)
    delta.apply_(state)
    assert equal(state, new)
    delta.revert_(state)
    assert equal(state, old)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool])
def test_tensors_of_any_dtype_have_a_delta(tmp_path, dtype):
    old = {"w": (torch.arange(60) % 2).view(6, 10).to(dtype)}
    new = {"w": old["w"].clone()}
    new["w"].view(-1)[13] = 0
    Delta.between(old, new).save(tmp_path / "d")
    delta, state = Delta.open(tmp_path / "d"), copy(old)
    delta.apply_(state)
    assert delta.changes["w"].index.tolist() == [13] and equal(state, new)


def test_the_smaller_of_the_two_forms_is_stored():
    """40 bf16 values: dense is 160 bytes, sparse 8 bytes an entry, so 19 are sparse and 20 dense."""
    old = {"w": torch.zeros(40, dtype=torch.bfloat16)}
    for count, kind in ((19, "sparse"), (20, "dense")):
        new = {"w": old["w"].clone()}
        new["w"][:count] = 1
        assert Delta.between(old, new).kind == kind and Delta.between(old, new).nbytes == min(count * 8, 160)


def test_nothing_changed_is_an_empty_delta(tmp_path, pair):
    old, _ = pair
    delta = Delta.between(old, copy(old))
    assert not delta.changes and delta.nbytes == 0
    delta.save(tmp_path / "d")
    Delta.open(tmp_path / "d").apply_(copy(old))


def test_another_base_is_noticed_and_left_alone(pair):
    old, new = pair
    delta = Delta.between(old, new)
    wrong = copy(old)
    last = list(delta.changes)[-1]
    wrong[last].view(-1)[delta.changes[last].index[0]] += 1
    before = copy(wrong)
    with pytest.raises(LuthierError, match=f"tensor '{last}' is not that of the base"):
        delta.apply_(wrong)
    assert equal(wrong, before)
    with pytest.raises(LuthierError, match="not that of a model this delta was applied to"):
        delta.revert_(copy(old))
    with pytest.raises(LuthierError, match="unknown tensor"):
        delta.apply_({})
    small = {n: t.view(-1)[:-1] for n, t in old.items()}
    with pytest.raises(LuthierError, match="the delta's is"):
        delta.apply_(small)


def test_two_models_of_other_shape_have_no_difference(pair):
    old, new = pair
    with pytest.raises(LuthierError, match="in one of the two only"):
        Delta.between(old, {Q: new[Q]})
    with pytest.raises(LuthierError, match="before"):
        Delta.between({Q: old[Q]}, {Q: new[Q][:-1]})


def test_lengths_of_the_changes(pair):
    old, new = pair
    for name, norm in Delta.between(old, new).norms().items():
        assert norm == pytest.approx(float((new[name].double() - old[name].double()).norm()))


DAMAGE = {
    "no delta": (lambda t, a: a.clear(), "not a delta"),
    "a value missing": (lambda t, a: t.pop(f"new:{Q}"), "missing or do not match"),
    "indices of another length": (lambda t, a: t.update({f"index:{Q}": t[f"index:{Q}"][1:]}), "do not match"),
    "floating indices": (lambda t, a: t.update({f"index:{Q}": t[f"index:{Q}"].float()}), "do not match"),
    "indices not ascending": (lambda t, a: t.update({f"index:{Q}": t[f"index:{Q}"].flip(0)}), "not ascending"),
    "indices beyond the tensor": (lambda t, a: a["shapes"].update({Q: [1, 2]}), "not ascending inside"),
    "indices below it": (lambda t, a: t[f"index:{Q}"].sub_(1000), "not ascending"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_deltas(tmp_path, pair, case):
    from safetensors.torch import load_file, save_file

    Delta.between(*pair).save(tmp_path / "d")
    file, about = tmp_path / "d" / "delta.safetensors", json.loads((tmp_path / "d" / "delta.json").read_text())
    tensors, (harm, word) = load_file(file), DAMAGE[case]
    harm(tensors, about)
    save_file({n: t.clone() for n, t in tensors.items()}, file)
    (tmp_path / "d" / "delta.json").write_text(json.dumps(about))
    with pytest.raises(LuthierError, match=word):
        Delta.open(tmp_path / "d")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_stretch_is_that_of_the_whole(data):
    size = data.draw(st.integers(1, 40))
    index = torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1)))), dtype=torch.int32)
    base = torch.randn(size, generator=torch.Generator().manual_seed(size))
    change = Change((size,), base[index.long()], torch.arange(100.0, 100 + len(index)), index)
    whole = base.clone()
    whole[index.long()] = change.new
    start = data.draw(st.integers(0, size))
    count = data.draw(st.integers(0, size - start))
    assert torch.equal(change.stretch(base[start : start + count], start), whole[start : start + count])


# --- experts


def test_a_delta_folder_reads_like_the_checkpoint_it_came_from(tmp_path):
    base = Checkpoint.open(tiny.checkpoint(tmp_path / "base", dtype=torch.bfloat16))
    for share in (0.05, 1.0):
        new = touched(dict(base.items()), share)
        Delta.between(base, new, base=base.hash()).save(tmp_path / f"d{share}")
        expert = open_expert(tmp_path / f"d{share}", base)
        assert list(expert.tensors) == list(base.tensors) and expert.n_params == base.n_params
        for name, info in expert.tensors.items():
            assert same_bits(expert.read(name), new[name])
            third = info.numel // 3
            assert same_bits(expert.read_flat(name, third, third), new[name].view(-1)[third : 2 * third])
        first = expert.hash()
        Delta.between(base, touched(new, 0.1, 9)).save(tmp_path / f"d{share}")
        assert len({first, base.hash(), open_expert(tmp_path / f"d{share}", base).hash()}) == 3
    with pytest.raises(LuthierError, match="no base is given"):
        open_expert(tmp_path / "d1.0")
    assert open_expert(base) is base and open_expert(expert) is expert
    assert open_expert(tmp_path / "base", base).hash() == base.hash()


def test_a_delta_of_another_model_is_refused_by_name(tmp_path):
    base = Checkpoint.open(tiny.checkpoint(tmp_path / "base"))
    wide = tiny.llama(hidden_size=40)
    Delta.between(wide, tiny.moved(wide, 1)).save(tmp_path / "wide")
    with pytest.raises(LuthierError, match=r"tensor 'model.embed_tokens.weight'.* the base's is \[276, 32\]"):
        open_expert(tmp_path / "wide", base)
    Delta({"model.layers.7.self_attn.q_proj.weight": Change((1,), torch.zeros(1), torch.ones(1))}).save(tmp_path / "n")
    with pytest.raises(LuthierError, match="unknown tensor .*did you mean"):
        open_expert(tmp_path / "n", base)


# --- LoRA, against PEFT


def lora(model, folder, seed=0, **config):
    """An adapter with random B on a copy of the model: its folder, and what PEFT makes of the weights."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.normal_(0, 0.2)
    adapted.save_pretrained(folder)
    return folder, dict(adapted.merge_and_unload().state_dict())


ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
        "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 20, "down_proj": 5},
    },
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "a module kept whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_reads_as_peft_merges_it(tmp_path, case):
    base = Checkpoint.open(tiny.checkpoint(tmp_path / "base"))
    folder, merged = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora", **ADAPTERS[case])
    expert = open_expert(folder, base)
    changed = 0
    for name in expert.tensors:
        got = expert.read(name)
        torch.testing.assert_close(got, merged[name], rtol=1e-6, atol=1e-6)
        changed += not torch.equal(got, base.read(name))
        parts = [expert.read_flat(name, s, min(50, got.numel() - s)) for s in range(0, got.numel(), 50)]
        assert torch.equal(torch.cat(parts), got.view(-1))
    delta, model = Delta.open(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    delta.apply_(model)
    assert all(torch.equal(model.state_dict()[n], expert.read(n)) for n in delta.changes)
    assert changed == (5 if case == "a module kept whole" else 3 if case == "embedding" else 4)


def test_an_adapter_on_transposed_weights(tmp_path):
    """GPT-2 keeps its matrices (in, out); its old files also lack the outer prefix."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    model.save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    folder, merged = lora(model, tmp_path / "lora", **targets)
    expert = open_expert(folder, Checkpoint.open(tmp_path / "base"))
    name = "transformer.h.1.attn.c_attn.weight"
    torch.testing.assert_close(expert.read(name), merged[name], rtol=1e-6, atol=1e-6)
    assert expert.tensors[name].role == "attn.qkv"


def test_low_rank_deltas_apply_and_revert(tmp_path):
    folder, merged = lora(tiny.llama(), tmp_path / "lora")
    delta, model = Delta.open(folder), tiny.llama()
    before = copy(model.state_dict())
    with pytest.raises(LuthierError, match="not that of a model this delta was applied to"):
        delta.revert_(model)
    delta.apply_(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6)
    delta.revert_(model)
    assert equal(model.state_dict(), before)
    assert delta.kind == "lowrank"
    norms = {n: float((merged[n].double() - before[n].double()).norm()) for n in delta.changes}
    assert delta.norms() == pytest.approx(norms, rel=1e-5)


def test_an_adapter_written_here_is_one_peft_loads(tmp_path):
    gen = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=gen)  # noqa: E731
    changes = {
        Q: LowRank(draw(3, 32), draw(32, 3), 0.37),
        "model.layers.1.mlp.up_proj.weight": LowRank(draw(5, 32), draw(48, 5), 2.0),
    }
    Delta(changes, notes={"base_model": "here"}).save(tmp_path / "lora")
    adapted = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "lora")).merge_and_unload()
    model = tiny.llama()
    Delta(changes).apply_(model)
    for (name, a), b in zip(adapted.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
    again = Delta.open(tmp_path / "lora")
    assert again.nbytes == 4 * (3 * 32 + 32 * 3 + 5 * 32 + 48 * 5) and again.notes == {"base_model": "here"}
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 5
    for name, change in changes.items():
        assert torch.equal(again.changes[name].a, change.a) and torch.equal(again.changes[name].b, change.b)
        assert again.changes[name].scale == pytest.approx(change.scale, rel=1e-12)


def test_what_an_adapter_cannot_hold_is_not_written_as_one(tmp_path):
    one = LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    for other in (LowRank(one.a, one.b, 1.0, transposed=True), LowRank(one.a, one.b, 1.0, full=torch.ones(3, 2))):
        with pytest.raises(LuthierError, match="one orientation"):
            Delta({"a.weight": one, "b.weight": other}).save(tmp_path / "lora")
    assert not list(tmp_path.iterdir())


REFUSED = {
    "IA3": ({"peft_type": "IA3"}, "only LORA"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "biases": ({"bias": "all"}, "bias"),
    "no rank": ({"r": None}, "numbers above 0"),
    "infinite": ({"lora_alpha": math.nan}, "JSON"),
    "a pattern that is none": ({"alpha_pattern": {"(": 1}}, "makes no sense"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_two_matrices_cannot_express(tmp_path, case):
    folder, _ = lora(tiny.llama(), tmp_path / "lora")
    change, word = REFUSED[case]
    config = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LuthierError, match=word):
        Delta.open(folder)


def test_a_delta_saved_over_a_model_folder_of_ours_replaces_it(tmp_path, pair):
    save_model(tmp_path / "out", tiny.llama())
    Delta.between(*pair).save(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".luthier", "delta.json", "delta.safetensors"}
