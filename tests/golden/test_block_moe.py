"""block.moe against a twin that goes token by token, stock routers and blocks, and hand calculation."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from luthier.block.moe import Moe
from luthier.errors import LuthierError
from luthier.kit import routing
from luthier.kit.moe_apply import moe_apply
from luthier.kit.parts import Pass
from luthier.model import LuthierConfig, Spec, init_weights
from luthier.testing.decoders import refill

D, E, INNER = 6, 5, 8


def built(dtype=torch.float64, **fields):
    config = LuthierConfig(
        vocab_size=11, hidden_size=D, num_attention_heads=1, intermediate_size=24, num_hidden_layers=4
    )
    fields = {"experts": E, "width": INNER, **fields}
    return refill(Moe(**fields).build(Spec(config, "ffn", 3))).to(dtype).train()


def states(batch=2, length=9, dtype=torch.float64):
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(7)).to(dtype)


def plain(x, keep=None):
    return Pass(positions_BT=torch.arange(x.shape[1])[None], keep_BT=keep)


def swiglu(x, gate, up, down):
    return down @ (F.silu(gate @ x) * (up @ x))


def slow(module, x, k, scores="softmax", renormalise=True, bias=None):
    """Token by token, expert by expert; also who chose whom."""
    bank, out, chosen = module.experts, torch.zeros_like(x), []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            logits = (module.gate.weight @ x[b, t]).tolist()
            if scores == "softmax":
                total = sum(math.exp(v) for v in logits)
                score = [math.exp(v) / total for v in logits]
            else:
                score = [1 / (1 + math.exp(-v)) for v in logits]
            ranked = [s + (bias[e] if bias else 0.0) for e, s in enumerate(score)]
            best = sorted(range(E), key=lambda e: -ranked[e])[:k]
            weights = [score[e] / (sum(score[i] for i in best) if renormalise else 1) for e in best]
            for w, e in zip(weights, best, strict=True):
                out[b, t] += w * swiglu(x[b, t], bank.gate_proj[e], bank.up_proj[e], bank.down_proj[e])
            if module.shared_experts is not None:
                s = module.shared_experts
                out[b, t] += swiglu(x[b, t], s.gate_proj.weight, s.up_proj.weight, s.down_proj.weight)
            chosen.append((b, t, best, score, logits))
    return out, chosen


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("shared", [0, 2])
def test_twin(k, scores, renormalise, shared):
    if k == 1 and renormalise:
        return  # refused, see below
    module = built(top_k=k, scores=scores, renormalise=renormalise, shared=shared)
    x = states()
    want, _ = slow(module, x, k, scores, renormalise)
    assert torch.allclose(module(x, plain(x))[0], want, atol=1e-12)


def test_bias_takes_part_in_the_choice_only():
    module = built(top_k=2, scores="sigmoid", bias_rate=0.001)
    bias = [0.5, -0.5, 0.0, 0.25, -1.0]
    module.gate.e_score_correction_bias.copy_(torch.tensor(bias))
    x = states()
    want, chosen = slow(module, x, 2, "sigmoid", bias=bias)
    unbiased, other = slow(module, x, 2, "sigmoid")
    assert [set(c[2]) for c in chosen] != [set(c[2]) for c in other]
    assert torch.allclose(module(x, plain(x))[0], want, atol=1e-12)


def test_gradients_are_the_twins():
    module, x = built(top_k=2, shared=1, balance_weight=0.0), states().requires_grad_()
    weigh = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(8))
    wanted = [x, *(p for p in module.parameters() if p is not module.gate.weight)]
    (module(x, plain(x))[0] * weigh).sum().backward()
    mine = [p.grad.clone() for p in wanted]
    scores = (x.detach() @ module.gate.weight.T).softmax(-1)
    assert module.gate.weight.grad.abs().sum() > 0
    for p in wanted:
        p.grad = None
    # the router's part of x's gradient is checked by finite differences in the contract suite: hold it still
    y, index = 0, scores.topk(2, dim=-1)
    for b in range(2):
        for t in range(9):
            w = (index.values[b, t] / index.values[b, t].sum()).tolist()
            bank, s = module.experts, module.shared_experts
            out = swiglu(x[b, t], s.gate_proj.weight, s.up_proj.weight, s.down_proj.weight)
            for weight, e in zip(w, index.indices[b, t].tolist(), strict=True):
                out = out + weight * swiglu(x[b, t], bank.gate_proj[e], bank.up_proj[e], bank.down_proj[e])
            y = y + (out * weigh[b, t]).sum()
    y.backward()
    for p, grad in list(zip(wanted, mine, strict=True))[1:]:
        assert torch.allclose(p.grad, grad, atol=1e-12)


def test_experts_nobody_chose():
    """Empty experts in the middle and at the ends give nothing and get a zero gradient."""
    x = states(1, 4)[0]
    bank = [torch.randn(E, *shape, dtype=x.dtype, generator=torch.Generator().manual_seed(n), requires_grad=True)
            for n, shape in enumerate(((INNER, D), (INNER, D), (D, INNER)))]  # fmt: skip
    index, weight = torch.tensor([[1, 3], [3, 1], [1, 3], [3, 1]]), torch.tensor([[0.25, 0.75]] * 4, dtype=x.dtype)
    y = moe_apply(x, index, weight, tuple(bank[:2]), bank[2])
    want = torch.stack([
        sum(weight[n, j] * swiglu(x[n], *(w[index[n, j]] for w in bank)) for j in range(2)) for n in range(4)
    ])  # fmt: skip
    assert torch.allclose(y, want, atol=1e-12)
    y.sum().backward()
    for w in bank:
        used = w.grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [False, True, False, True, False]


def test_mixtral_and_olmoe_blocks():
    x = states(dtype=torch.float32)
    sizes = {"hidden_size": D, "intermediate_size": INNER, "num_experts_per_tok": 2}
    for renormalise, kind, config in (
        (True, MixtralSparseMoeBlock, MixtralConfig(**sizes, num_local_experts=E, experts_implementation="eager")),
        (False, OlmoeSparseMoeBlock, OlmoeConfig(**sizes, num_experts=E, experts_implementation="eager")),
    ):
        module, peer = built(torch.float32, top_k=2, renormalise=renormalise), kind(config)
        peer.gate.weight.data = module.gate.weight.data
        peer.experts.gate_up_proj.data = torch.cat((module.experts.gate_proj, module.experts.up_proj), 1).data
        peer.experts.down_proj.data = module.experts.down_proj.data
        assert torch.allclose(module(x, plain(x))[0], peer(x), atol=1e-5), kind.__name__


def test_deepseek_v3_router():
    config = DeepseekV3Config(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=3, n_group=1, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=1.0, num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    router = refill(DeepseekV3TopkRouter(config))
    router.e_score_correction_bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0, -0.1]))
    x = states(dtype=torch.float32).flatten(0, 1)
    _, weights, index = router(x)
    scores = routing.router_logits(x, router.weight).sigmoid()
    mine, mine_weights = routing.choose(scores, 3, True, router.e_score_correction_bias)
    dense = [torch.zeros(len(x), E).scatter(1, i, w) for i, w in ((index, weights), (mine, mine_weights))]
    assert torch.allclose(dense[0], dense[1], atol=1e-6)


def test_balance_loss_by_hand():
    """Two sequences of two tokens, two experts, top 1. First: both choose expert 0 with .9 and .6:
    f = (2, 0), P = (.75, .25), 1.5. Second: one each, with .8 and .3: f = (1, 1), P = (.55, .45), 1.
    Over the batch: f = (1.5, .5), P = (.65, .35), 1.15."""
    scores = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [0.3, 0.7]]])
    load = routing.loads(scores.argmax(-1, keepdim=True), 2)
    assert load.tolist() == [[2, 0], [1, 1]]
    assert routing.balance_loss(scores, load, 1, over="sequence").item() == pytest.approx(1.25)
    assert routing.balance_loss(scores, load, 1, over="batch").item() == pytest.approx(1.15)


def test_balance_loss_with_padding_by_hand():
    """Without the second token of the first sequence: f = (2, 0), P = (.9, .1): 1.8, average 1.4; over
    the batch, 3 tokens: f = (4/3, 2/3), P = (2/3, 1/3): 10/9. A third, empty sequence counts nowhere."""
    scores = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [0.3, 0.7]], [[0.5, 0.5], [0.5, 0.5]]])
    keep = torch.tensor([[True, False], [True, True], [False, False]])
    load = routing.loads(scores.argmax(-1, keepdim=True), 2, keep)
    assert load.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert routing.balance_loss(scores, load, 1, keep, "sequence").item() == pytest.approx(1.4)
    assert routing.balance_loss(scores, load, 1, keep, "batch").item() == pytest.approx(10 / 9)


def test_balance_loss_is_one_where_even():
    scores = torch.full((2, 6, 3), 1 / 3)
    load = torch.full((2, 3), 4.0)  # 6 tokens, top 2
    for over in ("sequence", "batch"):
        assert routing.balance_loss(scores, load, 2, over=over).item() == pytest.approx(1.0)


def test_z_loss_by_hand():
    """Logits (0, 0) and (ln 3, 0): log 2 and log 4, squared .480453 and 1.921812."""
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]])
    assert routing.z_loss(logits).item() == pytest.approx((0.480453 + 1.921812) / 2, abs=1e-5)
    assert routing.z_loss(logits, torch.tensor([[False, True]])).item() == pytest.approx(1.921812, abs=1e-5)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balance", ["sequence", "batch"])
def test_aux_of_the_layer(scores, balance):
    """Losses with their weights, loads and violation, from the twin's choices; padding left out."""
    module = built(top_k=2, scores=scores, balance=balance, balance_weight=0.5, z_weight=0.25)
    x = states()
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, :4] = False
    _, aux = module(x, plain(x, keep))
    _, chosen = slow(module, x, 2, scores)
    real = [c for c in chosen if keep[c[0], c[1]]]
    groups = [[c for c in real if c[0] == b] for b in range(2)] if balance == "sequence" else [real]
    losses = []
    for group in groups:
        share = [sum(e in c[2] for c in group) * E / (2 * len(group)) for e in range(E)]
        mass = [sum(c[3][e] / sum(c[3]) for c in group) / len(group) for e in range(E)]
        losses.append(sum(f * p for f, p in zip(share, mass, strict=True)))
    load = [sum(e in c[2] for c in real) for e in range(E)]
    square = [math.log(sum(math.exp(v) for v in c[4])) ** 2 for c in real]
    assert aux["loss/balance"].item() == pytest.approx(0.5 * sum(losses) / len(losses), rel=1e-6)
    assert aux["loss/z"].item() == pytest.approx(0.25 * sum(square) / len(square), rel=1e-6)
    assert aux["metric/load.3"].tolist() == load
    assert aux["metric/max_violation.3"].item() == pytest.approx(max(load) / (sum(load) / E) - 1)


