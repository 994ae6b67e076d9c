"""block.coe against a twin that goes token by token, hand calculation, and a trained mixture converted to a chain."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from luthier.block.coe import Coe
from luthier.errors import LuthierError
from luthier.kit import routing
from luthier.kit.parts import Pass
from luthier.model import LuthierConfig, LuthierForCausalLM, Spec, build_model
from luthier.model.convert import to_coe
from luthier.testing.decoders import at_home, refill

D, E, INNER = 6, 5, 8
PLACES = ("inner_normed", "prenorm", "outer", "init", "gated")


def built(dtype=torch.float64, **fields):
    config = LuthierConfig(
        vocab_size=11, hidden_size=D, num_attention_heads=1, intermediate_size=24, num_hidden_layers=4
    )
    fields = {"experts": E, "width": INNER, **fields}
    return refill(Coe(**fields).build(Spec(config, "layer", 3))).to(dtype).train()


def states(batch=2, length=7, dtype=torch.float64):
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(7)).to(dtype)


def plain(x, keep=None):
    return Pass(positions_BT=torch.arange(x.shape[1])[None], keep_BT=keep)


def normed(x, module):
    return module.weight * x / (x.square().mean() + module.eps).sqrt()


def swiglu(x, gate, up, down):
    return down @ (F.silu(gate @ x) * (up @ x))


def chosen(z, weight, k, renormalise):
    """The experts of one token and their weights, by plain Python."""
    logits = (weight @ z).tolist()
    total = sum(math.exp(v) for v in logits)
    score = [math.exp(v) / total for v in logits]
    best = sorted(range(E), key=lambda e: -score[e])[:k]
    return best, [score[e] / (sum(score[i] for i in best) if renormalise else 1) for e in best]


def slow_token(module, h):
    """The chain for one token's state after attention; also the choices made."""
    part, chain, norm = module.part, module.mlp, module.post_attention_layernorm
    start = h if part.residual == "prenorm" else normed(h, norm)
    z, choices = start, []
    for t in range(part.iterations):
        x = normed(z, norm) if part.residual == "prenorm" else z
        if part.router != "frozen" or not choices:
            weight = chain.gate.weight[t if part.router == "per_iteration" else 0]
            choices.append(chosen(x, weight, part.top_k, part.renormalise))
        y = torch.zeros_like(x)
        bank, shared = chain.experts, chain.shared_experts
        for e, w in zip(*choices[-1], strict=True):
            y = y + w * swiglu(x, bank.gate_proj[e], bank.up_proj[e], bank.down_proj[e])
        if shared is not None:
            y = y + swiglu(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        last = t == part.iterations - 1
        if part.residual in ("inner_normed", "prenorm"):
            z = z + y
        elif part.residual == "init":
            z = start + y
        elif last:
            z = h + y
        else:
            z = y if part.residual == "outer" else z + chain.step_scale[t] * y
    return z, choices


def after_attention(module, x):
    """h: the twin starts behind the mixer, which has tests of its own."""
    y, _ = module.self_attn(module.input_layernorm(x)[0], plain(x))
    return x + y


@pytest.mark.parametrize("residual", PLACES)
@pytest.mark.parametrize("fields", [
    {"iterations": 2, "top_k": 2}, {"iterations": 3, "top_k": 1, "router": "tied", "shared": 1},
    {"iterations": 2, "top_k": 3, "renormalise": True}, {"iterations": 3, "top_k": 2, "router": "frozen"},
])  # fmt: skip
def test_equals_the_twin_token_by_token(residual, fields):
    if residual == "gated" and fields.get("router") == "frozen":
        pytest.skip("refused")
    module, x = built(residual=residual, **fields), states()
    h = after_attention(module, x)
    y, _ = module(x, plain(x))
    want = torch.stack([torch.stack([slow_token(module, h[b, t])[0] for t in range(7)]) for b in range(2)])
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-12)


