"""Stable-SPAM against its formulas and the released steps written out in plain Python, and hand calculations."""

import copy
import math

import pytest
import torch

from luthier.catalogue import load
from luthier.engine.moments import load_optimizer, optimizer_state, remap
from luthier.errors import LuthierError
from luthier.flows import Remap
from luthier.kit.context import Context
from luthier.optim.stable_spam import StableSpam
from luthier.testing import tiny

LR, DECAY, EPS, BETAS = 0.04, 0.3, 1e-2, (0.7, 0.95)
FIELDS = {"betas": BETAS, "eps": EPS, "weight_decay": DECAY}


def cosine(step, total):
    return 1.0 if total is None else 0.5 + 0.5 * (1 + math.cos(math.pi * min(step, total + 1) / (total + 1))) / 2


class Twin:
    """One tensor as a list of numbers; every quantity a variable of its own, the released form with its one count."""

    def __init__(self, start, clip=None, norm=None, reset=None, anneal=None, official=False):
        self.p, self.m, self.v = list(start), [0.0] * len(start), [0.0] * len(start)
        self.clip, self.norm, self.reset, self.anneal, self.official = clip, norm, reset, anneal, official
        self.total = self.adam = self.shared = 0
        self.top = self.mu = self.nu = 0.0

    def step(self, g):
        self.total, self.adam, self.shared = self.total + 1, self.adam + 1, self.shared + 1
        t, scale = self.shared if self.official else self.total, cosine(self.total, self.anneal)
        if self.clip is not None:
            top = max(abs(x) for x in g)
            self.top = self.clip * self.top + (1 - self.clip) * top
            cap = self.top / (1 - self.clip**t)
            g = [x / top * cap if abs(x) > cap else x for x in g]
        if self.norm is not None:
            a, b = self.norm[0] * scale, self.norm[1]
            n = math.sqrt(sum(x * x for x in g))
            self.mu, self.nu = a * self.mu + (1 - a) * n, b * self.nu + (1 - b) * n * n
            if n > 0:
                to = self.mu / (1 - a**t) / (math.sqrt(self.nu / (1 - b**t)) + EPS)
                g = [x / n * to for x in g]
        due = self.reset is not None and self.total % self.reset == 0
        if due:
            self.adam = self.shared = 1
        old = self.m, self.v
        if due:
            self.m, self.v = [0.0] * len(g), [0.0] * len(g)
        used = old if due and self.official else (self.m, self.v)
        a, b = BETAS[0] * scale, BETAS[1]
        for i, x in enumerate(g):
            m, v = a * used[0][i] + (1 - a) * x, b * used[1][i] + (1 - b) * x * x
            move = m / (1 - a**self.adam) / (math.sqrt(v / (1 - b**self.adam)) + EPS)
            self.p[i] = self.p[i] * (1 - LR * DECAY) - LR * move
            if not (due and self.official):
                self.m[i], self.v[i] = m, v


def gradients(count=30, size=6, spikes=(7, 13, 22)):
    gen = torch.Generator().manual_seed(1)
    made = [torch.randn(size, generator=gen, dtype=torch.float64) for _ in range(count)]
    for step in spikes:
        made[step][step % size] *= 100
    return made


def leaf_of(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).requires_grad_(True)


def optimizer_of(leaf, per_entry=False, lr=LR, **fields):
    return StableSpam(**fields).make([leaf], [{"params": [leaf], "lr": lr, "per_entry": per_entry}])


def run(leaf, optimizer, grads):
    for grad in grads:
        leaf.grad = grad.to(leaf.dtype)
        optimizer.step()
    return leaf.detach().double().tolist()


OFF = {"clip": None, "norm": None, "reset": None}
ARMS = [
    OFF, {**OFF, "clip": 0.8}, {**OFF, "norm": (0.6, 0.9)}, {**OFF, "reset": 7}, {**OFF, "clip": 0.8, "reset": 7},
    {"clip": 0.8, "norm": (0.6, 0.9), "reset": 10}, {"clip": 0.8, "norm": (0.6, 0.9), "reset": 10, "anneal": 12},
    {"clip": 0.8, "norm": (0.6, 0.9), "reset": None, "anneal": 100}, {"clip": 0.8, "norm": (0.6, 0.9), "reset": 1},
]  # fmt: skip


