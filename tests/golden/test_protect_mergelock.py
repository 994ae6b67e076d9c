"""The lock against explicit matrices, what is exact under rotary embeddings and what is not, and the key."""

import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, distance, logits_of, model_of, weights_of
from luthier.checkpoint.heads import attention_of, units_of
from luthier.checkpoint.reader import Checkpoint, TensorInfo
from luthier.checkpoint.resolve import resolve
from luthier.engine.pieces import Inputs, Memory
from luthier.engine.stream import plan_transform, transform_tensors
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.secret import Secret
from luthier.merge.linear import Linear
from luthier.protect.mergelock import ENTRY, MergeLock

KEY = b"a key of sixteen bytes"


def lock(weights, config, key=KEY, **fields):
    ctx = Context(roles={"key": Secret(key)})
    return transform_tensors(MergeLock(**fields), weights, [], ctx, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_outputs_stay(name):
    """fp32, and fp64 of weights that were rounded to fp32; the lock moves the weights by their own size."""
    model = model_of(name)
    weights, config = weights_of(model), model.config.to_dict()
    locked = lock(weights, config)
    assert distance(weights, locked) > 0.5 * distance(weights, {n: 0 * t for n, t in weights.items()})
    for dtype, allowed in ((torch.float32, 2e-5), (torch.float64, 4e-6)):
        before, after = (logits_of(model, w, dtype) for w in (weights, locked))
        assert before.abs().max() > 1
        assert (before - after).abs().max() < allowed, dtype


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("part", ["qk", "vo", "mlp", "heads"])
def test_every_part_alone(name, part):
    model = model_of(name)
    weights, config = weights_of(model), model.config.to_dict()
    locked = lock(weights, config, parts=[part])
    before, after = (logits_of(model, w, torch.float64) for w in (weights, locked))
    assert (before - after).abs().max() < 4e-6
    roles = {"qk": ("q", "k", "query_key_value", "c_attn"), "vo": ("v_", "o_", "dense", "query_key_value", "c_"),
             "mlp": ("mlp", "experts"), "heads": ("attn", "attention")}[part]  # fmt: skip
    moved = [n for n in weights if not torch.equal(weights[n], locked[n])]
    assert moved and all(any(r in n for r in roles) for n in moved), moved


@pytest.mark.parametrize("name", FAMILIES)
def test_the_key_gives_the_model_back(name):
    model = model_of(name)
    weights, config = weights_of(model), model.config.to_dict()
    locked = lock(weights, config)
    back = lock(locked, {**config, ENTRY: entry()}, invert=True)
    assert max(float((back[n] - weights[n]).abs().max()) for n in weights) < 2e-7
    other = lock(locked, config, b"another key, as long", invert=True)
    assert distance(other, weights) > 0.5 * distance(locked, weights)


def entry(key=KEY, parts=("qk", "vo", "mlp", "heads"), condition=10.0):
    return {"key": Secret(key).fingerprint, "parts": list(parts), "condition": condition}


# The slow twin: every number from the key by hashlib, every matrix written out, in numpy.


def drawn(label, *shape):
    key = hashlib.blake2b(KEY, person=b"luthier key").digest()
    raw = hashlib.shake_256(key + label.encode()).digest(8 * math.prod(shape))
    words = [int.from_bytes(raw[8 * i : 8 * i + 8], "little") & ((1 << 62) - 1) for i in range(math.prod(shape))]
    return np.array(words, dtype=object).reshape(shape)


def share(label, *shape):
    return ((drawn(label, *shape) + 1) / 2.0**62).astype(float)


def turn_of(label, size):
    first, second = share(label, 2, *size)
    q, r = np.linalg.qr(np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None, :]


def spread(label, *shape):
    return 10.0 ** (share(label, *shape) - 0.5)


def place(label, count):
    words = drawn(label, count)
    return sorted(range(count), key=lambda i: words[i])


def twin(weights, layer, heads=4, groups=2, width=16, units=48):
    """One layer of the tiny Llama, head by head."""
    w = {n.split(".", 3)[3]: t.double().numpy() for n, t in weights.items() if f"layers.{layer}." in n}
    q, k, v, o = (w[f"self_attn.{p}_proj.weight"] for p in "qkvo")
    out = {f"self_attn.{p}_proj.weight": np.zeros_like(w[f"self_attn.{p}_proj.weight"]) for p in "qkvo"}
    half, phase = width // 2, 2 * np.pi * share(f"{layer} phase", groups, width // 2)
    length = spread(f"{layer} length", groups, width // 2)
    values = turn_of(f"{layer} value first", (groups, width, width)) * spread(
        f"{layer} value stretch", groups, 1, width
    )
    values = values @ turn_of(f"{layer} value last", (groups, width, width))
    for new_group, group in enumerate(place(f"{layer} groups", groups)):
        keys, queries = np.zeros((width, width)), np.zeros((width, width))
        for f in range(half):
            z = length[group, f] * np.exp(1j * phase[group, f])
            for matrix, number in ((keys, z), (queries, 1 / z.conjugate())):
                matrix[f, f] = matrix[f + half, f + half] = number.real
                matrix[f + half, f], matrix[f, f + half] = number.imag, -number.imag
        old, new = slice(group * width, (group + 1) * width), slice(new_group * width, (new_group + 1) * width)
        out["self_attn.k_proj.weight"][new] = keys @ k[old]
        out["self_attn.v_proj.weight"][new] = values[group] @ v[old]
        per = heads // groups
        for new_member, member in enumerate(place(f"{layer} members {new_group}", per)):
            a, b = group * per + member, new_group * per + new_member
            old, new = slice(a * width, (a + 1) * width), slice(b * width, (b + 1) * width)
            out["self_attn.q_proj.weight"][new] = queries @ q[old]
            out["self_attn.o_proj.weight"][:, new] = o[:, old] @ np.linalg.inv(values[group])
    factor = spread(f"{layer} mlp scale", units) * np.sign(share(f"{layer} mlp sign", units) - 0.5)
    gate, up, down = (w[f"mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
    order = place(f"{layer} mlp units", units)
    out["mlp.gate_proj.weight"] = np.stack([gate[u] for u in order])
    out["mlp.up_proj.weight"] = np.stack([factor[u] * up[u] for u in order])
    out["mlp.down_proj.weight"] = np.stack([down[:, u] / factor[u] for u in order], 1)
    return out


def test_the_slow_twin_with_explicit_matrices():
    model = model_of("llama")
    weights = weights_of(model)
    locked = lock(weights, model.config.to_dict())
    for layer in (0, 1):
        for name, expected in twin(weights, layer).items():
            assert np.abs(locked[f"model.layers.{layer}.{name}"].numpy() - expected).max() < 1e-6, name


def complex_matrix(numbers, width):
    """The matrix that multiplies pair f, half layout over the first entries, by the f-th number."""
    half, made = len(numbers), np.eye(width)
    for f, z in enumerate(numbers):
        made[f, f] = made[f + half, f + half] = z.real
        made[f + half, f], made[f, f + half] = z.imag, -z.imag
    return made


def test_the_slow_twin_behind_a_qk_norm():
    """Quarter turns: which pairs turn is the layer's, the sign a head's; the gains of turned pairs change places."""
    model = model_of("qwen3")
    weights = weights_of(model)
    locked = lock(weights, model.config.to_dict(), parts=["qk"])
    for layer in (0, 1):
        stem, swap = f"model.layers.{layer}.self_attn", share(f"{layer} swap", 8) > 0.5
        sign = np.sign(share(f"{layer} sign", 2, 8) - 0.5)
        z = sign * np.where(swap, 1j, 1)
        for part, heads in (("q", 4), ("k", 2)):
            name = f"{stem}.{part}_proj.weight"
            rows = weights[name].double().numpy().reshape(heads, 16, 32)
            expected = np.stack([complex_matrix(z[i * 2 // heads], 16) @ head for i, head in enumerate(rows)])
            assert np.abs(locked[name].numpy().reshape(heads, 16, 32) - expected).max() < 1e-6
            gains = weights[f"{stem}.{part}_norm.weight"].numpy()
            places = [i + 8 if swap[i] else i for i in range(8)] + [i if swap[i] else i + 8 for i in range(8)]
            assert locked[f"{stem}.{part}_norm.weight"].tolist() == gains[places].tolist()


def test_the_slow_twin_of_fused_and_partly_rotary_heads():
    """GPT-NeoX: q, k, v of a head lie together, half of it turns, the rest takes any matrix; biases go along."""
    model = model_of("gpt_neox")
    weights = weights_of(model)
    locked = lock(weights, model.config.to_dict(), parts=["qk"])
    for layer in (0, 1):
        stem = f"gpt_neox.layers.{layer}.attention.query_key_value"
        z = spread(f"{layer} length", 4, 2) * np.exp(2j * np.pi * share(f"{layer} phase", 4, 2))
        rest = turn_of(f"{layer} rest first", (4, 4, 4)) * spread(f"{layer} rest stretch", 4, 1, 4)
        rest = rest @ turn_of(f"{layer} rest last", (4, 4, 4))
        before, after = (
            np.concatenate([w[f"{stem}.weight"].double().numpy(), w[f"{stem}.bias"].double().numpy()[:, None]], 1)
            .reshape(4, 3, 8, 33) for w in (weights, locked)
        )  # fmt: skip
        for head in range(4):
            keys, queries = complex_matrix(z[head], 8), complex_matrix(1 / z[head].conj(), 8)
            keys[4:, 4:], queries[4:, 4:] = rest[head], np.linalg.inv(rest[head]).T
            for part, matrix in enumerate((queries, keys, np.eye(8))):
                assert np.abs(after[head, part] - matrix @ before[head, part]).max() < 2e-6


@pytest.mark.parametrize("kind", ["general", "orthogonal", "diagonal"])
def test_published_matrices_on_queries_and_keys_break_rotary_models(kind):
    """arXiv 2509.01548 (general), 2511.10712 (orthogonal) and 2503.07661 (diagonal) are exact without rotary
    positions and change the output with them."""
    generator = torch.Generator().manual_seed(3)
    for name, exact in (("gpt2", True), ("llama", False)):
        model = model_of(name)
        weights, config = weights_of(model), model.config.to_dict()
        changed = dict(weights)
        for layer in (0, 1):
            tensors = {n: t for n, t in Memory(weights, config).tensors.items() if t.layer == layer}
            at = attention_of(config, tensors)
            heads = at.read(changed)
            first, last = (torch.linalg.qr(torch.randn(at.groups, at.width, at.width, generator=generator).double()).Q
                           for _ in "12")  # fmt: skip
            scale = 0.4 + 2 * torch.rand(at.groups, at.width, generator=generator).double()
            matrix = {"orthogonal": first, "diagonal": torch.diag_embed(scale),
                      "general": first @ torch.diag_embed(scale) @ last}[kind]  # fmt: skip
            queries = torch.linalg.inv(matrix).transpose(1, 2)[:, None] @ heads.q_GMHX
            made = type(heads)(queries, matrix @ heads.k_GHX, heads.v_GHX, heads.o_GMHX)
            changed |= {n: t.float() for n, t in at.write(made, changed).items()}
        gap = (logits_of(model, weights, torch.float64) - logits_of(model, changed, torch.float64)).abs().max()
        assert gap < 1e-5 if exact else gap > 0.05, (name, gap)


def test_behind_a_qk_norm_only_quarter_turns_are_exact():
    """A turn by another angle, exact in Llama, changes the output of Qwen3."""
    model = model_of("qwen3")
    weights, config = weights_of(model), model.config.to_dict()
    no_norm = {n: t for n, t in weights.items() if "_norm" not in n or "layernorm" in n}
    made = lock(no_norm, config, parts=["qk"])  # without the gains it is taken for a Llama
    moved = {**weights, **made}
    assert (logits_of(model, weights) - logits_of(model, moved)).abs().max() > 0.02


def test_the_condition_is_bounded():
    weights, config = weights_of(model_of("llama")), model_of("llama").config.to_dict()
    for condition in (1.0, 10.0):
        method, secret = MergeLock(condition=condition), Secret(KEY)
        matrices = method._matrix(secret, "any", 20, 16)
        found = torch.linalg.cond(matrices)
        assert found.max() <= condition * (1 + 1e-9) and found.max() > condition**0.7 - 1e-9
        locked = lock(weights, config, parts=["mlp"], condition=condition)
        rows = [w["model.layers.0.mlp.up_proj.weight"].norm(dim=1).sort().values for w in (weights, locked)]
        assert torch.allclose(rows[0], rows[1]) == (condition == 1.0)


def test_merging_fails_unless_all_are_locked_by_one_key():
    model = model_of("llama")
    base, config = weights_of(model), model.config.to_dict()
    generator = torch.Generator().manual_seed(4)
    expert = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}

    def mean(first, second):
        return transform_tensors(Linear(), None, [first, second], Context())

    expected = logits_of(model, mean(base, expert))
    locked = lock(expert, config)
    assert (logits_of(model, mean(base, locked)) - expected).abs().max() > 0.5
    assert (logits_of(model, mean(lock(base, config), locked)) - expected).abs().max() < 1e-5
    assert (logits_of(model, mean(lock(base, config, b"another key, as long"), locked)) - expected).abs().max() > 0.5


def test_a_wrong_key_or_another_lock_is_refused():
    model = model_of("llama")
    weights, config = weights_of(model), model.config.to_dict()
    locked = {**config, ENTRY: entry()}
    with pytest.raises(LuthierError, match="locked with key '[0-9a-f]{16}', given is '[0-9a-f]{16}'"):
        lock(weights, locked, b"another key, as long", invert=True)
    with pytest.raises(LuthierError, match="locked with condition 10.0, given is 5.0"):
        lock(weights, locked, condition=5.0, invert=True)
    with pytest.raises(LuthierError, match="locked with parts"):
        lock(weights, locked, parts=["mlp"], invert=True)
    with pytest.raises(LuthierError, match="locked already"):
        lock(weights, locked)
    with pytest.raises(LuthierError, match="needs a key"):
        transform_tensors(MergeLock(), weights, [], Context(), config)


def planned(fields, config):
    memory = Memory(weights_of(model_of("llama")), config)
    inputs = Inputs(memory, (), memory.tensors, config=config, roles={"key": Secret(KEY)})
    return MergeLock(**fields).plan(inputs)


def test_what_the_output_says_of_the_lock():
    config = model_of("llama").config.to_dict()
    locked = planned({}, config)
    assert locked.config[ENTRY] == entry() and len(locked.notes) == 3
    assert "protect.restore" in " ".join(locked.notes)
    undone = planned({"invert": True}, locked.config)
    assert undone.config == config and undone.notes == ()
    unsure = planned({"invert": True}, config)
    assert unsure.config == config and "wrong key" in unsure.notes[0]


@pytest.mark.parametrize(
    ("config", "parts", "says"),
    [
        ({"model_type": "llama", "num_attention_heads": None}, ["vo"], "how many heads"),
        ({"model_type": "llama", "num_attention_heads": 3}, ["qk"], "are no 3 heads"),
        ({"model_type": "olmo", "num_attention_heads": 4, "clip_qkv": 8.0}, ["heads"], "clip_qkv"),
        ({"model_type": "deepseek_v3", "num_attention_heads": 4}, ["qk"], "deepseek_v3 has no heads"),
        ({"model_type": "lama", "num_attention_heads": 4}, ["qk"], "unknown model family 'lama'"),
    ],
)
def test_refused_by_name(config, parts, says):
    weights = weights_of(model_of("llama"))
    if config["model_type"] == "deepseek_v3":
        weights = {n.replace("q_proj", "q_b_proj"): t for n, t in weights.items()}
    with pytest.raises(LuthierError, match=says):
        plan_transform(MergeLock(parts=parts), Memory(weights, config), [], roles={"key": Secret(KEY)})


def test_a_model_of_one_layer():
    """Every layer is looked at by itself, without what lies outside the layers."""
    model = model_of("llama", num_hidden_layers=1)
    weights, config = weights_of(model), model.config.to_dict()
    assert plan_transform(MergeLock(), Memory(weights, config), [], roles={"key": Secret(KEY)})
    locked = lock(weights, config)
    assert (logits_of(model, weights, torch.float64) - logits_of(model, locked, torch.float64)).abs().max() < 4e-6


def test_experts_of_deepseek_are_locked_without_their_attention():
    names = [f"model.layers.0.mlp.{e}.{p}_proj.weight" for e in ("experts.0", "experts.1", "shared_experts")
             for p in ("gate", "up", "down")]  # fmt: skip
    weights = {n: torch.randn((4, 6) if "down" not in n else (6, 4)) for n in names}
    memory = Memory(weights, {"model_type": "deepseek_v3"})
    found = units_of(memory.config, memory.tensors)
    assert [u.label for u in found] == ["mlp.experts.0", "mlp.experts.1", "mlp.shared_experts"]
    locked = lock(weights, memory.config, parts=["mlp"])
    x = torch.randn(5, 6)
    for stem in {n.rsplit(".", 2)[0] for n in names}:
        before, after = (
            (torch.nn.functional.silu(x @ w[f"{stem}.gate_proj.weight"].T) * (x @ w[f"{stem}.up_proj.weight"].T))
            @ w[f"{stem}.down_proj.weight"].T for w in (weights, locked)
        )  # fmt: skip
        assert torch.allclose(before, after, atol=1e-5) and not torch.equal(
            weights[f"{stem}.gate_proj.weight"], locked[f"{stem}.gate_proj.weight"]
        )


def test_our_own_decoder():
    from luthier.model import build_model

    sizes = {"vocab_size": 276, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 48}  # fmt: skip
    model = build_model({**sizes, "slots": {"ffn": {"use": "block.dense"}}}, 1)
    weights, config = weights_of(model), model.config.to_dict()
    locked = lock(weights, config)
    assert distance(weights, locked) > 1
    assert (logits_of(model, weights) - logits_of(model, locked)).abs().max() < 1e-5
    other = {**config, "slots": {"ffn@1": {"use": "block.coe", "set": {}}}}
    with pytest.raises(LuthierError, match="slots.ffn@1: what block.coe computes"):
        lock(weights, other)
    lock(weights, other, parts=["qk", "vo", "heads"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_a_share_that_the_model_passes_over_is_refused_by_name(name):
    """transformers turns the whole head whatever the key says, so pairs by the key would not turn together."""
    from luthier.protect.restore import Restore

    model = model_of(name)
    weights = weights_of(model)
    config = {**model.config.to_dict(), "partial_rotary_factor": 0.5}
    for parts in (["qk"], ["vo"], ["heads"]):
        with pytest.raises(LuthierError, match=f"50% of a head turn, where {name} turns 100%"):
            lock(weights, config, parts=parts)
    with pytest.raises(LuthierError, match="turns 100%"):
        transform_tensors(Restore(), weights, [weights], Context(), config)
    before, after = (logits_of(model, w, torch.float64) for w in (weights, lock(weights, config, parts=["mlp"])))
    assert (before - after).abs().max() < 4e-6
    lock(weights, {**config, "partial_rotary_factor": 1.0})


@pytest.mark.slow
@torch.no_grad()
def test_the_outputs_of_a_real_model_stay(tmp_path):
    """SmolLM2-135M locked in fp32: logits after 64 words within 2e-4, where its weights moved by their own length."""
    base = resolve("smollm2")
    out = MergeLock().apply(model=base, key=Secret(KEY), dtype="fp32").save(tmp_path / "out")
    ids = torch.randint(0, base.config["vocab_size"], (1, 64), generator=torch.Generator().manual_seed(0))

    def logits(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return model(ids, use_cache=False).logits

    before, after = logits(base.path), logits(out)
    name = "model.layers.7.self_attn.v_proj.weight"
    first, second = base.read(name).float(), Checkpoint.open(out).read(name)
    assert (first - second).norm() > 0.5 * first.norm() and before.abs().max() > 1
    assert (before - after).abs().max() <= 2e-4


@pytest.mark.parametrize("says", [
    {"rotary_pct": 1.0, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"partial_rotary_factor": 0.5}, {"rotary_pct": 1.0, "partial_rotary_factor": 0.5},
    {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}, "rotary_pct": 0.25},
])  # fmt: skip
def test_shares_that_differ_are_refused_by_name(says):
    """transformers takes that of rope_parameters, then rotary_pct, and passes over partial_rotary_factor."""
    model = model_of("gpt_neox", rotary_pct=0.5)
    config = {"model_type": "gpt_neox", "num_attention_heads": 4, "num_hidden_layers": 2, **says}
    with pytest.raises(LuthierError, match="config.json: says that .*of a head turn, where gpt_neox turns"):
        lock(weights_of(model), config)


@pytest.mark.parametrize("says", [
    {"rotary_pct": 0.5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"rotary_pct": 1.0}, {},
])  # fmt: skip
def test_the_share_of_gpt_neox_wherever_config_json_gives_it(says):
    model = model_of("gpt_neox", **{"rotary_pct": 0.25, **says})
    weights = weights_of(model)
    locked = lock(weights, {"model_type": "gpt_neox", "num_attention_heads": 4, "num_hidden_layers": 2, **says})
    before, after = (logits_of(model, w, torch.float64) for w in (weights, locked))
    assert distance(weights, locked) > 1 and (before - after).abs().max() < 4e-6


@pytest.mark.parametrize("bad", ["abc", [1], {}, 2.0, -1, float("inf"), True])
@pytest.mark.parametrize("key", ["partial_rotary_factor", "rotary_pct", "rope_parameters", "rope_scaling"])
def test_a_rotary_share_that_is_none(key, bad):
    if key.startswith("rope") and not bad:
        pytest.skip("says nothing")
    for name in ("llama", "gpt_neox"):
        model = model_of(name)
        with pytest.raises(LuthierError, match="config.json: .*(no share of a head that turns|no map)"):
            lock(weights_of(model), {**model.config.to_dict(), "rope_parameters": None, key: bad})


@pytest.mark.parametrize("name", ["llama, tied, biases", "qwen3", "olmo2", "gpt2", "gpt_neox", "mixtral"])
def test_a_tensor_that_does_not_fit_its_layer_is_refused_by_name(name):
    """One line, whichever tensor it is and however it is off. What units read and write may have any width."""
    model = model_of(name)
    weights, config = weights_of(model), model.config.to_dict()
    told = 0
    for key, tensor in weights.items():
        if not re.search(r"[.](0)[.].*(attn|attention|mlp|block_sparse_moe)[.]", key) or "gate.weight" in key:
            continue
        for bad in (tensor[:-1], tensor.t(), tensor.flatten(), tensor[None], tensor.sum(), torch.cat((tensor, tensor))):
            free = re.search(r"down_proj.weight|w2.weight|c_fc.weight", key) and bad.shape[1:] == tensor.shape[1:]
            if bad.shape != tensor.shape and not free:
                with pytest.raises(LuthierError, match="has the shape|are no 4 heads|no feed-forward block"):
                    lock({**weights, key: bad}, config)
                told += 1
    assert told > 20


def test_an_attention_with_a_part_twice_is_refused():
    from luthier.checkpoint.anatomy import role_of

    model = model_of("llama")
    weights = {n: t for n, t in weights_of(model).items() if ".0.self_attn" in n}
    weights["model.layers.0.other.self_attn.q_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"]
    layer = {n: TensorInfo(n, t.dtype, tuple(t.shape), Path(), 0, 0, *role_of("llama", n)) for n, t in weights.items()}
    with pytest.raises(LuthierError, match="no heads that can be told apart"):
        attention_of(model.config.to_dict(), layer)


def test_interleaved_pairs_lie_side_by_side():
    """No family with separate heads here interleaves: the layout itself, by hand."""
    from luthier.checkpoint.heads import pairs
    from luthier.kit.symmetry import rotary

    found = pairs({"model_type": "deepseek_v3"}, 4)
    assert found.tolist() == [[0, 1], [2, 3]]
    assert pairs({"model_type": "gpt_neox"}, 16).tolist() == [[0, 2], [1, 3]]
    made = rotary(torch.tensor([[1j, 2 + 0j]], dtype=torch.complex128), torch.eye(6).repeat(1, 1, 1).double(), found)[0]
    assert made[:2, :2].tolist() == [[0, -1], [1, 0]] and made[2:, 2:].tolist() == np.diag([2, 2, 1, 1]).tolist()


@pytest.mark.parametrize(("name", "sizes", "says"), [
    ("phi3, three quarters turn", {}, {"partial_rotary_factor": 0.75}),
    ("phi3", {}, {}),
    ("glm4", {}, {}),
    ("glm", {"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.25}),
])  # fmt: skip
def test_shares_as_older_configs_say_them(name, sizes, says):
    """Beside rope_parameters, or not at all where the family has a share of its own."""
    model = model_of(name, **sizes)
    weights, config = weights_of(model), model.config.to_dict()
    older = {k: v for k, v in config.items() if k not in ("rope_parameters", "partial_rotary_factor")} | says
    locked = lock(weights, older)
    assert distance(weights, locked) > 1
    assert (logits_of(model, weights, torch.float64) - logits_of(model, locked, torch.float64)).abs().max() < 4e-6


@pytest.mark.parametrize(("changes", "name", "rows", "says"), [
    ({"num_key_value_heads": 4}, None, 0, "rows .'qkv': 64. are no 4 heads"),
    ({"num_key_value_heads": 3}, None, 0, "are no 4 heads"),
    ({}, "self_attn.qkv_proj", 1, "rows .'qkv': 65. are no 4 heads"),
    ({}, "mlp.gate_up_proj", 1, r"has the shape \[97, 32\], its block's others ask for \[96, 32\]"),
    ({}, "mlp.gate_up_proj", -48, r"down_proj.weight: has the shape \[32, 48\], its block's others ask for \[32, 24\]"),
])  # fmt: skip
def test_fused_rows_that_do_not_fit_are_refused_by_name(changes, name, rows, says):
    model = model_of("phi3")
    weights, config = weights_of(model), model.config.to_dict() | changes
    key = f"model.layers.1.{name}.weight"
    weights |= {key: torch.zeros(len(weights[key]) + rows, 32)} if name else {}
    with pytest.raises(LuthierError, match=says):
        lock(weights, config)
