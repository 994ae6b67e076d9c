"""LIFT against slow twins written from the paper's Algorithm 1, and a mask worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from luthier.engine.moments import remap
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.sparse import Selected
from luthier.kit.top import jaccard
from luthier.optim.adamw import AdamW
from luthier.testing import tiny
from luthier.testing.tune import Run
from luthier.tune.lift import Lift

BETAS, EPS, LR = (0.8, 0.9), 1e-3, 0.02


def slow_mask(W, k, rank):
    """Top k of |U_r S_r V_r|, by numpy's SVD in fp64 and a full sort; ties do not occur."""
    U, S, Vh = np.linalg.svd(W.double().numpy())
    low = np.zeros(W.shape)
    for i in range(rank):
        low += S[i] * np.outer(U[:, i], Vh[i])
    order = sorted(range(W.numel()), key=lambda j: -abs(low.flat[j]))
    mask = np.zeros(W.numel(), dtype=bool)
    mask[order[:k]] = True
    return torch.from_numpy(mask.reshape(W.shape))


def as_mask(index, shape):
    mask = torch.zeros(shape, dtype=torch.bool).view(-1)
    mask[index.long()] = True
    return mask.view(shape)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
@pytest.mark.parametrize("rank", [1, 4])
def test_mask_is_the_svds(shape, rank):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    index, _ = Lift(share=0.07, rank=rank).mask(W)
    assert torch.equal(as_mask(index, shape), slow_mask(W, round(0.07 * W.numel()), rank))


def test_default_rank_is_a_32nd_of_the_short_side():
    W = torch.randn(96, 160, generator=torch.Generator().manual_seed(3))
    assert torch.equal(as_mask(Lift().mask(W)[0], W.shape), slow_mask(W, round(0.05 * W.numel()), 3))


def test_lora_budget_as_in_the_official_scripts():
    """k = min((m + n) r, m n) a matrix, the mask's rank apart from it."""
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    index, _ = Lift(lora_rank=2, rank=4).mask(W)
    assert torch.equal(as_mask(index, W.shape), slow_mask(W, 100, 4))
    assert Lift(lora_rank=15).mask(W)[0].numel() == 600


def test_by_hand():
    """W = 4 u vᵀ + a small rest, u = (0.6, 0.8), v = (0, 1, 0): the approximation of rank 1 is
    [[0, 2.4, 0], [0, 3.2, 0]] however large the other entries of W are beside it; the two entries of
    column 1 are at flat places 1 and 4, though |W| is largest at 1 and 2."""
    W = torch.tensor([[0.0, 2.4, 0.0], [0.0, 3.2, 0.0]])
    W += 3.0 * torch.outer(torch.tensor([0.8, -0.6]), torch.tensor([0.0, 0.0, 1.0]))
    assert torch.allclose(W, torch.tensor([[0.0, 2.4, 2.4], [0.0, 3.2, -1.8]]))
    assert Lift(share=1 / 3, rank=1).mask(W)[0].tolist() == [1, 4]


def test_squares():
    """Squares of 4 x 4 by the sum of |approximation| inside, the best round(k / 16) of them."""
    W = torch.randn(16, 24, generator=torch.Generator().manual_seed(5))
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    low = abs((U[:, :2] * S[:2]) @ Vh[:2])
    sums = {(a, b): low[4 * a : 4 * a + 4, 4 * b : 4 * b + 4].sum() for a in range(4) for b in range(6)}
    mask = torch.zeros(16, 24, dtype=torch.bool)
    for a, b in sorted(sums, key=lambda at: -sums[at])[:5]:
        mask[4 * a : 4 * a + 4, 4 * b : 4 * b + 4] = True
    index, _ = Lift(share=0.2, rank=2, block=4).mask(W)  # 0.2 * 384 = 77 entries: 5 squares
    assert torch.equal(as_mask(index, W.shape), mask)


