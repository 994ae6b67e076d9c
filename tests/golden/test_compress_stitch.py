"""Stitched models against hand calculations, mergekit's passthrough, hooks on the uncut model, and what is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from families import FAMILIES, IDS, SIZES, model_of
from luthier import recipe
from luthier.checkpoint.layers import UNIFORM
from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.roles import live_layers
from luthier.compress.stitch import Stitch
from luthier.engine.layout import Layout
from luthier.engine.pieces import Inputs, Memory
from luthier.engine.stream import plan_transform, run_transform, transform_tensors
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.merge.linear import Linear
from luthier.model.config import config_from
from luthier.testing import adapters, tiny

LONG = {name: {"n_layer" if name == "gpt2" else "num_hidden_layers": 4} for name in FAMILIES}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
for one in ("qwen3", "gemma2", "gemma3"):
    LONG[one] |= {"layer_types": KINDS, "sliding_window": 6}
LONG["qwen3"] |= {"use_sliding_window": True}
EXACT = {"rms_norm_eps": 1e-14, "layer_norm_eps": 1e-14, "layer_norm_epsilon": 1e-14}
"""Norms without an epsilon to speak of."""


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A tied base of four layers, an expert of as many, and one of six; the last has another vocabulary."""
    folder = tmp_path_factory.mktemp("three")
    tiny.checkpoint(folder / "base", 3, num_hidden_layers=4, tie_word_embeddings=True)
    tiny.checkpoint(folder / "one", 4, num_hidden_layers=4, tie_word_embeddings=True)
    tiny.checkpoint(folder / "two", 5, num_hidden_layers=6, vocab_size=280)
    return {name: Checkpoint.open(folder / name) for name in ("base", "one", "two")}


def stitched(three, out, layers, experts=("one", "two"), **fields):
    method = Stitch(layers=layers, **fields)
    run_transform(method, three["base"], [three[e] for e in experts], out, Context())
    return load_file(out / "model.safetensors")


def weights(three, name):
    return load_file(three[name].path / "model.safetensors")


def layer(weights, index):
    stem = f"model.layers.{index}."
    return {name.removeprefix(stem): t for name, t in weights.items() if name.startswith(stem)}