def test_a_gated_chain_starts_as_the_plain_layer():
    """A fresh one is the decoder with `block.moe` of the same weights to the bit: the steps before the last add
    nothing, in a layer built by itself either."""
    sizes = {"vocab_size": 31, "hidden_size": D, "num_attention_heads": 1, "intermediate_size": 24,
             "num_hidden_layers": 1}  # fmt: skip
    gated, moe = ({"use": f"block.{name}", "set": {"renormalise": False, **more}} for name, more in (
        ("coe", {"residual": "gated", "router": "tied", "iterations": 3, "width": INNER}), ("moe", {"width": INNER}),
    ))  # fmt: skip
    chain = build_model({**sizes, "slots": {"layer": gated}}, 3).eval()
    weights = {n: p[0] if "mlp.gate" in n else p for n, p in chain.state_dict().items() if "step_scale" not in n}
    model = build_model({**sizes, "slots": {"ffn": moe}}).eval()
    model.load_state_dict(weights)
    assert torch.equal(chain(ids()).logits, model(ids()).logits)
    assert not Coe(**gated["set"]).build(Spec(LuthierConfig(**sizes), "layer", 0)).mlp.step_scale.any()


def test_a_router_for_each_iteration_or_one():
    """What the routers hold: a weight for each expert and channel, times the iterations where each has its own."""
    for router, routers in (("per_iteration", 3), ("tied", 1), ("frozen", 1)):
        assert built(router=router, iterations=3, top_k=1).mlp.gate.weight.numel() == routers * E * D


@pytest.mark.parametrize(("residual", "norms"), [("prenorm", 3), ("inner_normed", 1), ("gated", 1)])
def test_what_the_inner_parts_add_to_the_loss_counts(residual, norms):
    """Losses of norms and mixer reach the layer's aux, as often as they run: a norm in each iteration, or once."""
    module, x = built(residual=residual, iterations=3, top_k=1, balance_weight=0.0), states()
    for name in ("input_layernorm", "self_attn", "post_attention_layernorm"):
        hook = {f"loss/{name}": torch.tensor(1.0)}
        getattr(module, name).register_forward_hook(lambda _, args, out, hook=hook: (out[0], {**out[1], **hook}))
    aux = module(x, plain(x))[1]
    assert {k: v.item() for k, v in aux.items() if k.startswith("loss/")} == {
        "loss/input_layernorm": 1.0, "loss/self_attn": 1.0, "loss/post_attention_layernorm": norms,
    }  # fmt: skip


def test_two_iterations_written_out():
    """The published layer for one expert, by hand: z + f(z), twice, and nothing of h left but its norm."""
    module, x = built(experts=1, top_k=1, residual="inner_normed"), states()
    h = after_attention(module, x)[0, 3]
    gate, up, down = (p[0] for p in (module.mlp.experts.gate_proj, module.mlp.experts.up_proj,
                                     module.mlp.experts.down_proj))  # fmt: skip
    z0 = module.post_attention_layernorm.weight * h / (h.square().mean() + 1e-6).sqrt()
    z1 = z0 + swiglu(z0, gate, up, down)
    z2 = z1 + swiglu(z1, gate, up, down)
    torch.testing.assert_close(module(x, plain(x))[0][0, 3], z2, rtol=1e-10, atol=1e-12)


def test_the_published_layer_forgets_the_scale_of_its_input():
    """inner_normed and init throw the residual stream away: a thousand times h changes nothing."""
    for residual in PLACES:
        module, x = built(residual=residual), states()
        with torch.no_grad():
            for p in (*module.self_attn.parameters(),):
                p.zero_()
        one, two = module(x, plain(x))[0], module(1000 * x, plain(x))[0]
        forgets = torch.allclose(one, two, atol=1e-5)
        assert forgets == (residual in ("inner_normed", "init")), residual


