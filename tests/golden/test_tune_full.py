"""Full tuning of chosen parameters against a bare loop over exactly those, and one step by hand."""

import torch
from torch import nn

from luthier.kit.context import Context
from luthier.optim.adamw import AdamW
from luthier.testing import tiny
from luthier.testing.tune import Run, batches
from luthier.tune.full import Full


def test_targets_alone_move():
    """Globs of names and roles of several parts, biased neither by order nor by doubles."""
    method = Full(targets=("attn.?", "*.layers.0.mlp.up_proj.weight", "norm", "attn.q"))
    run = Run(method).steps(4)
    model = tiny.llama().train()
    chosen = [
        p
        for n, p in model.named_parameters()
        if any(f"self_attn.{x}_proj" in n for x in "qkvo") or "layers.0.mlp.up" in n or "norm" in n
    ]
    assert len(chosen) == len(run.tuned.leaves()) == 8 + 1 + 5
    optimizer = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.0, foreach=False)
    for ids in batches(4):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for (name, mine), other in zip(run.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_first_step_by_hand():
    """AdamW's first step moves every entry by lr · g / (|g| + ε): by lr towards -sign(g) for large g."""
    model = tiny.llama().train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = Full().bind(model, Context())
    optimizer = AdamW(fused=False, eps=1e-3).make(tuned.leaves(), [{"params": tuned.leaves(), "lr": 0.25}])
    ids = batches(1)[0]
    model(ids, labels=ids).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        g = grads[name].double()
        assert torch.allclose(p.double(), before[name] - 0.25 * g / (g.abs() + 1e-3), atol=1e-6), name


def test_delta_is_new_and_old():
    """The delta of a subset holds that subset, its values those of the two models."""
    run = Run(Full(targets=("*.down_proj.weight",))).steps(2)
    delta, base = run.tuned.delta(), tiny.llama().state_dict()
    assert sorted(delta.changes) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    for name, change in delta.changes.items():
        assert torch.equal(change.old, base[name].view(-1))
        assert torch.equal(change.new, run.weights()[name].view(-1))
    assert isinstance(run.tuned.bake(), nn.Module)


def test_the_others_ask_for_no_gradient():
    """So backward does no work for them; the state is plain, without a graph."""
    tuned = Full(targets=("*.down_proj.weight",)).bind(tiny.llama(), Context())
    asking = {n for n, p in tuned.model.named_parameters() if p.requires_grad}
    assert asking == set(tuned.state()) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert not any(value.requires_grad for value in tuned.state().values())
