"""What models are made of: routing, experts, norms, rotary positions, optimizer steps, drawing. Against slow twins."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import SEEDS, often, randn
from torch import nn

from luthier.errors import LuthierError
from luthier.kit import canvas, depth, precision, routing
from luthier.kit.adam import entry_step
from luthier.kit.decoding import draw, end_ids, rows_of
from luthier.kit.experts import check_choice, expert_width
from luthier.kit.moe_apply import moe_apply, moe_loop
from luthier.kit.norms import rms_unit
from luthier.kit.parts import add_aux, aux_loss
from luthier.kit.rotary import angles, rotate

SIZE = st.integers(1, 5)


@st.composite
def chosen(draw):
    """Scores of N tokens for E experts, a choice of K of them, padding."""
    tokens, experts = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    scores = torch.tensor(draw(st.lists(
        st.lists(st.integers(0, 4), min_size=experts, max_size=experts), min_size=tokens,
            max_size=tokens))).double()  # fmt: skip
    return scores, k


@given(chosen(), st.booleans(), st.one_of(st.none(), SEEDS))
@often(40)
def test_a_choice_takes_the_best_and_weighs_by_plain_scores(given_, renormalise, seed):
    scores, k = given_
    bias = None if seed is None else randn(seed, scores.shape[1]).float().double()
    index, weight = routing.choose(scores, k, renormalise, bias)
    for row, picked, weights in zip(scores, index, weight, strict=True):
        ranked = row if bias is None else row + bias
        left = [float(v) for e, v in enumerate(ranked) if e not in picked.tolist()]
        assert len(set(picked.tolist())) == k and max(left, default=-math.inf) <= min(float(ranked[e]) for e in picked)
        assert all(a >= b for a, b in zip(ranked[picked], ranked[picked][1:], strict=False))  # best first
        plain = [float(row[e]) for e in picked]
        total = max(sum(plain), 1e-20) if renormalise else 1.0
        assert weights.tolist() == pytest.approx([p / total for p in plain])


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), SEEDS)
@often(40)
def test_loads_count_the_choices_of_real_tokens(batch, length, experts, k, seed):
    gen = torch.Generator().manual_seed(seed)
    index = torch.randint(experts, (batch, length, k), generator=gen)
    keep = torch.randint(2, (batch, length), generator=gen).bool()
    got = routing.loads(index, experts, keep)
    want = [[sum(int(index[b, t, j] == e) for t in range(length) if keep[b,
        t] for j in range(k)) for e in range(experts)]
            for b in range(batch)]  # fmt: skip
    assert got.tolist() == want
    assert float(routing.loads(index, experts).sum()) == batch * length * k
    load = got.sum(0)
    if load.sum():
        assert float(routing.max_violation(load)) == pytest.approx(float(load.max() / load.mean()) - 1, rel=1e-6)
    moved = routing.stepped_bias(torch.zeros(experts), load, 0.25).tolist()
    mean = sum(load.tolist()) / experts
    assert all(m == pytest.approx(0.25 * ((mean > v) - (mean < v))) or abs(v - mean) < 1e-4
               for m, v in zip(moved, load.tolist(), strict=True))  # fmt: skip


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 3),
    SEEDS,
    st.sampled_from(["batch", "sequence"]),
)
@often(30)
def test_the_balance_loss_word_for_word(batch, length, experts, k, seed, over):
    gen = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, length, experts, generator=gen, dtype=torch.float64)
    index = torch.randint(experts, (batch, length, k), generator=gen)
    keep = torch.rand(batch, length, generator=gen) < 0.7
    got = float(routing.balance_loss(scores, routing.loads(index, experts, keep).double(), k, keep, over))
    groups = [[(b, t) for b in range(batch) for t in range(length)]] if over == "batch" else [
        [(b, t) for t in range(length)] for b in range(batch)]  # fmt: skip
    found = []
    for group in groups:
        real = [(b, t) for b, t in group if keep[b, t]]
        if real:
            share = [sum(int(index[b, t, j] == e) for b, t in real for j in range(k)) * experts / (k * len(real))
                     for e in range(experts)]  # fmt: skip
            mass = [sum(float(scores[b, t, e]) for b, t in real) / len(real) for e in range(experts)]
            found.append(sum(f * p for f, p in zip(share, mass, strict=True)))
    assert got == pytest.approx(sum(found) / len(found) if found else 0.0, rel=1e-6)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), SEEDS)
@often(20)
def test_the_z_loss_and_that_padding_does_not_count(batch, length, experts, seed):
    logits = 5 * randn(seed, batch, length, experts)
    keep = randn(seed + 1, batch, length) > 0
    want = [math.log(sum(math.exp(v) for v in logits[b, t].tolist())) ** 2
            for b in range(batch) for t in range(length) if keep[b, t]]  # fmt: skip
    got = float(routing.z_loss(logits, keep))
    assert got == pytest.approx(sum(want) / max(len(want), 1), rel=1e-9)
    spoilt = torch.where(keep[..., None], logits, torch.tensor(50.0, dtype=torch.float64))
    assert float(routing.z_loss(spoilt, keep)) == pytest.approx(got, rel=1e-9)


@given(st.integers(0, 9), st.integers(1, 5), SIZE, SIZE, st.integers(1, 3), st.booleans(), SEEDS,
       st.sampled_from([torch.relu, nn.functional.silu, torch.tanh]), st.integers(1, 4))  # fmt: skip
@often(40)
def test_experts_are_the_plain_loop_forward_and_backward(n, experts, d, f, k, fused, seed, activation, rows):
    """Odd sizes, no tokens, empty experts, one expert twice, indices that mean none; few rows at a time."""
    from luthier.kit import moe_apply as module

    gen = torch.Generator().manual_seed(seed)
    index = torch.randint(experts + (seed % 2), (n, k), generator=gen)

    def leaves():
        shapes = [(n, d), (n, k), *([(experts, 2 * f, d)] if fused else [(experts, f, d)] * 2), (experts, d, f)]
        return [randn(seed + i, *shape).requires_grad_() for i, shape in enumerate(shapes)]

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", rows)
        for way in (moe_apply, moe_loop):
            x, weight, *wide, down = tensors = leaves()
            y = way(x, index, weight, tuple(wide), down, activation)
            (y * randn(seed + 9, *y.shape)).sum().backward()
            results.append((y, [t.grad if t.grad is not None else torch.zeros_like(t) for t in tensors]))
    (one, ones), (two, twos) = results
    assert torch.allclose(one, two, atol=1e-10)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(ones, twos, strict=True))


@given(st.integers(2, 7), st.integers(1, 4), st.integers(1, 3), SEEDS)
@often(20)
def test_experts_do_not_care_for_the_order_of_tokens(n, experts, k, seed):
    gen = torch.Generator().manual_seed(seed)
    x, weight = randn(seed, n, 3), randn(seed + 1, n, k)
    index, order = torch.randint(experts, (n, k), generator=gen), torch.randperm(n, generator=gen)
    wide, down = (randn(seed + 2, experts, 4, 3), randn(seed + 3, experts, 4, 3)), randn(seed + 4, experts, 3, 4)
    y = moe_apply(x, index, weight, wide, down)
    assert torch.allclose(moe_apply(x[order], index[order], weight[order], wide, down), y[order], atol=1e-12)
    flipped = moe_apply(x, index.flip(1), weight.flip(1), wide, down)
    assert torch.allclose(flipped, y, atol=1e-12)


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.one_of(st.none(), st.integers(0, 9)), st.integers(1, 64))
@often(40)
def test_widths_and_choices_of_experts_are_checked(experts, top_k, renormalise, given_, dense):
    wrong = top_k > experts or (top_k == 1 and experts > 1 and renormalise)
    try:
        check_choice(experts, top_k, renormalise, "here")
        assert not wrong
    except LuthierError:
        assert wrong
    if given_ or dense >= top_k:
        assert expert_width(given_, dense, top_k, "here") == (given_ or dense // top_k)
    else:
        with pytest.raises(LuthierError, match="too small to divide"):
            expert_width(given_, dense, top_k, "here")


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), SEEDS, st.sampled_from([1e-6, 1e-3, 1.0]),
       st.floats(0.01, 100))  # fmt: skip
@often(30)
def test_rms_makes_a_unit_of_any_scale(batch, length, width, seed, eps, scale):
    x = randn(seed, batch, length, width) * scale
    y = rms_unit(x, eps)
    for row, made in zip(x.view(-1, width).tolist(), y.view(-1, width).tolist(), strict=True):
        root = math.sqrt(sum(v * v for v in row) / width + eps)
        assert made == pytest.approx([v / root for v in row], rel=1e-12)
    assert float(y.square().mean(-1).max()) <= 1 + 1e-12
    assert torch.allclose(rms_unit(-x, eps), -y)
    shifted = rms_unit(x + 7.0, eps, center=True)
    assert torch.allclose(shifted, rms_unit(x, eps, center=True), atol=1e-6 / math.sqrt(eps) * 1e-3 + 1e-9)
    assert rms_unit(x.bfloat16(), eps).dtype == torch.bfloat16


@given(st.integers(1, 3), st.integers(1, 6), st.sampled_from([2, 4, 8, 16]), SEEDS,
    st.sampled_from([10.0, 10_000.0, 1e6]),
       st.integers(0, 2000))  # fmt: skip
@often(30)
def test_rotation_keeps_lengths_and_sees_only_distances(heads, length, width, seed, theta, shift):
    q, k = randn(seed, 1, heads, length, width), randn(seed + 1, 1, heads, length, width)
    place = torch.arange(length)[None]

    def turned(x, at):
        cos, sin = (t.double() for t in angles(at, width, theta))
        return rotate(x, cos, sin)

    a, b = turned(q, place), turned(k, place)
    assert torch.allclose(a.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    near, far = a @ b.mT, turned(q, place + shift) @ turned(k, place + shift).mT
    assert torch.allclose(near, far, atol=2e-3 * width)
    assert torch.equal(turned(q, torch.zeros_like(place)), q)
    i, p = seed % (width // 2), length - 1
    angle = p / theta ** (2 * i / width)
    x, y = float(q[0, 0, p, i]), float(q[0, 0, p, i + width // 2])
    assert float(a[0, 0, p, i]) == pytest.approx(x * math.cos(angle) - y * math.sin(angle), abs=1e-5)


@given(st.integers(1, 12), st.integers(1, 4), SEEDS, st.floats(0.5, 0.99), st.floats(0.5, 0.999), st.floats(0, 0.1))
@often(25)
def test_adam_by_entry_is_torchs_own(n, steps, seed, beta1, beta2, decay):
    leaf = randn(seed, n).requires_grad_()
    theirs = torch.optim.AdamW([leaf], lr=0.01, betas=(beta1, beta2), eps=1e-8, weight_decay=decay)
    mine, m, v, count = leaf.detach().clone(), *(torch.zeros(n, dtype=torch.float64) for _ in range(3))
    for step in range(steps):
        leaf.grad = randn(seed + 1 + step, n)
        entry_step(mine, leaf.grad, m, v, count, beta1=beta1, beta2=beta2, lr=0.01, weight_decay=decay, eps=1e-8)
        theirs.step()
    assert torch.allclose(mine, leaf, rtol=1e-9, atol=1e-12) and count.tolist() == [steps] * n


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any), min_size=1, max_size=6).map(
    lambda rows: [r + [0] * (9 - len(r)) for r in rows]), st.data())  # fmt: skip
@often(40)
def test_drawing_inverts_the_cumulative_sum(rows, data):
    p = torch.tensor(rows).double()
    u = torch.tensor(data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=len(rows), max_size=len(rows))))
    u = u.double() if data.draw(st.booleans()) else u
    for row, share, got in zip(rows, u.tolist(), draw(p, u).tolist(), strict=True):
        total, sums = sum(row), [sum(row[: i + 1]) for i in range(len(row))]
        want = next((i for i, s in enumerate(sums) if s > share * total), max(i for i, n in enumerate(row) if n))
        assert got == want and row[got] > 0


@given(st.lists(st.lists(st.integers(0, 99), max_size=4), min_size=1, max_size=4))
@often(20)
def test_prompts_of_ids_stay_as_they_are(prompts):
    if all(prompts):
        assert rows_of(prompts, None, "here") == prompts
    else:
        with pytest.raises(LuthierError, match="no tokens"):
            rows_of(prompts, None, "here")
    assert end_ids(nn.Linear(1, 1), None) == set()


@given(st.integers(0, 200), st.integers(1, 40))
@often(30)
def test_work_is_spread_evenly(total, parts):
    got = canvas.stretches(total, parts)
    assert sum(got) == total and len(got) == parts and max(got) - min(got) <= 1 and got == sorted(got, reverse=True)


@given(st.integers(1, 4), st.integers(1, 6), SEEDS)
@often(20)
def test_a_draft_fills_open_places_of_the_chosen_rows_only(rows, places, seed):
    gen = torch.Generator().manual_seed(seed)
    logits = torch.rand(rows, places, 5, generator=gen)
    open_, picked = torch.rand(rows, places, generator=gen) < 0.5, torch.rand(rows, generator=gen) < 0.5
    before = torch.full((rows, places), 9)
    draft = canvas.Draft(tuple(range(rows)), logits, open_, open_, torch.zeros(rows), before.clone(), lambda d: ())
    draft.fill(picked)
    for b in range(rows):
        for t in range(places):
            want = int(logits[b, t].argmax()) if open_[b, t] and picked[b] else 9
            assert int(draft.canvas_BL[b, t]) == want


@given(st.integers(1, 6), st.integers(2, 9), SEEDS, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
@often(30)
def test_angles_between_states_are_angles(n, width, seed, a, b):
    x, y = randn(seed, n, width), randn(seed + 1, n, width)
    got = depth.angular(x, y)
    want = [
        math.acos(max(-1, min(1, float(u @ v) / float(u.norm() * v.norm())))) / math.pi
        for u, v in zip(x, y, strict=True)
    ]
    assert got.tolist() == pytest.approx(want, abs=1e-7)
    assert torch.allclose(depth.angular(a * x, b * y), got, atol=1e-9) and torch.allclose(depth.angular(y, x), got)
    assert torch.allclose(depth.angular(x, -y), 1 - got, atol=1e-9) and float(depth.angular(x, x).max()) == 0
    step = x + 1e-9 * y * x.norm() / y.norm()  # where the arc cosine would see nothing
    assert 0 < float(depth.angular(x, step).max()) < 1e-8


@given(
    st.lists(st.tuples(st.sampled_from(["loss/a", "loss/b", "metric/a", "metric/b"]), st.integers(-9, 9)), max_size=9)
)
@often(30)
def test_losses_add_up_and_the_last_metric_stays(pairs):
    total = {}
    for name, value in pairs:
        add_aux(total, {name: torch.tensor(float(value))})
    assert float(aux_loss(total)) == sum(v for n, v in pairs if n.startswith("loss/"))
    for name in ("metric/a", "metric/b"):
        assert not [v for n, v in pairs if n == name] or float(total[name]) == [v for n, v in pairs if n == name][-1]


@given(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), SEEDS)
@often(8)
def test_casting_changes_parameters_and_leaves_buffers(dtype, seed):
    model = nn.BatchNorm1d(3)
    precision.cast_(model, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.running_mean.dtype == torch.float32 and model.num_batches_tracked.dtype == torch.int64
    cpu = torch.device("cpu")
    assert precision.working(dtype, cpu) in (dtype, torch.float32)
    assert dtype in precision.HALF or precision.working(dtype, cpu) == dtype
