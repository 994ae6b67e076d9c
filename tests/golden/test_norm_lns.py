"""norm.lns against hand calculation, the paper's rule, the released switch, and stock models after export."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from luthier.errors import LuthierError
from luthier.model import build_model, init_weights
from luthier.model.export import to_stock
from luthier.norm.lns import Lns

SIZES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip


def built(layer, width=4, eps=1e-6, **fields):
    config = SimpleNamespace(hidden_size=width, rms_norm_eps=eps)
    norm = Lns(**fields).build(SimpleNamespace(config=config, layer=layer))
    init_weights(norm, seed=0)
    return norm


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    """Mean of squares 6.25, plus 2.75 under the root: 3. Gains 1 to 4. The ninth layer divides by 3."""
    norm = built(8, eps=2.75)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    y, aux = norm(torch.tensor([[[3.0, -4.0, 0.0, 0.0]]]))
    assert aux == {}
    assert torch.allclose(y, torch.tensor([[[1 / 3, -8 / 9, 0.0, 0.0]]]), atol=1e-6)


@pytest.mark.parametrize("layer, scale", [(0, 1.0), (1, 2**-0.5), (3, 0.5), (15, 0.25), (None, 1.0)])
@pytest.mark.parametrize("form", ["scale", "gain"])
def test_scale_of_each_layer(layer, scale, form):
    """Layers count from 1; the norm before the head is not scaled. Root mean squares of outputs tell."""
    y, _ = built(layer, 64, form=form)(5 * draw(2, 3, 64))
    assert torch.allclose(y.square().mean(-1).sqrt(), torch.full((2, 3), scale), rtol=1e-4)


def test_other_powers():
    assert built(3, power=1.0).scale == 0.25
    assert built(3, power=0.0).scale == 1.0
    assert built(7, power=1.0, form="gain").weight.tolist() == [0.125] * 4


def test_own_eps_wins_over_the_models():
    x = torch.full((1, 1, 4), 1e-3)
    assert built(0)(x)[0][0, 0, 0].item() == pytest.approx(1e-3 / math.sqrt(2e-6), rel=1e-5)
    assert built(0, eps=3e-6)(x)[0][0, 0, 0].item() == pytest.approx(1e-3 / math.sqrt(4e-6), rel=1e-5)
    own = Lns(eps=3e-6).build(SimpleNamespace(config=SimpleNamespace(hidden_size=4, rms_norm_eps=1e-6), layer=0))
    assert own(x)[0][0, 0, 0].item() == pytest.approx(1e-3 / math.sqrt(4e-6), rel=1e-5)


def test_what_is_stored():
    """scale: gains at 1 and the factor beside them; gain: gains at the factor and nothing beside them."""
    beside, inside = built(3), built(3, form="gain")
    assert (beside.weight.tolist(), beside.scale) == ([1.0] * 4, 0.5)
    assert (inside.weight.tolist(), inside.scale) == ([0.5] * 4, 1.0)
    assert list(beside.state_dict()) == list(inside.state_dict()) == ["weight"]
    assert (
        Lns().build(SimpleNamespace(config=SimpleNamespace(hidden_size=2, rms_norm_eps=1e-6), layer=8)).scale == 1 / 3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_llamas_norm_with_a_scaled_gain_bit_for_bit(dtype):
    """And the paper's order, the norm's output times the factor, to the dtype's rounding."""
    norm, llama, plain = built(4, 48, eps=1e-5), LlamaRMSNorm(48, eps=1e-5), LlamaRMSNorm(48, eps=1e-5)
    gain = draw(48, seed=1).to(dtype)
    norm.weight.data, llama.weight.data, plain.weight.data = gain, gain * 5**-0.5, gain
    x = (5 * draw(3, 7, 48, seed=2)).to(dtype)
    assert torch.equal(norm(x)[0], llama(x)) and norm(x)[0].dtype == dtype
    paper = plain(x) * (1 / math.sqrt(5))
    assert torch.allclose(norm(x)[0], paper, rtol=2.5 * torch.finfo(dtype).eps, atol=1e-7)