def test_tied_is_not_frozen():
    """One router on every state, and the first choice kept, agree in the first iteration only."""
    tied, frozen = (built(router=r, residual="inner_normed", top_k=1) for r in ("tied", "frozen"))
    assert [tuple(p.shape) for p in tied.parameters()] == [tuple(p.shape) for p in frozen.parameters()]
    x = states()
    assert not torch.allclose(tied(x, plain(x))[0], frozen(x, plain(x))[0])
    one, other = (built(router=r, iterations=1, top_k=1) for r in ("tied", "frozen"))
    assert torch.equal(one(x, plain(x))[0], other(x, plain(x))[0])


def test_the_number_of_combinations():
    """The formula printed for 823 times as many combinations gives 91."""
    assert round(math.comb(64, 4) ** 2 / math.comb(64, 8), 1) == 91.2
    assert round(math.comb(63, 4) ** 2 / math.comb(63, 8), 1) == 91.6


@pytest.mark.parametrize(("router", "counted"), [("per_iteration", (0, 1, 2)), ("tied", (0, 1, 2)), ("frozen", (0,))])
def test_the_balance_loss_is_summed_over_the_choices_made(router, counted):
    """By hand from the twin's choices: per sequence, share of choices times mean score."""
    module, x = built(router=router, iterations=3, residual="prenorm", balance_weight=0.5), states()
    h = after_attention(module, x).detach()
    y, aux = module(x, plain(x))
    assert sorted(k for k in aux if "load" in k) == [f"metric/load.3.{t}" for t in counted]
    found = 0.0
    for t in counted:
        loads = torch.zeros(2, E)
        for b in range(2):
            for position in range(7):
                _, choices = slow_token(module, h[b, position])
                for e in choices[t][0]:
                    loads[b, e] += 1
        assert torch.equal(aux[f"metric/load.3.{t}"], loads.sum(0))
        torch.testing.assert_close(aux[f"metric/max_violation.3.{t}"], loads.sum(0).max() / loads.sum(0).mean() - 1)
        found += _balance(module, h, t, loads)
    torch.testing.assert_close(aux["loss/balance"].detach(), torch.tensor(0.5 * found, dtype=torch.float64))
    assert "loss/balance" not in module.eval()(x, plain(x))[1]


def _balance(module, h, t, loads):
    z = module.post_attention_layernorm(_state_before(module, h, t))[0]
    p = (z @ module.mlp.gate.weight[t if module.part.router == "per_iteration" else 0].T).softmax(-1).mean(1)
    share = loads * E / (7 * module.part.top_k)
    return (share * p).sum(1).mean().item()


def _state_before(module, h, t):
    """The prenorm chain's stream before iteration t."""
    short = built(router=module.part.router, iterations=t, residual="prenorm") if t else None
    if short is None:
        return h
    with torch.no_grad():
        weights = module.state_dict()
        weights["mlp.gate.weight"] = weights["mlp.gate.weight"][: short.mlp.gate.weight.shape[0]]
        short.load_state_dict(weights)
        return short._prenorm(h, plain(h), {})


def test_defaults_are_those_of_the_authors():
    """Two iterations, and a balance loss of a thousandth: with equal scores each iteration's is 1 before that."""
    assert (Coe().iterations, Coe().residual, Coe().router) == (2, "inner_normed", "per_iteration")
    module, x = built(), states()
    with torch.no_grad():
        module.mlp.gate.weight.zero_()
    assert module(x, plain(x))[1]["loss/balance"].item() == pytest.approx(2 * 0.001)


def test_padding_is_no_load():
    x, keep = states(), torch.ones(2, 7, dtype=torch.bool)
    keep[0, :3] = False
    _, aux = built(top_k=2)(x, plain(x, keep))
    assert aux["metric/load.3.0"].sum() == 2 * (14 - 3)


def test_width_divides_the_dense_layer_by_all_that_runs():
    config = LuthierConfig(vocab_size=11, hidden_size=D, num_attention_heads=1, intermediate_size=60)
    for fields, inner in (({"iterations": 2, "top_k": 2}, 15), ({"iterations": 3, "top_k": 1, "shared": 1}, 10)):
        layer = Coe(experts=4, **fields).build(Spec(config, "layer", 0))
        assert layer.mlp.experts.gate_proj.shape == (4, inner, D)
        assert layer.mlp.shared_experts is None or layer.mlp.shared_experts.up_proj.weight.shape == (inner, D)