@pytest.mark.parametrize("per_entry", [False, True])
@pytest.mark.parametrize("compat", ["paper", "official"])
@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_formulas(arm, compat, per_entry):
    start, grads = [0.3, -1.0, 0.8, 2.0, -0.1, 0.5], gradients()
    leaf = leaf_of(start, torch.float64)
    found = run(leaf, optimizer_of(leaf, per_entry, compat=compat, **FIELDS, **arm), grads)
    twin = Twin(start, **arm, official=compat == "official")
    for grad in grads:
        twin.step(grad.tolist())
    assert found == pytest.approx(twin.p, abs=2e-6 if per_entry else 1e-9)


def test_the_two_forms_differ_only_after_a_reset():
    start, grads = [0.3, -1.0, 0.8, 2.0, -0.1, 0.5], gradients()
    for steps, differ in ((9, False), (10, True), (20, True)):
        found = []
        for compat in ("paper", "official"):
            leaf = leaf_of(start)
            found.append(run(leaf, optimizer_of(leaf, reset=10, compat=compat), grads[:steps]))
        assert (found[0] != found[1]) is differ


def test_a_spike_by_hand():
    """Without rescaling: three gradients of (2, 1), then (20, 1). T̂ = (2·(.5³ + .5² + .5¹) / 2 + 10) / (1 - .5⁴)
    = 10.875 / 0.9375 = 11.6, so 20 becomes 11.6 and 1 stays."""
    leaf = leaf_of([0.0, 0.0])
    optimizer = optimizer_of(leaf, clip=0.5, norm=None, reset=None, betas=(0.0, 0.5))
    run(leaf, optimizer, [torch.tensor([2.0, 1.0])] * 3 + [torch.tensor([-20.0, 1.0])])
    assert optimizer.state[leaf]["exp_avg"].tolist() == pytest.approx([-11.6, 1.0])
    assert optimizer.state[leaf]["peak"].item() == pytest.approx(10.875)


def test_a_spikes_neighbours_shrink_with_it():
    """Entries above the cap are scaled by one factor, not cut at the cap: 20 and 15 become 11.6 and 8.7."""
    leaf = leaf_of([0.0, 0.0])
    optimizer = optimizer_of(leaf, clip=0.5, norm=None, reset=None, betas=(0.0, 0.5))
    run(leaf, optimizer, [torch.tensor([2.0, 1.0])] * 3 + [torch.tensor([20.0, -15.0])])
    assert optimizer.state[leaf]["exp_avg"].tolist() == pytest.approx([11.6, -8.7])


def test_a_norm_by_hand():
    """Norms 5 and 10 at γ = (.5, .8): μ̂ = (.5·2.5 + 5) / .75 = 25/3, ν̂ = (.8·5 + 20) / .36 = 66.67, so (6, 8)
    becomes (.6, .8) · 25/3 / √66.67 = (.6, .8) · 1.0206; with a single gradient the norm is 1."""
    leaf = leaf_of([0.0, 0.0])
    optimizer = optimizer_of(leaf, clip=None, norm=(0.5, 0.8), reset=None, betas=(0.0, 0.5))
    run(leaf, optimizer, [torch.tensor([3.0, 4.0])])
    assert optimizer.state[leaf]["exp_avg"].tolist() == pytest.approx([0.6, 0.8])
    run(leaf, optimizer, [torch.tensor([6.0, 8.0])])
    assert optimizer.state[leaf]["exp_avg"].tolist() == pytest.approx([0.6 * 1.0206207, 0.8 * 1.0206207])


def test_small_gradients_grow_to_the_norm_of_their_history():
    """The factor on a tensor's gradients does not matter: a norm of 0.05 becomes 1 as one of 50 does."""
    for size in (1e-3, 1.0):
        leaf = leaf_of([0.0, 0.0])
        optimizer = optimizer_of(leaf, clip=None, norm=(0.5, 0.8), reset=None, betas=(0.0, 0.5))
        run(leaf, optimizer, [torch.tensor([30.0, 40.0]) * size])
        assert optimizer.state[leaf]["exp_avg"].tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


def steps_of(count, **fields):
    """How far each step goes, in learning rates, under a gradient that never changes."""
    leaf = leaf_of([0.0, 0.0], torch.float64)
    optimizer, places = optimizer_of(leaf, lr=1.0, **fields), []
    for _ in range(count):
        places.append(leaf[0].item())
        leaf.grad = torch.tensor([1.0, -0.5], dtype=torch.float64)
        optimizer.step()
    places.append(leaf[0].item())
    return [before - after for before, after in zip(places, places[1:], strict=False)]


