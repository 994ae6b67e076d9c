"""AdamW against the formulas written out in fp64, with decay and counts per entry."""

import math

import pytest
import torch

from luthier.optim.adamw import AdamW, EntryAdamW

BETAS, EPS, DECAY, LR = (0.7, 0.95), 1e-2, 0.3, 0.04


def slow(start, grads, joined=None):
    """One number at a time; joined[i]: the step before which entry i's state is emptied."""
    values = []
    for i, p in enumerate(start):
        m = v = 0.0
        t = 0
        for step, grad in enumerate(grads):
            if joined is not None and joined[i] == step:
                m = v = 0.0
                t = 0
            g, t = grad[i].item(), t + 1
            p = p - LR * DECAY * p
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g * g
            p = p - LR * (m / (1 - BETAS[0] ** t)) / (math.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
        values.append(p)
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def problem():
    gen = torch.Generator().manual_seed(1)
    return torch.randn(6, generator=gen), [torch.randn(6, generator=gen) for _ in range(25)]


@pytest.mark.parametrize(("fused", "per_entry"), [(True, False), (False, False), (False, True)])
def test_formulas(problem, fused, per_entry):
    start, grads = problem
    leaf = start.clone().requires_grad_(True)
    method = AdamW(betas=BETAS, eps=EPS, weight_decay=DECAY, fused=fused)
    optimizer = method.make([leaf], [{"params": [leaf], "lr": LR, "per_entry": per_entry}])
    for grad in grads:
        leaf.grad = grad.clone()
        optimizer.step()
    assert torch.allclose(leaf.detach().double(), slow(start.tolist(), grads), atol=2e-6)


def test_entries_that_join_late(problem):
    """Entries emptied before steps 3, 10 and 24 count from there; the others go on."""
    start, grads = problem
    joined = [None, 3, 10, 24, 0, None]
    leaf = start.clone().requires_grad_(True)
    method = AdamW(betas=BETAS, eps=EPS, weight_decay=DECAY)
    optimizer = method.make([leaf], [{"params": [leaf], "lr": LR, "per_entry": True}])
    for step, grad in enumerate(grads):
        for i, at in enumerate(joined):
            if at == step and step:
                for value in optimizer.state[leaf].values():
                    value[i] = 0
        leaf.grad = grad.clone()
        optimizer.step()
    assert torch.allclose(leaf.detach().double(), slow(start.tolist(), grads, joined), atol=2e-6)


def test_a_late_entrys_first_step():
    """At the defaults, an emptied entry's first step is lr long with its own count and about 3.2 lr long
    with the count of the others: (1 - 0.9) / sqrt(1 - 0.999) = 3.162."""
    sizes = {}
    for per_entry in (True, False):
        leaf = torch.zeros(2, requires_grad=True)
        optimizer = EntryAdamW([{"params": [leaf], "per_entry": per_entry, "lr": 0.01}], (0.9, 0.999), 1e-8, 0.0)
        for _ in range(8000):
            leaf.grad = torch.ones(2)
            optimizer.step()
        for key, value in optimizer.state[leaf].items():
            if value.dim():
                value[0] = 0
                assert key != "step" or per_entry
        before = leaf.detach().clone()
        leaf.grad = torch.ones(2)
        optimizer.step()
        sizes[per_entry] = ((before - leaf) / 0.01)[0].item()
    assert abs(sizes[True] - 1) < 1e-3
    assert abs(sizes[False] - 3.162) < 2e-2


def test_groups_keep_their_own_settings():
    """A group without `per_entry` beside one with it has one count; its own decay overrides the method's."""
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    groups = [{"params": [a], "lr": 0.1, "per_entry": True}, {"params": [b], "lr": 0.1, "weight_decay": 0.0}]
    optimizer = AdamW(weight_decay=0.5).make([a, b], groups)
    a.grad, b.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert torch.allclose(a, torch.full((3,), 0.95)) and torch.equal(b, torch.ones(3))
    assert optimizer.state[a]["step"].shape == (3,) and optimizer.state[b]["step"].shape == ()


def test_closure_runs_with_gradients():
    leaf = torch.tensor([1.0], requires_grad=True)
    optimizer = AdamW().make([leaf], [{"params": [leaf], "lr": 0.1, "per_entry": True}])

    def closure():
        loss = (leaf**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert abs(leaf.item() - 0.9) < 1e-6


def test_betas_stay_below_one():
    from luthier.errors import LuthierError

    with pytest.raises(LuthierError, match="stay below 1"):
        AdamW(betas=(0.9, 1.0))


def test_defaults_are_the_papers_and_torchs():
    """β 0.9 and 0.999, ε 1e-8, no decay, the fused kernel; a group without a rate has torch's 1e-3."""
    leaf = torch.tensor([3.0], requires_grad=True)
    optimizer = AdamW().make([leaf], [{"params": [leaf]}])
    told = {key: optimizer.defaults[key] for key in ("betas", "eps", "weight_decay", "lr", "fused")}
    assert told == {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "lr": 1e-3, "fused": True}
    loop = AdamW(fused=False).make([leaf], [{"params": [leaf]}])
    assert loop.defaults["fused"] is None and loop.defaults["foreach"] is False
    own = AdamW().make([leaf], [{"params": [leaf], "per_entry": True}])
    assert {key: own.defaults[key] for key in ("betas", "eps", "weight_decay", "lr")} == {
        key: value for key, value in told.items() if key != "fused"
    }