def test_no_losses_outside_training_or_at_weight_zero():
    x = states()
    assert not [k for k in built(z_weight=1.0).eval()(x, plain(x))[1] if k.startswith("loss/")]
    assert not [k for k in built(balance_weight=0.0)(x, plain(x))[1] if k.startswith("loss/")]


def test_bias_step_by_hand():
    """Loads 4, 1, 1, 2 have the mean 2: down, up, up, still."""
    bias = routing.stepped_bias(torch.tensor([0.0, 0.5, -0.5, 0.25]), torch.tensor([4.0, 1.0, 1.0, 2.0]), 0.125)
    assert bias.tolist() == [-0.125, 0.625, -0.375, 0.25]
    assert routing.max_violation(torch.tensor([4.0, 1.0, 1.0, 2.0])).item() == 1.0


def test_bias_moves_once_a_step_by_all_it_saw():
    """Two micro-batches with opposite majorities: the sum of the loads decides, not the last."""
    module = built(experts=2, top_k=1, renormalise=False, bias_rate=0.01)
    bias = module.gate.e_score_correction_bias
    module.observe({"metric/load.3": torch.tensor([5.0, 1.0])})
    module.observe({"metric/load.3": torch.tensor([1.0, 9.0])})
    assert bias.tolist() == [0.0, 0.0]
    module.after_step()
    assert bias.tolist() == pytest.approx([0.01, -0.01])
    module.after_step()  # nothing seen since
    assert bias.tolist() == pytest.approx([0.01, -0.01])