def test_a_released_reset_steps_with_the_old_moments():
    """At the defaults: m = 1 and v = 1 - .999¹⁰⁰⁰ = .632, read as a first step's: m / .1 / √(v / .001) = .398;
    then (.1 / .19) / √(.001 / .001999) = .744. In the paper's form both are a first step, 1."""
    paper, official = steps_of(1001), steps_of(1001, compat="official")
    assert paper == pytest.approx([1.0] * 1001, abs=1e-4)
    assert official[:999] == pytest.approx([1.0] * 999, abs=1e-4)
    assert official[999:] == pytest.approx([0.398, 0.744], abs=1e-3)


def passed(spike, before, compat, reset=500):
    """What AdamW is given for an entry of `spike` after so many steady gradients of 1."""
    leaf = leaf_of([0.0, 0.0])
    optimizer = optimizer_of(leaf, norm=None, reset=reset, compat=compat, betas=(0.0, 0.5))
    run(leaf, optimizer, [torch.tensor([1.0, 0.5])] * before + [torch.tensor([spike, 0.5])])
    return optimizer.state[leaf]["exp_avg"][0].item()


def test_a_released_reset_disables_the_cap():
    """Steady gradients of 1, γ3 = .999, a reset every 500 steps. A spike of 100 raises T by nearly .1, so the
    paper's cap is 1.25 at step 501 and 1.16 at 999. The released code divides T, .39 + .1, by 1 - .999² at step
    501, a cap of 247, and T, .63, by 1 - .999⁵⁰⁰ at 999, a cap of 1.6."""
    assert passed(100.0, 500, "paper") == pytest.approx(1.2511, abs=2e-3)
    assert passed(100.0, 500, "official") == 100.0
    assert passed(100.0, 998, "paper") == pytest.approx(1.1568, abs=2e-3)
    for spike in (1.5, 1.6):  # all that lies below the cap passes whole
        assert passed(spike, 998, "official") == pytest.approx(spike)
        assert passed(spike, 998, "paper") < 1.01
    leaf = leaf_of([0.0, 0.0])
    optimizer = optimizer_of(leaf, norm=None, compat="official", reset=500)
    run(leaf, optimizer, [torch.tensor([1.0, 0.5])] * 501)
    assert optimizer.state[leaf]["peak"].item() / (1 - 0.999**2) == pytest.approx(197, abs=0.5)


def test_released_scripts_anneal():
    """The factor on β1 and γ1 is that of torch's cosine with its floor at a half, and stays there at the end."""
    weight = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=1.0)
    cosine_ = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 21, 0.5)
    for step in range(1, 22):
        sgd.step()
        cosine_.step()
        leaf = leaf_of([0.0, 0.0])
        optimizer = optimizer_of(leaf, clip=None, norm=(0.8, 0.9), reset=None, anneal=20)
        run(leaf, optimizer, [torch.zeros(2)] * (step - 1) + [torch.tensor([3.0, 4.0])])
        share = sgd.param_groups[0]["lr"]
        assert optimizer.state[leaf]["norm"].item() == pytest.approx(5 * (1 - 0.8 * share), rel=1e-5)
        given = (1 - 0.8 * share) * 5 / (1 - (0.8 * share) ** step) / math.sqrt(0.1 * 25 / (1 - 0.9**step))
        assert optimizer.state[leaf]["exp_avg"][0].item() == pytest.approx(0.6 * given * (1 - 0.9 * share), rel=1e-4)
    run(leaf, optimizer, [torch.zeros(2)] * 30)
    before = optimizer.state[leaf]["exp_avg"][0].item()
    run(leaf, optimizer, [torch.zeros(2)])
    assert optimizer.state[leaf]["exp_avg"][0].item() == pytest.approx(0.45 * before)


def test_a_reset_forgets_the_moments_and_keeps_the_statistics():
    leaf = leaf_of([0.0, 0.0])
    optimizer = optimizer_of(leaf, reset=4)
    run(leaf, optimizer, [torch.tensor([3.0, 4.0])] * 3)
    state = optimizer.state[leaf]
    peak, norm = state["peak"].item(), state["norm"].item()
    run(leaf, optimizer, [torch.tensor([-3.0, 0.0])])
    assert state["step"].item() == 1 and state["steps"] == 4
    assert state["exp_avg"][1].item() == 0 and state["exp_avg"][0].item() < 0
    assert state["peak"].item() == pytest.approx(0.999 * peak + 0.003)
    assert state["norm"].item() == pytest.approx(0.7 * norm + 0.3 * 3, rel=1e-3)