def test_stacks_are_matrices_one_by_one():
    stack = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(6))
    index, vectors = Lift(share=0.1, rank=2).mask(stack)
    assert vectors.shape == (3, 12, 12)  # rank + 16, or as many as there are
    for i, W in enumerate(stack):
        assert torch.equal(as_mask(index, stack.shape)[i], slow_mask(W, 24, 2))


class Slow:
    """Algorithm 1 with dense masks and moments: gather by the new mask after a scatter by the old one."""

    def __init__(self, W, k, rank, per_entry):
        self.W, self.k, self.rank, self.per_entry = W.double().clone(), k, rank, per_entry
        self.m, self.v, self.t = (torch.zeros_like(self.W) for _ in range(3))
        self.mask, self.steps = slow_mask(self.W, k, rank), 0

    def step(self, grad):
        self.steps += 1
        at, g = self.mask, grad.double()
        self.t[at] += 1
        self.m[at] = BETAS[0] * self.m[at] + (1 - BETAS[0]) * g[at]
        self.v[at] = BETAS[1] * self.v[at] + (1 - BETAS[1]) * g[at] ** 2
        t = self.t[at] if self.per_entry else torch.tensor(float(self.steps))
        m, v = self.m[at] / (1 - BETAS[0] ** t), self.v[at] / (1 - BETAS[1] ** t)
        self.W[at] -= LR * m / (v.sqrt() + EPS)

    def refresh(self):
        new = slow_mask(self.W, self.k, self.rank)
        for kept in (self.m, self.v, self.t):
            kept[~(self.mask & new)] = 0
        self.mask = new


class One(nn.Module):
    """One matrix as a model; the loss of a step is a fixed linear form, so gradients are known."""

    def __init__(self, W):
        super().__init__()
        self.weight = nn.Parameter(W.clone())


@pytest.mark.parametrize("count", ["leaf", "entry"])
def test_algorithm_1(count):
    """Twelve steps, a new mask after every third: weights to rounding, masks exactly."""
    gen = torch.Generator().manual_seed(11)
    W, method = torch.randn(24, 36, generator=gen), Lift(share=0.1, rank=2, every=3, refresh="exact", count=count)
    slow, model = Slow(W, round(0.1 * W.numel()), 2, count == "entry"), One(W)

    def choose(name, weight, step):
        return method.mask(weight)[0]

    first = {"weight": method.mask(W)[0]}
    tuned = Selected(model, {"weight": model.weight}, first, dict, choose, 3, count == "entry")
    groups = [{**g, "lr": LR} for g in tuned.groups()]
    optimizer = AdamW(betas=BETAS, eps=EPS).make(tuned.leaves(), groups)
    seen = [slow.mask.clone()]
    for step in range(1, 13):
        grad = torch.randn(W.shape, generator=gen)
        (model.weight * grad).sum().backward()
        assert model.weight.grad is None
        optimizer.step()
        remap(optimizer, tuned.after_step(step))
        optimizer.zero_grad()
        slow.step(grad)
        if step % 3 == 0:
            slow.refresh()
            seen.append(slow.mask.clone())
        assert torch.equal(as_mask(tuned.indices()["weight"], W.shape), slow.mask), step
        assert torch.allclose(model.weight.double(), slow.W, atol=2e-6), step
    assert sum(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)) >= 3


def test_bind_uses_this_mask():
    """The selection of a bound model is the mask of each of its matrices; embeddings and head are out."""
    model, method = tiny.llama(), Lift(share=0.04, rank=3)
    tuned = method.bind(model, Context())
    names = {n for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n}
    assert set(tuned.indices()) == names and len(names) == 14
    for name, index in tuned.indices().items():
        W = model.get_parameter(name).detach()
        assert torch.equal(as_mask(index, W.shape), slow_mask(W, round(0.04 * W.numel()), 3)), name


def test_defaults():
    """The interval of the official argument parser, everything linear, one count a matrix, a warm refresh."""
    told = Lift().to_dict()["set"]
    assert told == {
        "share": None, "lora_rank": None, "rank": None, "every": 200, "refresh": "warm", "block": 1,
        "targets": ["linear"], "count": "leaf",
    }  # fmt: skip
    assert Lift().mask(torch.randn(40, 50))[0].numel() == 100