def test_every_kind_of_entry_by_hand(three, tmp_path):
    """Verbatim, repeated, task arithmetic (h = 0.5 on both experts) and LaCo (two layers into one)."""
    laco = {"base.1": -1.0, "base.2": 1.0, "base.3": 1.0}
    layers = (
        "base.0",
        "1.5",
        {"base.1": 0.0, "0.1": 0.5, "1.4": 0.5},
        laco,
        "0.3",
        "1.5",
        {"0.0": 0.25, "base.0": 2.0},
    )
    made = stitched(three, tmp_path / "out", layers)
    base, one, two = (weights(three, name) for name in ("base", "one", "two"))
    for rest, b0 in layer(base, 0).items():
        b, a, c = ([layer(m, i)[rest].double() for i in range(n)] for m, n in ((base, 4), (one, 4), (two, 6)))
        hand = [b[0], c[5], 0.5 * a[1] + 0.5 * c[4], b[2] + b[3] - b[1], a[3], c[5], 0.25 * a[0] + 2 * b[0]]
        for index, wanted in enumerate(hand):
            torch.testing.assert_close(layer(made, index)[rest].double(), wanted, atol=1e-6, rtol=1e-6)
        for index in (0, 1, 4, 5):
            assert torch.equal(layer(made, index)[rest], hand[index].float())
        assert b0.shape == b[0].shape
    assert not layer(made, 7)
    assert "lm_head.weight" not in made, "tied embeddings stay tied"
    assert torch.equal(made["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert torch.equal(made["model.norm.weight"], base["model.norm.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 7 and model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_outside_the_layers(three, tmp_path):
    base, one = weights(three, "base"), weights(three, "one")
    for i, (outer, hand) in enumerate([("0", (0, 1)), ({"base": 0.75, "0": 0.5}, (0.75, 0.5)), ({"0": 1.0}, (0, 1))]):
        made = stitched(three, tmp_path / f"{i}", ("1.0", "base.1"), outer=outer)
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            torch.testing.assert_close(made[name], hand[0] * base[name] + hand[1] * one[name], atol=1e-6, rtol=1e-6)


def test_bfloat16_comes_out_bit_for_bit(tmp_path):
    for seed, name in enumerate(("base", "one")):
        tiny.checkpoint(tmp_path / name, seed, torch.bfloat16, shard="20KB", num_hidden_layers=3)
    merged = Stitch(layers=("base.2", "0.0"), outer="0").apply(base=tmp_path / "base", experts=[tmp_path / "one"])
    made = load_file(merged.save(tmp_path / "out") / "model.safetensors")
    base, one = ({n: t for f in sorted((tmp_path / n).glob("*.safetensors")) for n, t in load_file(f).items()}
                 for n in ("base", "one"))  # fmt: skip
    assert made["lm_head.weight"].dtype == torch.bfloat16 and torch.equal(made["lm_head.weight"], one["lm_head.weight"])
    for index, theirs in enumerate([layer(base, 2), layer(one, 0)]):
        assert theirs and all(torch.equal(layer(made, index)[n], t) for n, t in theirs.items())


MERGEKIT = {
    (0, "self_attn.o_proj.weight"): (0.0740872324, 0.0275831111, 0.682486651),
    (1, "mlp.down_proj.weight"): (0.0681740865, -0.191662997, 3.24665305),
    (2, "self_attn.o_proj.weight"): (-0.111306012, 0.166957214, -1.91365526),
    (2, "mlp.down_proj.weight"): (-0.0409288742, 0.00957616698, -1.40604769),
    (2, "self_attn.q_proj.weight"): (0.0732499436, -0.0181332491, -0.834257945),
    (3, "self_attn.o_proj.weight"): (0.0922201499, 0.063002333, -3.03062793),
    (3, "input_layernorm.weight"): (1.04861712, 0.849991024, 32.7734948),
    (4, "mlp.down_proj.weight"): (-0.111516573, -0.147909299, 0.109182064),
    (4, "self_attn.q_proj.weight"): (0.0155722499, -0.0166398957, 1.53284905),
    (5, "mlp.down_proj.weight"): (0.188374624, -0.105793774, 6.19838285),
}
"""First, last and sum of tensors by mergekit 0.1.5, merge_method passthrough, float32: layers [0, 2] of the base,
[1, 4] of the other with scale 0.75 for the filters o_proj and down_proj, and [3, 4] of the base."""


def test_passthrough_of_mergekit(three, tmp_path):
    layers = ("base.0", "base.1", "0.1", "0.2", "0.3", "base.3")
    tiny.checkpoint(tmp_path / "other", 4, num_hidden_layers=4)
    other = Checkpoint.open(tmp_path / "other")
    made = stitched({**three, "one": other}, tmp_path / "out", layers, gains=(1, 1, 0.75, 0.75, 0.75, 1))
    for (index, rest), (first, last, total) in MERGEKIT.items():
        flat = layer(made, index)[rest].double().flatten()
        numbers = torch.stack((flat[0], flat[-1], flat.sum()))
        torch.testing.assert_close(numbers, torch.tensor((first, last, total)).double(), atol=1e-6, rtol=1e-6)


def test_slices_of_a_linear_merge(three, tmp_path):
    """The engine's slices and the genome are two ways to say it: the same bytes."""
    slices = (((0, 0, 3), (1, 1, 4)), ((0, 3, 4), (1, 5, 6)))
    halves = [{f"base.{a}": 0.5, f"0.{b}": 0.5} for a, b in ((0, 1), (1, 2), (2, 3), (3, 5))]
    base, two = three["base"], three["two"]
    tiny.checkpoint(tmp_path / "two", 5, num_hidden_layers=6, tie_word_embeddings=True)
    two = Checkpoint.open(tmp_path / "two")
    run_transform(Linear(), None, [base, two], tmp_path / "a", Context(), layout=Layout(slices))
    method = Stitch(layers=tuple(halves), outer={"base": 0.5, "0": 0.5})
    run_transform(method, base, [two], tmp_path / "b", Context())
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ba")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-7, rtol=1e-6)
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())


GAINS = ("llama", "llama, tied, biases", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "olmo3", "smollm3", "granite",
         "seed_oss", "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "gpt_neox", "gpt2")  # fmt: skip
POST = ("gemma2", "gemma3", "olmo2", "olmo3")
"""The families whose branches pass a norm before they are added."""
ENDS = {name: ("post_attention_layernorm", "post_feedforward_layernorm") for name in POST}
ENDS |= {"gpt2": ("attn", "mlp"), "gpt_neox": ("attention", "mlp")}


def saved(name, folder, **changes):
    """The tiny model of four layers, on disk and live."""
    config = {k: v for k, v in {**LONG[name], **changes}.items()}
    model = model_of(name, **config)
    tiny.save(model, folder)
    return model


def load(folder):
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def scaled(factor):
    def hook(module, args, out):
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    return hook


@pytest.mark.parametrize("name", GAINS)
def test_gains_multiply_what_a_layer_adds(name, tmp_path):
    """Against hooks on both branches of every layer of the model as it was; twice one layer, one left out."""
    model, order, gains = saved(name, tmp_path / "in"), (0, 3, 3), (0.5, 1.75, -0.75)
    run_transform(Stitch(layers=[f"base.{n}" for n in order], gains=gains), Checkpoint.open(tmp_path / "in"), [],
                  tmp_path / "out", Context())  # fmt: skip
    made = logits(load(tmp_path / "out"))
    run_transform(Stitch(layers=[f"base.{n}" for n in order]), Checkpoint.open(tmp_path / "in"), [],
                  tmp_path / "plain", Context())  # fmt: skip
    plain = load(tmp_path / "plain")
    before = logits(plain)
    for block, gain in zip(live_layers(plain), gains, strict=True):
        for end in ENDS.get(name, ("self_attn", "mlp")):
            getattr(block, end).register_forward_hook(scaled(gain))
    assert (before - made).abs().max() > 0.1
    assert (logits(plain) - made).abs().max() < 2e-5 * before.abs().max().clamp(min=1)
    assert model.config.model_type == plain.config.model_type


@pytest.mark.parametrize("name", [name for name in GAINS if name not in ("olmo2", "olmo3")])
def test_a_scaled_stream_is_gains_from_there_on(name, tmp_path):
    """Twice the stream that enters layer 2, or half of what layers 2 and 3 add: exact but for the norms' epsilon.

    Not so for OLMo 2 and 3, whose branches read the stream without a norm.
    """
    kind = getattr(transformers, FAMILIES[name][0])()
    small = {key: 1e-14 for key in EXACT if hasattr(kind, key)}
    model = saved(name, tmp_path / "in", **small)
    run_transform(Stitch(layers=[f"base.{n}" for n in range(4)], gains=(1, 1, 0.5, 0.5)),
                  Checkpoint.open(tmp_path / "in"), [], tmp_path / "out", Context())  # fmt: skip
    before = logits(model)
    live_layers(model)[2].register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * 2, *args[1:]), kwargs), with_kwargs=True
    )
    made = logits(load(tmp_path / "out"))
    assert (before - made).abs().max() > 0.05
    assert (logits(model) - made).abs().max() < 3e-5 * before.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_with_layers_taken_away(name, tmp_path):
    """It equals the model whose layers are skipped, and generates with its cache what it does without."""
    model, order = saved(name, tmp_path / "in"), (0, 2, 3)
    run_transform(Stitch(layers=[f"base.{n}" for n in order]), Checkpoint.open(tmp_path / "in"), [],
                  tmp_path / "out", Context())  # fmt: skip
    made = load(tmp_path / "out")
    whole = logits(model)
    live_layers(model)[1].forward = lambda x, *args, **kwargs: x
    skipped = logits(model)
    assert (whole - skipped).abs().max() > 0.01
    torch.testing.assert_close(logits(made), skipped, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True,
                   "return_dict_in_generate": True}  # fmt: skip
        cached, plain = (made.generate(IDS[:, :20], use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=2e-4, rtol=1e-4)


def write_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return config


def test_kinds_of_layers_that_an_older_config_leaves_out(tmp_path):
    """Gemma 2 takes turns by the layer's number: what is left of them keeps its kind, and the first model decides."""
    model = model_of("gemma2", num_hidden_layers=4, sliding_window=6)
    assert model.config.layer_types[1:3] == ["full_attention", "sliding_attention"]
    tiny.save(model, tmp_path / "in")
    write_config(tmp_path / "in", layer_types=...)
    base = Checkpoint.open(tmp_path / "in")
    for order in ((0, 2, 3), (0, 2)):
        run_transform(Stitch(layers=[f"base.{n}" for n in order]), base, [], tmp_path / f"{order}", Context())
        said = json.loads((tmp_path / f"{order}" / "config.json").read_text())["layer_types"]
        assert said == [model.config.layer_types[n] for n in order]
    with pytest.raises(LuthierError, match=r"compress.stitch.layers\[0\]: mixes layers of different kinds"):
        plan_transform(Stitch(layers=[{"base.0": 0.5, "base.1": 0.5}]), base, [])
    plan_transform(Stitch(layers=[{"base.0": 0.5, "base.2": 0.5}]), base, [])


def test_families_said_to_be_uniform_are():
    for kind in UNIFORM[:-1]:
        assert not [n for n, v in AutoConfig.for_model(kind).to_dict().items() if isinstance(v, list) and len(v) > 1]


@pytest.mark.parametrize("kind", ["DeepseekV3Config", "Qwen3MoeConfig"])
def test_dense_layers_and_mixtures_keep_their_places(kind, tmp_path):
    """Dense layers 0 and 1 of 4 in DeepSeek; in Qwen layers 0 and 2."""
    sizes = {**SIZES, "num_hidden_layers": 4, "n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
             "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 2,
             "mlp_only_layers": [0, 2], "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
             "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
    deep = kind.startswith("Deep")
    config = getattr(transformers, kind)(
        **{k: v for k, v in sizes.items() if k != ("mlp_only_layers" if deep else "q_lora_rank")}
    )
    model = AutoModelForCausalLM.from_config(config)
    tiny.save(tiny.redraw_(model, 1).eval(), tmp_path / "in")
    base = Checkpoint.open(tmp_path / "in")
    order = (1, 3, 2) if deep else (3, 2, 0, 1)
    run_transform(Stitch(layers=[f"base.{n}" for n in order]), base, [], tmp_path / "out", Context())
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["first_k_dense_replace"] == 1 if deep else said["mlp_only_layers"] == [1, 2]
    made = load(tmp_path / "out")
    stack = live_layers(model)
    model.model.layers = nn.ModuleList([stack[n] for n in order])
    model.config.num_hidden_layers = len(order)
    if not deep:
        model.config.layer_types = ["full_attention"] * len(order)
    torch.testing.assert_close(logits(made), logits(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(LuthierError, match="different kinds"):
        plan_transform(Stitch(layers=[{"base.0": 0.5, "base.3": 0.5}]), base, [])
    if deep:
        with pytest.raises(LuthierError, match="first_k_dense_replace cannot say that"):
            plan_transform(Stitch(layers=["base.3", "base.0"]), base, [])


def test_from_a_recipe_with_and_without_experts(three, tmp_path):
    base, one = (str(three[name].path) for name in ("base", "one"))
    alone = {"use": "compress.stitch", "base": base, "set": {"layers": ["base.3", "base.0"]}}
    both = {**alone, "experts": [one], "set": {"layers": ["base.0", {"0.1": 0.5, "base.1": 0.5}], "gains": [1, 0.5]}}
    steps = recipe.load({"luthier": 1, "steps": {"alone": alone, "both": both}}).steps
    assert steps["both"].method.gains == (1.0, 0.5)
    folder = Stitch(layers=["base.3", "base.0"]).apply(base=base, experts=None).save(tmp_path / "out")
    assert load(folder).config.num_hidden_layers == 2


def test_an_expert_saved_without_its_outermost_prefix():
    base, bare = (dict(tiny.llama(seed).named_parameters()) for seed in (0, 1))
    bare = {name.removeprefix("model."): tensor for name, tensor in bare.items()}
    made = transform_tensors(Stitch(layers=("0.1", {"base.0": 0.5, "0.1": 0.5})), base, [bare], Context())
    assert made.keys() == base.keys()
    for rest, theirs in layer({f"model.{n}": t for n, t in bare.items()}, 1).items():
        assert torch.equal(made[f"model.layers.0.{rest}"], theirs)
        half = 0.5 * (theirs + base[f"model.layers.0.{rest}"])
        torch.testing.assert_close(made[f"model.layers.1.{rest}"], half)


def test_experts_may_be_adapters_on_the_base(tmp_path):
    base, first = adapters.folders(tmp_path, 1)
    folder = Stitch(layers=("0.1", "base.1", "0.0")).apply(base=base, experts=[first]).save(tmp_path / "out")
    made, start = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    tuned = adapters.onto(start, adapters.drawn(1)[0])
    for index, (source, at) in enumerate([(tuned, 1), (start, 1), (tuned, 0)]):
        for rest, theirs in layer(source, at).items():
            torch.testing.assert_close(layer(made, index)[rest], theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(LuthierError, match="puts whole models together; name the base"):
        Stitch(layers=("0.1",)).apply(experts=[first]).plan()


def test_outputs_that_are_one_tensor_are_named():
    """Verbatim layers, and of scaled ones what adds nothing to the stream."""
    base, one = (Memory(dict(tiny.llama(seed).named_parameters())) for seed in (0, 1))
    config = tiny.llama().config.to_dict()
    layers = ("base.0", {"0.1": 1.0}, "0.0", {"base.1": 2.0}, {"base.1": 0.5, "0.1": 0.5}, {"base.0": 1.0, "0.0": 1.0})
    for outer, fits in (("base", True), ("0", True), ({"base": 0.5, "0": 0.5}, False)):
        method = Stitch(layers=layers, outer=outer, gains=(1, 1, 0.5, 1, 1, 1))
        planned = method.plan(Inputs(base, (one,), base.tensors, config=config))
        assert ("model.norm.weight" in planned.same, "lm_head.weight" in planned.same) == (fits, fits)
        same = [{n for n in planned.same if f"layers.{i}." in n} for i in range(6)]
        whole = [{n for n in planned.tensors if f"layers.{i}." in n} for i in range(6)]
        assert same[:2] == whole[:2] and not any(same[3:])
        assert {n.split(".")[-2] for n in whole[2] - same[2]} == {"o_proj", "down_proj"}


def own(folder, **slots):
    """Our own decoder of three layers, on disk and live."""
    config = config_from({
        "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "slots": slots,
    })  # fmt: skip
    model = tiny.redraw_(AutoModelForCausalLM.from_config(config), 1).eval()
    tiny.save(model, folder)
    return model


def test_our_own_decoder(tmp_path):
    """Parts that know their layer's number cannot move; what others compute may not be scaled."""
    model = own(tmp_path / "in", ffn={"use": "block.moe", "set": {"experts": 4}})
    base = Checkpoint.open(tmp_path / "in")
    run_transform(Stitch(layers=("base.2", "base.0"), gains=(0.5, 2.0)), base, [], tmp_path / "out", Context())
    stack = live_layers(model)
    for number, gain in ((2, 0.5), (0, 2.0)):
        for end in ("self_attn", "mlp"):
            getattr(stack[number], end).register_forward_hook(scaled(gain))
    model.model.layers[0], model.model.layers[1] = stack[2], stack[0]
    del model.model.layers[2]
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), atol=1e-5, rtol=1e-5)
    for slots, gains, said in (
        ({"norm": "norm.lns"}, None, "slots.norm: what norm.lns computes is not known here"),
        ({"ffn@0": "block.dense"}, None, "slots.ffn@0: names layers by number: they cannot be moved"),
        ({"layer": "block.coe"}, (1.0, 2.0), "slots.layer: what block.coe computes is not known here"),
    ):
        own(tmp_path / said, **slots)
        with pytest.raises(LuthierError, match=said):
            plan_transform(Stitch(layers=("base.2", "base.0"), gains=gains), Checkpoint.open(tmp_path / said), [])


BAD = [
    ({"layers": ()}, r"layers: is empty: a model needs a layer"),
    ({"layers": ("base.0", {})}, r"layers\[1\]: names nothing"),
    ({"layers": ("base",)}, r"layers\[0\]: names 'base'; write \"base.7\""),
    ({"layers": ("one.3",)}, r"layers\[0\]: names 'one.3'"),
    ({"layers": ("base.-1",)}, r"names 'base.-1'"),
    ({"layers": ("base.01",)}, r"names 'base.01'"),
    ({"layers": ("00.1",)}, r"names '00.1'"),
    ({"layers": ("base.\u0663",)}, r"names 'base.\u0663'"),
    ({"layers": ("base.1234567890",)}, r"names 'base.1234567890'"),
    ({"layers": ("base.1.2",)}, r"names 'base.1.2'"),
    ({"layers": (0.7,)}, r"stitch.layers: expected a word, got 0.7; a number is a word in quotes"),
    ({"layers": ({"base.0": float("nan")},)}, r"expected .* finite number"),
    ({"layers": ({"base.0": float("inf")},)}, r"expected .* finite number"),
    ({"layers": ("base.0",), "outer": "base.0"}, r"outer: names 'base.0'; write \"base\", or \"0\""),
    ({"layers": ("base.0",), "outer": {}}, r"outer: names nothing"),
    ({"layers": ("base.0",), "gains": (1.0, 1.0)}, r"gains: has 2 for 1 layers"),
    ({"layers": ("base.0",), "gains": (float("inf"),)}, r"finite number"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), BAD)
def test_fields_that_cannot_be(fields, said):
    with pytest.raises(LuthierError, match=said):
        Stitch(**fields)


WRONG = [
    ({"layers": ("base.4",)}, r"layers\[0\]: layer 4 of the base, which has 4"),
    ({"layers": ("base.0", "1.6")}, r"layers\[1\]: layer 6 of expert 1, which has 6"),
    ({"layers": ("base.0", {"base.1": 1.0, "2.0": 1.0})}, r"layers\[1\]: there is no expert 2 of 2"),
    ({"layers": ("base.0",), "outer": "7"}, r"outer: there is no expert 7 of 2"),
    ({"layers": ("base.0",), "outer": {"0": 0.5, "1": 0.5}}, r"outer: expert 1 has .*, the base"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), WRONG)
def test_what_does_not_fit_is_said_before_anything_is_read(three, fields, said):
    with pytest.raises(LuthierError, match=said):
        plan_transform(Stitch(**fields), three["base"], [three["one"], three["two"]])


def test_models_that_cannot_be_taken_apart(three, tmp_path):
    """Layers of other shapes, gains of an unknown family, layers that know their number, whole numbers in layers."""
    tiny.checkpoint(tmp_path / "wide", 1, intermediate_size=64)
    with pytest.raises(LuthierError, match=r"layers\[0\]: the base has no layer of such tensors"):
        plan_transform(Stitch(layers=("0.0",)), three["base"], [Checkpoint.open(tmp_path / "wide")])
    with pytest.raises(LuthierError, match="names its layers itself; leave `slices` away"):
        layout = Layout((((None, 0, 2), (0, 0, 2)),))
        plan_transform(Stitch(layers=("0.0",)), three["base"], [three["one"]], layout=layout)
    saved("gpt2", tmp_path / "gpt2", scale_attn_by_inverse_layer_idx=True)
    gpt2 = Checkpoint.open(tmp_path / "gpt2")
    with pytest.raises(LuthierError, match="scale_attn_by_inverse_layer_idx True makes layers depend on their number"):
        plan_transform(Stitch(layers=("base.1",)), gpt2, [])
    plan_transform(Stitch(layers=[f"base.{n}" for n in range(4)], gains=(1, 1, 2, 2)), gpt2, [])
    weights = {n: t for n, t in tiny.llama(0).named_parameters()}
    with pytest.raises(LuthierError, match="unknown model family 'strange'"):
        config = {"model_type": "strange", "num_hidden_layers": 2}
        transform_tensors(Stitch(layers=("base.1",), gains=(2.0,)), weights, [], Context(), config)
    with pytest.raises(LuthierError, match="holds whole numbers inside its layers"):
        whole = {**weights, "model.layers.0.mask": torch.ones(2, dtype=torch.int64)}
        transform_tensors(Stitch(layers=("base.1",)), whole, [], Context())