@pytest.mark.parametrize(("fields", "says"), [
    ({"top_k": 9}, "top_k 9 exceeds the 8 experts"), ({"top_k": 1, "renormalise": True}, "the router never learns"),
    ({"residual": "gated", "router": "frozen"}, "router: tied"), ({"residual": "post"}, "unknown value 'post'"),
    ({"iterations": 0}, "iterations"),
])  # fmt: skip
def test_refused(fields, says):
    with pytest.raises(LuthierError, match=says):
        Coe(**fields)
    with pytest.raises(LuthierError, match="too small to divide among 20 experts"):
        Coe(iterations=10).build(
            Spec(LuthierConfig(hidden_size=8, num_attention_heads=1, intermediate_size=19), "layer", 0)
        )


def test_one_expert_chosen_of_one_may_be_renormalised():
    assert Coe(experts=1, top_k=1, renormalise=True).renormalise


def ids():
    return torch.randint(1, 31, (2, 9), generator=torch.Generator().manual_seed(3))


def mixture(**fields):
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
    slots = {"ffn": {"use": "block.moe", "set": {"experts": 6, "shared": 1, **fields}}, "ffn@0": "block.dense"}
    return build_model({**sizes, "slots": slots}, 4).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_mixture_is_equal_to_the_bit(dtype, tmp_path):
    model = mixture().to(dtype)
    chain = to_coe(model, iterations=3)
    assert [type(layer).__name__ for layer in chain.model.layers] == ["PlainLayer", "ChainLayer", "ChainLayer"]
    assert chain.dtype == dtype and not chain.training
    assert torch.equal(chain(ids()).logits, model(ids()).logits)
    chain.save_pretrained(tmp_path)
    again = at_home(LuthierForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_a_converted_mixtral_is_equal_and_trains_its_new_iteration():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2, experts_implementation="eager",
    )  # fmt: skip
    stock = MixtralForCausalLM(config).eval()
    before = {n: p.clone() for n, p in stock.state_dict().items()}
    chain = to_coe(stock)
    torch.testing.assert_close(chain(ids()).logits, stock(ids()).logits, rtol=1e-5, atol=1e-6)
    chain.train()(ids(), labels=ids()).loss.backward()
    scale = chain.model.layers[0].mlp.step_scale
    assert not scale.detach().any() and scale.grad.abs().sum() > 0
    with torch.no_grad():
        chain.model.layers[0].mlp.experts.down_proj.zero_()
    assert all(torch.equal(p, before[n]) for n, p in stock.state_dict().items()), "the weights are copies"


@pytest.mark.parametrize(("fields", "says"), [
    ({"scores": "sigmoid"}, "sigmoid scores"), ({"bias_rate": 0.1}, "bias balancing"), ({"z_weight": 0.1}, "a z-loss"),
])  # fmt: skip
def test_what_a_chain_cannot_express_is_not_converted(fields, says):
    with pytest.raises(LuthierError, match=f"layer 1 has {says}"):
        to_coe(mixture(**fields))


def test_nothing_to_convert():
    with pytest.raises(LuthierError, match="no layer has experts"):
        to_coe(build_model({"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                            "num_attention_heads": 4}))  # fmt: skip


def test_scores_are_a_softmax_in_fp32_and_the_loss_reaches_the_router():
    module = built(dtype=torch.bfloat16, residual="prenorm")
    x = states(dtype=torch.bfloat16)
    y, aux = module(x, plain(x))
    assert y.dtype == torch.bfloat16 and aux["loss/balance"].dtype == torch.float32
    aux["loss/balance"].backward()
    assert all(g.abs().sum() > 0 for g in module.mlp.gate.weight.grad)
    assert routing.router_logits(x, module.mlp.gate.weight[0]).dtype == torch.float32