def test_masks_are_shared_between_specialists(tmp_path):
    """Two steps of a run from the same weights compute the mask once; other weights or fields do not share."""
    told = []
    ctx = Context(step="math", cache=tmp_path, watch=told.append)
    a = Lift(share=0.1).bind(tiny.llama(), ctx)
    first = len(told)
    b = Lift(share=0.1).bind(tiny.llama(), ctx.with_(step="python", seed=5))
    assert first > 0 and len(told) == first
    assert all(torch.equal(a.indices()[n], b.indices()[n]) for n in a.indices())
    Lift(share=0.1, every=None, count="entry").bind(tiny.llama(), ctx)
    assert len(told) == first
    for again, fields in ((tiny.llama(1), {"share": 0.1}), (tiny.llama(), {"share": 0.2}), (tiny.llama(), {"rank": 2})):
        before = len(told)
        Lift(**fields).bind(again, ctx)
        assert len(told) > before, fields


@pytest.mark.parametrize("refresh", ["warm", "exact"])
def test_refreshed_masks_are_those_of_the_moved_weights(refresh):
    run = Run(Lift(every=3, refresh=refresh, rank=3), lr=0.05).steps(2)
    before = {n: i.clone() for n, i in run.tuned.indices().items()}
    run.steps(1)
    changed = 0
    for name, index in run.tuned.indices().items():
        exact = Lift(rank=3).mask(run.model.get_parameter(name))[0]
        assert jaccard(index, exact) > (0.999 if refresh == "exact" else 0.6), name
        changed += not torch.equal(index, before[name])
    assert changed > 3
    assert bool(run.tuned.memory) == (refresh == "warm")


def test_weights_that_are_not_finite_are_named():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(LuthierError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        Lift().bind(model, Context())


def test_small_sides_and_spare_vectors():
    """Rank 1 below 48 rows, 2 at 48 (half a 32nd rounds up); twice the vectors, or 16 to spare, or all."""
    for rows, rank in ((16, 1), (47, 1), (48, 2)):
        W = torch.randn(rows, 60, generator=torch.Generator().manual_seed(rows))
        index, vectors = Lift().mask(W)
        assert torch.equal(as_mask(index, W.shape), slow_mask(W, 3 * rows, rank)), rows
        assert vectors.shape == (1, rows, min(rows, rank + 16))
    assert Lift(rank=20).mask(W)[1].shape == (1, 48, 40)
    assert Lift(rank=15).mask(W)[1].shape == (1, 48, 31)


def test_vectors_are_kept_where_they_are_needed():
    """Those of the last mask, for a warm refresh; none for an exact one or none at all."""
    run = Run(Lift(every=2))
    first = dict(run.tuned.memory)
    assert set(first) == set(run.tuned.indices())
    run.steps(2)
    assert all(not torch.equal(first[n], v) for n, v in run.tuned.memory.items())
    for fields in ({"every": None}, {"refresh": "exact"}, {"every": None, "refresh": "exact"}):
        assert Run(Lift(**fields)).tuned.memory == {}


def test_what_a_shared_mask_depends_on():
    """Names, shapes, dtypes and bytes of the weights, and the fields that choose entries; nothing else."""
    w, plain = nn.Parameter(torch.zeros(4, 6)), Lift()
    keys = [
        plain._key({"a": w}), plain._key({"b": w}), plain._key({"a": nn.Parameter(torch.zeros(6, 4))}),
        plain._key({"a": nn.Parameter(torch.ones(4, 6))}),
        plain._key({"a": w, "b": w}), Lift(share=0.1)._key({"a": w}), Lift(lora_rank=1)._key({"a": w}),
        Lift(rank=1)._key({"a": w}), Lift(block=4)._key({"a": w}),
    ]  # fmt: skip
    assert len({str(key) for key in keys}) == len(keys)
    assert Lift(every=7, refresh="exact", count="entry", targets=("a",))._key({"a": w}) == plain._key({"a": w})