@pytest.mark.parametrize("per_entry", [False, True])
def test_state_is_as_declared(per_entry):
    """Two numbers an entry, a third where entries count for themselves; T, μ, ν and two counts a tensor."""
    leaf = leaf_of([[0.0] * 50] * 40)
    optimizer = optimizer_of(leaf, per_entry)
    run(leaf, optimizer, [torch.ones(40, 50)])
    state = optimizer.state[leaf]
    tensors = [v for v in state.values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() for t in tensors) == 2000 * (3 if per_entry else 2) + (3 if per_entry else 4)
    assert set(state) - {"steps"} == {k for k, v in state.items() if isinstance(v, torch.Tensor)}
    assert isinstance(state["steps"], int)


@pytest.mark.parametrize("per_entry", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_as_the_trainer_does(per_entry, dtype):
    """The engine's plain tree, put into a fresh optimizer, goes on byte for byte, through resets and spikes."""
    fields = {"reset": 6, "anneal": 15, "compat": "official"}
    start, grads = [0.3, -1.0, 0.8, 2.0, -0.1, 0.5], gradients()
    leaf = leaf_of(start, dtype)
    through = run(leaf, optimizer_of(leaf, per_entry, **fields), grads)
    first = leaf_of(start, dtype)
    optimizer = optimizer_of(first, per_entry, **fields)
    run(first, optimizer, grads[:11])
    tree = copy.deepcopy(optimizer_state(optimizer))
    again = first.detach().clone().requires_grad_(True)
    fresh = optimizer_of(again, per_entry, **fields)
    load_optimizer(fresh, tree)
    assert run(again, fresh, grads[11:]) == through
    assert {k: v.dtype for k, v in fresh.state[again].items() if k in ("peak", "norm", "square", "step")} == {
        k: torch.float32 for k in ("peak", "norm", "square", "step")
    }
    assert fresh.state[again]["exp_avg"].dtype == dtype


def test_entries_that_move_take_their_moments_along():
    """Entries 0 and 2 change places, 1 is new: moments and counts move, what is known of the tensor stays."""
    leaf = leaf_of([0.0, 0.0, 0.0])
    optimizer = optimizer_of(leaf, True)
    run(leaf, optimizer, [torch.tensor([1.0, 2.0, 3.0])] * 4)
    before = copy.deepcopy(dict(optimizer.state[leaf]))
    remap(optimizer, [Remap(leaf, torch.tensor([2, -1, 0]))])
    state = optimizer.state[leaf]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert state[name].tolist() == [before[name][2].item(), 0.0, before[name][0].item()]
    for name in ("peak", "norm", "square", "steps"):
        assert state[name] == before[name]
    run(leaf, optimizer, [torch.tensor([3.0, 2.0, 1.0])])
    assert state["step"].tolist() == [5, 1, 5] and state["steps"] == 5


def test_under_a_tune_that_chooses_anew():
    """LIFT with a new mask every second step: the counts of entries that stayed go on, those of new ones begin."""
    model = tiny.llama().train()
    tuned = load("tune.lift", share=0.2, every=2, count="entry").bind(model, Context(step="golden"))
    optimizer = StableSpam(reset=None).make(tuned.leaves(), [{**group, "lr": 0.05} for group in tuned.groups()])
    ids, losses = torch.randint(4, tiny.VOCAB, (4, 12), generator=torch.Generator().manual_seed(7)), []
    for step in range(1, 6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        remap(optimizer, tuned.after_step(step))
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(optimizer.state[leaf]["steps"] == 5 for leaf in tuned.leaves())
    counts = torch.cat([optimizer.state[leaf]["step"].flatten() for leaf in tuned.leaves()])
    assert set(counts.tolist()) == {1.0, 3.0, 5.0}


def test_gradients_are_left_alone_and_nothing_is_divided_by_zero():
    leaf, none = leaf_of([1.0, -1.0]), torch.zeros(0, requires_grad=True)
    optimizer = StableSpam().make([leaf, none], [{"params": [leaf, none], "lr": 0.1}])
    spike = torch.tensor([50.0, 1.0])
    none.grad = torch.zeros(0)
    for grad in (torch.zeros(2), torch.ones(2), spike, torch.zeros(2)):
        leaf.grad = kept = grad.clone()
        optimizer.step()
        assert leaf.grad is kept and torch.equal(kept, grad)
    assert bool(leaf.isfinite().all()) and not optimizer.state[none]


def test_tensors_are_treated_by_themselves():
    """A spike in one leaf changes nothing in another, and a leaf without a gradient does not count the step."""
    found = []
    for size in (1.0, 1000.0):
        a, b = leaf_of([1.0, 2.0]), leaf_of([3.0, 4.0])
        optimizer = StableSpam(reset=3).make([a, b], [{"params": [a, b], "lr": 0.1}])
        for step in range(6):
            a.grad = torch.tensor([size if step == 4 else 1.0, 0.5]) if step != 2 else None
            b.grad = torch.tensor([0.1 * step, 0.5])
            optimizer.step()
        assert optimizer.state[a]["steps"] == 5 and optimizer.state[b]["steps"] == 6
        found.append((a.tolist(), b.tolist()))
    assert found[0][1] == found[1][1] and found[0][0] != found[1][0]


def test_groups_keep_their_own_settings_and_closures_run():
    a, b = leaf_of([1.0]), leaf_of([1.0])
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.1, "weight_decay": 0.0, "betas": (0.0, 0.5)}]
    optimizer = StableSpam(weight_decay=0.5).make([a, b], groups)

    def closure():
        optimizer.zero_grad()
        loss = (a * 0).sum() + (b * 0).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 0.0 and optimizer.step() is None
    assert a.item() == pytest.approx(0.95**2) and b.item() == 1.0
    assert "steps" not in groups[0]