def test_forms_part_at_the_first_step_of_adam():
    """Equal at first; then Adam moves the effective gain of `gain` by lr, that of `scale` by lr * scale."""
    x, moved = draw(4, 5, 6), {}
    for form in ("scale", "gain"):
        norm = built(8, 6, form=form)
        optimizer = torch.optim.Adam(norm.parameters(), lr=0.01)
        before = norm.gain().detach()
        y, _ = norm(x)
        moved[form] = [y.detach()]
        (y * draw(4, 5, 6, seed=3)).sum().backward()
        optimizer.step()
        moved[form].append((norm.gain() - before).abs().mean().item())
    assert torch.allclose(moved["scale"][0], moved["gain"][0], atol=1e-6)
    assert moved["gain"][1] == pytest.approx(0.01, rel=1e-3)
    assert moved["scale"][1] == pytest.approx(0.01 / 3, rel=1e-3)


RELEASED = {
    # line: the words that NORM_TYPE, lowered at 265 and 403, is compared with there; after the last one comes nothing
    "__init__": {
        292: "pre scale_pre LNS", 295: "post deeppost", 298: "sandwich", 303: "pre_post", 312: "pre_sandwich",
        323: "post_pre scale_post_pre", 332: "scale_res_pre_norm", 337: "pre_post_pre_post", 346: "post_pre_post_pre",
        355: "mono", 367: "mono_reverse",
    },
    "forward": {
        405: "pre scale_pre", 427: "LNS", 456: "scale_res_pre_norm", 474: "post deeppost", 505: "sandwich",
        526: "pre_post", 564: "pre_sandwich", 604: "post_pre scale_post_pre", 641: "mono", 705: "mono_reverse",
        770: "post_pre_post_pre",
    },
}  # fmt: skip
"""peft_pretraining/modeling_llama.py of lmsdss/LayerNorm-Scaling at 3ac54dd, class LlamaDecoderLayer."""


@pytest.mark.parametrize(
    ("word", "lines"), [("LNS", (None, None)), ("pre", (292, 405)), ("post_pre", (323, 604)), ("sandwich", (298, 505))]
)
def test_released_switch_builds_no_lns(word, lines):
    """Which branches the released scripts' words reach: for "LNS" neither one that builds norms nor one that runs."""

    def reached(table):
        return next((line for line, words in table.items() if word.lower() in words.split()), None)

    assert (reached(RELEASED["__init__"]), reached(RELEASED["forward"])) == lines


def lns_model(dtype=torch.float32, form="scale", **sizes):
    model = build_model({**SIZES, "slots": {"norm": {"use": "norm.lns", "set": {"form": form}}}, **sizes})
    for i, p in enumerate(model.parameters()):  # gains too: at 1 they would hide where the scale goes
        if p.dim() == 1:
            p.data += 0.3 * draw(*p.shape, seed=i)
    return model.to(dtype).eval()


@pytest.mark.parametrize("form", ["scale", "gain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_export_is_exact_bit_for_bit(dtype, form, tmp_path):
    """Seven layers, of which only the first and fourth scale by a power of two."""
    model, ids = lns_model(dtype, form), torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    stock = to_stock(model)
    assert torch.equal(stock(ids).logits, model(ids).logits)
    stock.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == "LlamaForCausalLM" and torch.equal(again(ids).logits, model(ids).logits)


def test_export_scales_block_gains_only():
    model = lns_model()
    mine, stock = model.state_dict(), to_stock(model).state_dict()
    for i in range(7):
        for name in (f"model.layers.{i}.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")):
            assert torch.equal(stock[name], mine[name] * (i + 1) ** -0.5)
    for name in set(mine) - {n for n in mine if "layernorm" in n}:
        assert torch.equal(stock[name], mine[name])


def test_export_of_a_mixture_and_of_some_layers():
    lns = {"use": "norm.lns"}
    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    for slots in ({"norm": lns, "ffn": {"use": "block.moe", "set": {"experts": 4}}}, {"norm@2--1": lns}):
        model = build_model(SIZES | {"slots": slots}).eval()
        assert torch.allclose(to_stock(model)(ids).logits, model(ids).logits, atol=1e-6)


def test_export_refuses_norms_of_two_eps():
    model = build_model(SIZES | {"slots": {"norm@0": {"use": "norm.lns", "set": {"eps": 1e-3}}}})
    with pytest.raises(LuthierError, match="eps"):
        to_stock(model)
