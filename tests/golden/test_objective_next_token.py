"""Next-token loss against a sum over single tokens in fp64, and against every family's own forward."""

import math

import pytest
import torch
import transformers

from luthier.kit.context import Context
from luthier.kit.logits import head_of
from luthier.model.build import build_model
from luthier.objective.next_token import NextToken
from luthier.testing import tiny

WORDS = 97
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager",
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "olmo2", "gpt_neox", "gpt2"]
CAPPED = ["gemma2", "gemma3_text"]
ROUTED = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe"]
SCALED = ["cohere", "granite"]


def host(family):
    """A tiny model of a family; logits capped or scaled clearly where the family can."""
    if family == "gpt2":
        sizes = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
        config = transformers.GPT2Config(**sizes, eos_token_id=2)
    else:
        extra = {
            **(EXPERTS if family in ROUTED else {}),
            **({"final_logit_softcapping": 2.0} if family in CAPPED else {}),
        }
        extra |= {"logits_scaling": 3.0} if family == "granite" else {"logit_scale": 0.5} if family == "cohere" else {}
        config = transformers.AutoConfig.for_model(family, **SIZES, **extra)
    return tiny.redraw_(transformers.AutoModelForCausalLM.from_config(config), 1, 0.2).eval()


def batch():
    ids = torch.randint(3, WORDS, (3, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def slow(model, given):
    """-log softmax of the label, token by token in fp64; mean over the labels."""
    with torch.no_grad():
        logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits.double()
    total, count = 0.0, 0
    for row in range(given["labels"].shape[0]):
        for place in range(1, given["labels"].shape[1]):
            label = given["labels"][row, place].item()
            if label != -100:
                values = logits[row, place - 1].tolist()
                top = max(values)
                total += top + math.log(sum(math.exp(v - top) for v in values)) - values[label]
                count += 1
    return total / count, count


def agrees(mine, theirs, model, tolerance=2e-6):
    mine.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs.backward()
    assert abs(mine.item() - theirs.item()) < tolerance * max(1.0, abs(theirs.item()))
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(own)
    for name, grad in grads.items():
        assert torch.allclose(grad, own[name], rtol=1e-4, atol=2e-6), name


@pytest.mark.parametrize("chunk", [None, 1, 4, 19, 100])
def test_token_by_token(chunk):
    model, given = host("llama"), batch()
    loss = NextToken(chunk=chunk).loss(model, given, Context())
    expected, count = slow(model, given)
    assert loss.count == count == 19
    assert abs(loss.total.item() - expected) < 2e-6
    assert loss.terms["nll"].item() == loss.total.item() and set(loss.terms) == {"nll"}


@pytest.mark.parametrize("family", [*DENSE, *CAPPED, *SCALED])
def test_family_parity(family):
    """Value and every gradient as from the family's own forward with labels, in stretches of five."""
    model, given = host(family), batch()
    assert (head_of(model) is None) == (family in SCALED)
    agrees(NextToken(chunk=5).loss(model, given, Context()).total, model(**given).loss, model)


@pytest.mark.parametrize("family", ROUTED)
def test_routers_pay(family):
    """The family's balance loss with its coefficient is in the total at aux 1, thrice at 3, out at 0."""
    model, given = host(family), batch()
    agrees(NextToken().loss(model, given, Context()).total, model(**given, output_router_logits=True).loss, model)
    with torch.no_grad():
        plain, one, three = (NextToken(aux=a).loss(model, given, Context()) for a in (0.0, 1.0, 3.0))
    assert "aux" not in plain.terms and plain.total.item() == plain.terms["nll"].item()
    assert abs(plain.total.item() - slow(model, given)[0]) < 2e-6
    gain = one.total.item() - plain.total.item()
    assert gain > 1e-4 and abs(gain - one.terms["aux"].item()) < 1e-6
    assert abs(three.total.item() - plain.total.item() - 3 * gain) < 2e-6


def test_our_decoder():
    """Aux losses of Luthier's own parts are in the total exactly once, as in the decoder's own loss."""
    ffn = {"use": "block.moe", "set": {"experts": 4, "top_k": 2, "width": 16, "balance_weight": 0.5}}
    sizes = {k: v for k, v in SIZES.items() if not k.endswith("_token_id")}
    model, given = build_model({**sizes, "slots": {"ffn": ffn}}, seed=0).train(), batch()
    loss = NextToken(chunk=4).loss(model, given, Context())
    assert loss.terms["aux"].item() > 1e-3
    assert abs(loss.total.item() - loss.terms["nll"].item() - loss.terms["aux"].item()) < 1e-6
    agrees(loss.total, model(**given).loss, model)


def test_logits_only_where_there_is_a_label():
    """The head sees exactly the labelled places, in stretches no longer than asked."""
    model, given, seen = host("llama"), batch(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        NextToken().loss(model, given, Context())
        assert seen == [(19, 32)]
        seen.clear()
        NextToken(chunk=8).loss(model, given, Context())
    assert seen == [(8, 32), (8, 32), (3, 32)]


def test_stretches_fit_the_default_budget(monkeypatch):
    """Without `chunk`, as many places as fit the budget of logits: 97 words and room for 1,000 are ten."""
    from luthier.objective import next_token

    monkeypatch.setattr(next_token, "AT_ONCE", 1000)
    model, given, seen = host("llama"), batch(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        NextToken().loss(model, given, Context())
    assert seen == [10, 9]


def test_positions_are_passed_on():
    """Packed rows restart their positions: two texts in one row, told apart by position and mask alone."""
    model, given = host("llama"), batch()
    given["position_ids"] = torch.arange(10)[None].expand(3, 10) * 2
    with_positions = NextToken().loss(model, given, Context()).total
    theirs = model(**given).loss
    assert abs(with_positions.item() - theirs.item()) < 2e-6
    del given["position_ids"]
    assert abs(NextToken().loss(model, given, Context()).total.item() - theirs.item()) > 1e-4


def test_one_label_and_one_row_at_a_time(monkeypatch):
    """The mean over a single label is its own; a budget below one row of logits still lets one through."""
    from luthier.objective import next_token

    assert next_token.AT_ONCE * 4 == 256 * 2**20
    model, given, seen = host("llama"), batch(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    monkeypatch.setattr(next_token, "AT_ONCE", 10)
    with torch.no_grad():
        NextToken().loss(model, given, Context())
        assert seen == [1] * 19
        given["labels"][:, 1:9] = -100
        given["labels"][1:] = -100
        loss = NextToken().loss(model, given, Context())
        assert loss.count == 1 and abs(loss.total.item() - slow(model, given)[0]) < 2e-6


@pytest.mark.parametrize(("chunk", "again"), [(19, []), (20, []), (18, [1, 18])])
def test_recomputed_only_if_in_stretches(chunk, again):
    """The head runs once where all fits, else again in the backward pass, which any way of asking may start."""
    model, seen = host("llama"), []
    loss = NextToken(chunk=chunk).loss(model, batch(), Context()).total
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    torch.autograd.grad(loss, list(model.parameters()))
    assert seen == again


def test_terms_carry_no_gradient():
    loss = NextToken().loss(host("olmoe"), batch(), Context())
    assert set(loss.terms) == {"nll", "aux"} and not any(term.requires_grad for term in loss.terms.values())