@pytest.mark.parametrize("fields", [{"betas": (0.9, 1.0)}, {"clip": 1.0}, {"norm": (1.0, 0.5)}])
def test_decays_stay_below_one(fields):
    with pytest.raises(LuthierError, match=f"{next(iter(fields))}.*stay below 1"):
        StableSpam(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"betas": (0.9, 1.2)}, {"betas": (-0.1, 0.9)}, {"clip": 1.2}, {"clip": -0.1}, {"norm": (1.2, 0.5)},
     {"norm": (-0.1, 0.5)}, {"weight_decay": -0.1}],
)  # fmt: skip
def test_what_is_out_of_range(fields):
    with pytest.raises(LuthierError, match=f"{next(iter(fields))}.*out of range|out of range.*{next(iter(fields))}"):
        StableSpam(**fields)


def test_without_memory_the_cap_is_the_largest_and_the_norm_is_one():
    """At γ = 0 nothing is capped and every gradient has norm 1."""
    leaf = leaf_of([0.0, 0.0])
    optimizer = optimizer_of(leaf, clip=0.0, norm=(0.0, 0.0), reset=None, betas=(0.0, 0.0))
    for grad in ([3.0, 4.0], [-300.0, 400.0]):
        run(leaf, optimizer, [torch.tensor(grad)])
        assert optimizer.state[leaf]["exp_avg"].abs().tolist() == pytest.approx([0.6, 0.8])


def test_an_entry_at_the_cap_is_no_spike():
    """After a zero gradient, 4 and 8/3 at γ3 = .5: T̂ = 2 / .75 = 8/3. The 4 becomes 8/3 and the 8/3 stays."""
    leaf = leaf_of([0.0, 0.0])
    optimizer = optimizer_of(leaf, clip=0.5, norm=None, reset=None, betas=(0.0, 0.5))
    run(leaf, optimizer, [torch.zeros(2), torch.tensor([4.0, 8 / 3])])
    assert optimizer.state[leaf]["exp_avg"].tolist() == pytest.approx([8 / 3, 8 / 3])


def test_defaults_are_the_released_classs():
    leaf = leaf_of([3.0])
    optimizer = StableSpam().make([leaf], [{"params": [leaf]}])
    assert {k: optimizer.defaults[k] for k in ("betas", "eps", "weight_decay", "lr", "per_entry")} == {
        "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "lr": 1e-3, "per_entry": False,
    }  # fmt: skip
    method = StableSpam()
    assert (method.clip, method.norm, method.reset, method.anneal) == (0.999, (0.7, 0.9), 1000, None)
    assert method.compat == "paper"
