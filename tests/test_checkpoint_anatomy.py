"""Anatomy against the stock classes: every family of the table, built tiny and saved by transformers itself."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.checkpoint import anatomy
from luthier.checkpoint.anatomy import FAMILIES, disk_views, expert_of, places, role_of
from luthier.checkpoint.delta import Delta, same_bits
from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.writer import save_model
from luthier.errors import LuthierError

COMMON = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "n_group": 1,
    "topk_group": 1, "num_key_value_heads": 4, "n_shared_experts": 2,
}  # fmt: skip
SIZES = {
    "mixtral": {"num_local_experts": 3},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "n_inner": 24},
}
STOCK = sorted(set(FAMILIES) - {"luthier", "gemma3"})  # gemma3 itself is the one with a vision tower
MOE = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]


def build(family: str):
    sizes = SIZES["gpt2"] if family == "gpt2" else COMMON | SIZES.get(family, {})
    config = AutoConfig.for_model(family, **{**sizes, "vocab_size": 40})
    model = AutoModelForCausalLM.from_config(config)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
    return model


@pytest.mark.parametrize("family", STOCK)
def test_every_tensor_has_a_role_and_lies_where_the_table_says(tmp_path, family):
    model = build(family)
    model.save_pretrained(tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    roles = {n: (i.role, i.layer) for n, i in checkpoint.tensors.items()}
    assert not [n for n, (role, _) in roles.items() if role == "other"]
    assert {layer for _, layer in roles.values()} == {None, 0, 1, 2}
    assert {i.depth for i in checkpoint.tensors.values()} == {None, 0.0, 0.5, 1.0}
    views = disk_views(model)
    assert set(views) == set(checkpoint.tensors)
    assert all(same_bits(views[n].contiguous(), t) for n, t in checkpoint.items())


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """role → shape of one tensor of it."""
    return {role_of(family, n)[0]: p.shape for n, p in places(build(family)).items()}


def test_what_a_llama_calls_its_parts():
    layer = {
        "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "norm",
    }  # fmt: skip
    assert set(shapes("llama")) == layer | {"embed", "head"}
    assert set(shapes("qwen2")) == layer | {"embed", "attn.q.bias", "attn.k.bias", "attn.v.bias"}
    assert set(shapes("qwen3")) == layer | {"embed", "head", "attn.q_norm", "attn.k_norm"}
    assert set(shapes("mixtral")) == (layer - {"mlp.gate", "mlp.up", "mlp.down"}) | {
        "embed", "head", "moe.router", "moe.gate", "moe.up", "moe.down",
    }  # fmt: skip
    assert {r for r in shapes("deepseek_v3") if r.startswith("moe")} == {
        "moe.router", "moe.router.bias", "moe.gate", "moe.up", "moe.down",
        "moe.shared.gate", "moe.shared.up", "moe.shared.down",
    }  # fmt: skip
    assert {r for r in shapes("gpt_neox") if r.endswith(".bias")} == {
        "attn.qkv.bias", "attn.o.bias", "mlp.up.bias", "mlp.down.bias", "norm.bias",
    }  # fmt: skip


@pytest.mark.parametrize("family", STOCK)
def test_gates_ups_and_downs_are_what_the_shapes_say(family):
    row, found, inner = FAMILIES[family], shapes(family), (24, 8)
    for role, (rows, columns) in {r: s for r, s in found.items() if len(s) == 2}.items():
        out, into = (columns, rows) if role in row.transposed else (rows, columns)
        if role in ("mlp.up", "mlp.gate", "moe.up", "moe.gate"):
            assert into == 16 and out in inner, role
        if role in ("mlp.down", "moe.down"):
            assert out == 16 and into in inner, role
        if role == "attn.qkv":
            assert into == 16 and out == (4 + 2 * 2 if family == "phi3" else 3 * 4) * 4
        if role == "mlp.gate_up":
            assert into == 16 and out == 2 * 24
        if role in ("embed", "head"):
            assert (rows, columns) == (40, 16)
    keys = AutoConfig.for_model(family).to_dict()
    assert {row.heads, row.layers, row.hidden} <= set(keys) | set(AutoConfig.for_model(family).attribute_map)


@pytest.mark.parametrize("family", MOE)
def test_mixtures_are_saved_in_the_names_on_disk(tmp_path, family):
    model = build(family)
    live = set(dict(model.named_parameters()))
    save_model(tmp_path / "m", model)
    disk = set(load_file(tmp_path / "m" / "model.safetensors"))
    assert live != disk and any("gate_up_proj" in n for n in live) and not any("gate_up_proj" in n for n in disk)
    experts = {expert_of(n) for n in disk if role_of(family, n)[0] == "moe.up"}
    assert experts == set(range(4 if "deepseek" in family else 3))


@pytest.mark.parametrize("family", MOE)
def test_writing_into_a_view_by_its_disk_name_changes_the_live_model(tmp_path, family):
    model = build(family)
    target = next(n for n in places(model) if role_of(family, n)[0] == "moe.down" and expert_of(n) == 1)
    disk_views(model)[target].zero_()
    model.save_pretrained(tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    zero = [n for n, t in stored.items() if t.dim() == 2 and not t.any()]
    assert zero == [target]


@pytest.mark.parametrize("family", [*MOE, "llama", "gpt_neox"])
def test_entries_of_live_parameters_become_a_delta_in_disk_names(tmp_path, family):
    """What a Tune knows (live name, flat index, values) against what transformers writes before and after."""
    model = build(family).bfloat16()
    save_model(tmp_path / "old", model)
    gen = torch.Generator().manual_seed(1)
    entries = {}
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            index = torch.randperm(p.numel(), generator=gen)[: p.numel() // 5].sort().values
            before = p.data.view(-1)[index].clone()
            p.data.view(-1)[index] = (before.float() + 0.5).bfloat16()
            entries[name] = (index.int(), before, p.data.view(-1)[index].clone())
    delta = Delta.sparse(entries, model, base="x")
    save_model(tmp_path / "new", model)
    old, new = (load_file(tmp_path / side / "model.safetensors") for side in ("old", "new"))
    delta.apply_(old)
    assert all(same_bits(old[n], new[n]) for n in new)
    delta.revert_(model)
    save_model(tmp_path / "back", model)
    old = load_file(tmp_path / "old" / "model.safetensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(same_bits(old[n], back[n]) for n in old)


def test_a_family_nobody_knows():
    with pytest.raises(LuthierError, match="unknown model family 'lama'; known: .* llama, .*qwen3"):
        anatomy.family("lama")
    assert role_of("lama", "model.layers.3.self_attn.q_proj.weight") == ("other", 3)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("wte.weight", ("embed", None)),
        ("h.11.attn.c_attn.weight", ("attn.qkv", 11)),
        ("h.11.attn.bias", ("other", 11)),
        ("transformer.h.0.mlp.c_proj.bias", ("mlp.down.bias", 0)),
    ],
)
def test_the_old_gpt2_files_without_prefix(name, expected):
    """The causal mask that old files keep as attn.bias is no bias of a projection."""
    assert role_of("gpt2", name) == expected


def test_the_rotary_layout_of_the_table_is_that_of_the_classes():
    """Turning position 0 → 1 moves entry i together with i + half (half) or with its neighbour (interleaved)."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = torch.zeros(1, 1, 8), torch.ones(1, 1, 8)  # a quarter turn of every pair
    first = torch.zeros(1, 1, 1, 8)
    first[..., 0] = 1
    assert FAMILIES["llama"].rotary == "half"
    assert apply_rotary_pos_emb(first, first, cos, sin)[0].nonzero()[0, -1] == 4
    assert FAMILIES["deepseek_v3"].rotary == "interleaved"
    second = torch.zeros(1, 1, 1, 8)
    second[..., 1] = 1
    turned = [apply_rotary_pos_emb_interleave(x, x, cos, sin)[0].abs() for x in (first, second)]
    # entries 0 and 1 are one pair: a quarter turn takes each to the place the other has without turning
    still = apply_rotary_pos_emb_interleave(second, second, sin, cos)[0].abs()
    assert torch.equal(turned[0], still) and not torch.equal(turned[1], still)