def test_without_bias_balancing_there_is_no_bias():
    module = built()
    module.observe({"metric/load.3": torch.ones(E)})
    module.after_step()
    assert not list(module.buffers())


def test_bias_starts_at_zero_and_everything_else_at_random():
    module = built(bias_rate=1e-3, shared=1)
    module.gate.e_score_correction_bias.fill_(1.0)
    init_weights(module, seed=0, std=0.5)
    assert module.gate.e_score_correction_bias.tolist() == [0.0] * E
    assert all(0.3 < p.std() < 0.7 for p in module.parameters())


def test_bias_stays_fp32_when_the_model_is_cast():
    module = built(torch.float32, bias_rate=1e-3)
    module.gate.e_score_correction_bias.fill_(0.1 + 1e-3)
    module.bfloat16()
    assert module.gate.weight.dtype == torch.bfloat16
    assert module.gate.e_score_correction_bias.dtype == torch.float32
    assert torch.all(module.gate.e_score_correction_bias == torch.tensor(0.1 + 1e-3))


def test_router_works_in_fp32():
    """Logits that bf16 cannot tell apart are told apart, also under autocast."""
    weight = torch.tensor([[1.0, 0.0], [1.0, 2.0**-10]], dtype=torch.bfloat16)
    x = torch.tensor([[[1.0, 1.0]]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = routing.router_logits(x, weight)
    assert logits.dtype == torch.float32 and logits[0, 0, 1] > logits[0, 0, 0]
    module, x = built(torch.float32, shared=1), states(dtype=torch.float32)
    want = module(x, plain(x))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x, plain(x))[0]
    assert (y - want).abs().max() < 0.1 * want.abs().max()


def test_width_divides_the_models_among_the_experts_of_a_token():
    assert built(width=None, top_k=2, shared=1).experts.gate_proj.shape == (E, 8, D)
    assert built(width=None, top_k=2, shared=1).shared_experts.gate_proj.weight.shape == (8, D)
    assert built(width=None, top_k=3).experts.down_proj.shape == (E, D, 8)
    assert built(shared=2).shared_experts.up_proj.weight.shape == (2 * INNER, D)
    assert built(width=None, experts=24, top_k=24).experts.up_proj.shape == (24, 1, D)
    with pytest.raises(LuthierError, match="too small"):
        built(width=None, experts=32, top_k=32)


def test_defaults():
    """Eight experts, two a token, and Switch's coefficient 1e-2; the other balancing is off."""
    part = Moe()
    assert (part.experts, part.top_k, part.shared, part.width) == (8, 2, 0, None)
    assert (part.balance_weight, part.z_weight, part.bias_rate) == (0.01, 0.0, 0.0)


def test_refusals():
    with pytest.raises(LuthierError, match="top_k 3 exceeds the 2 experts"):
        Moe(experts=2, top_k=3)
    for experts in (2, 4):
        with pytest.raises(LuthierError, match="renormalise: false"):
            Moe(experts=experts, top_k=1)
    assert Moe(experts=1, top_k=1).renormalise
    assert Moe(experts=4, top_k=1, renormalise=False).top_k == 1
    assert Moe(experts=4, top_k=4).top_k == 4


def test_transformers_pools_layers():
    """Two layers, each of which sends every token to one expert, to opposite ones: the loss of
    transformers is at its minimum (top_k), Switch's per layer is twice what an even layer gives."""
    logits = (torch.tensor([[20.0, 0.0]] * 8), torch.tensor([[0.0, 20.0]] * 8))
    pooled = load_balancing_loss_func(logits, num_experts=2, top_k=1)
    assert pooled.item() == pytest.approx(1.0, abs=1e-4)
    for layer in logits:
        scores = layer.softmax(-1)[None]
        own = routing.balance_loss(scores, routing.loads(scores.argmax(-1, keepdim=True), 2), 1)
        assert own.item() == pytest.approx(2.0, abs=1e-4)
        # of one layer the two agree, but for the factor top_k
        assert load_balancing_loss_func((layer,), num_experts=2, top_k=1).item() == pytest.approx(own.item())