def test_the_vision_tower_of_a_gemma3_is_no_part_of_the_decoder():
    assert role_of("gemma3", "vision_tower.vision_model.encoder.layers.2.self_attn.q_proj.weight") == ("other", None)
    assert role_of("gemma3", "language_model.model.layers.2.self_attn.q_proj.weight") == ("attn.q", 2)


def test_a_decoder_of_ours_has_a_role_for_every_tensor(tmp_path):
    from luthier.model.build import build_model

    moe = {"use": "block.moe", "set": {"experts": 4, "top_k": 2, "shared": 1, "width": 8}}
    sizes = {k: v for k, v in COMMON.items() if not k.endswith("_token_id")}
    model = build_model(sizes | {"slots": {"ffn": moe, "ffn@0": {"use": "block.dense"}}}, seed=0)
    save_model(tmp_path / "m", model)
    checkpoint = Checkpoint.open(tmp_path / "m")
    roles = {i.role for i in checkpoint.tensors.values()}
    assert {"moe.gate", "moe.up", "moe.down", "moe.router", "mlp.gate", "attn.q", "norm", "embed"} <= roles
    assert any(r.startswith("moe.shared.") for r in roles)
    views = disk_views(model)
    assert [i.name for i in checkpoint.tensors.values() if i.role == "other"] == []
    assert all(same_bits(views[n].contiguous(), t) for n, t in checkpoint.items())


@pytest.mark.parametrize("count, expected", [(3, 3), (0, None), (-1, None), ("3", None), (None, None)])
def test_the_number_of_layers_is_a_number_or_unknown(count, expected):
    assert anatomy.layers_of({"model_type": "llama", "num_hidden_layers": count}) == expected
    assert anatomy.layers_of({"model_type": "gpt2", "n_layer": count, "num_hidden_layers": 9}) == expected
    assert anatomy.layers_of({"model_type": "gemma3", "text_config": {"num_hidden_layers": count}}) == expected
    assert anatomy.layers_of({"model_type": "nobody's", "num_hidden_layers": count}) == expected
