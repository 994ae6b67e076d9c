"""Order statistics and selections: against sorts."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import SEEDS, bits, fp32, often, randn
from torch import nn

from luthier.kit import select, sparse
from luthier.kit.deltas import add, changes, each
from luthier.kit.low_rank import leading, project, refine
from luthier.kit.top import jaccard, threshold, top_indices

FLAT = st.integers(1, 60).flatmap(lambda n: fp32(n, signed=False))


def stream_of(members, cuts):
    """Equal-length magnitudes, cut anywhere; a sample is every second stretch."""

    def stream(sample, see):
        edges = [0, *cuts, len(members[0])]
        for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
            if not sample or i % 2 == 0:
                yield see([m[a:b].clone() for m in members])

    return stream


@st.composite
def streams(draw):
    n = draw(st.integers(1, 60))
    members = [draw(fp32(n, signed=False)).abs() for _ in range(draw(st.integers(1, 3)))]
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=6)))
    return members, cuts, [draw(st.integers(0, n)) for _ in members]


def kth(values, keep):
    return math.inf if keep == 0 else float(values.sort(descending=True).values[keep - 1])


@given(streams())
@often(60)
def test_the_kth_largest_of_any_stream_is_that_of_a_sort(given_):
    members, cuts, keep = given_
    want = [kth(m, k) for m, k in zip(members, keep, strict=True)]
    assert select.largest(stream_of(members, cuts), keep, len(members[0])) == want


@given(streams(), st.integers(1, 8), st.integers(1, 20))
@often(60)
def test_brackets_from_a_sample_are_the_same(given_, kept, bits):
    """Small limits, so that the bracket misses, or what lies inside is binned and looked at again."""
    members, cuts, keep = given_
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SMALL", 0), ("KEPT", kept), ("BINS", 1 << bits), ("THIN", 1)):
            patch.setattr(select, name, value)
        got = select.largest(stream_of(members, [0, *cuts]), keep, len(members[0]))
    assert got == [kth(m, k) for m, k in zip(members, keep, strict=True)]


@given(FLAT, st.data())
@often(40)
def test_trimming_by_the_kth_keeps_at_least_k_and_only_whole_values(values, data):
    signs = torch.tensor(data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(values), max_size=len(values))))
    signed, keep = values * signs, data.draw(st.integers(1, len(values)))
    cut = kth(values, keep)
    out = select.trim(signed, cut)
    assert all(o == v if abs(v) >= cut else o == 0 for o, v in zip(out.tolist(), signed.tolist(), strict=True))
    assert int((out.abs() >= cut).sum()) >= keep


@given(st.fractions(0, 1), st.integers(0, 10**9))
@often(60)
def test_a_density_keeps_its_share_rounded_down(density, count):
    got = select.kept(float(density), count)
    assert got == (0 if not float(density) or not count else max(1, int(float(density) * count)))
    assert 0 <= got <= max(count, 1) and abs(got - Fraction(float(density)) * count) <= 1 + count * Fraction(2) ** -50


@given(FLAT, st.data())
@often(60)
def test_the_top_k_are_those_of_a_stable_sort(score, data):
    k = data.draw(st.integers(1, len(score)))
    want = sorted(sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:k])
    got = top_indices(score.abs(), k)
    assert got.tolist() == want and got.dtype == torch.int64
    assert float(threshold(score.abs(), k)) == kth(score.abs(), k)


@given(FLAT)
@often(20)
def test_more_than_there_is_is_all(score):
    assert top_indices(score.abs(), len(score) + 5).tolist() == list(range(len(score)))


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
@often(40)
def test_jaccard_is_that_of_sets(a, b):
    got = jaccard(torch.tensor(sorted(a), dtype=torch.int64), torch.tensor(sorted(b), dtype=torch.int64))
    assert got == (len(a & b) / len(a | b) if a | b else 0)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.data())
@often(40)
def test_squares_are_picked_whole_and_by_their_sum(rows, columns, block, data):
    score = data.draw(fp32(rows * columns * block**2, signed=False)).clamp(max=1e4).view(rows * block, columns * block)
    k = data.draw(st.integers(1, score.numel()))
    got = sparse.pick(score, k, block)
    assert got.tolist() == sorted(set(got.tolist())) and int(got[0]) >= 0 and int(got[-1]) < score.numel()
    if block == 1:
        assert len(got) == k
        return
    count = max(1, round(k / block**2))
    assert len(got) == min(count, rows * columns) * block**2
    sums = {(i, j): float(score[i * block : (i + 1) * block, j * block : (j + 1) * block].double().sum())
            for i in range(rows) for j in range(columns)}  # fmt: skip
    taken = {(int(g) // (columns * block) // block, int(g) % (columns * block) // block) for g in got}
    least, left = min(sums[t] for t in taken), [s for t, s in sums.items() if t not in taken]
    assert max(left, default=-1.0) <= least * (1 + 1e-5) + 1e-30


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), SEEDS)
@often(20)
def test_a_stack_is_chosen_from_matrix_by_matrix(count, rows, columns, seed):
    weight = randn(seed, count, rows, columns, dtype=torch.float32)
    k = 1 + seed % (rows * columns)
    got = sparse.per_matrix(weight, lambda i, m: top_indices(m.abs(), k))
    want = [i * rows * columns + j for i in range(count) for j in top_indices(weight[i].abs(), k).tolist()]
    assert got.tolist() == want and got.dtype == torch.int32


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.floats(1e-4, 1))
@often(40)
def test_budgets_lie_between_one_and_all(rows, columns, rank, share):
    assert sparse.budget((rows, columns), None, rank) == min((rows + columns) * rank, rows * columns)
    assert 1 <= sparse.budget((rows, columns), share, None) <= max(1, rows * columns)


@st.composite
def trainings(draw):
    n, k = draw(st.integers(2, 12)), draw(st.integers(1, 6))
    choose = [sorted(draw(st.sets(st.integers(0, n * 3 - 1), min_size=k, max_size=k))) for _ in range(4)]
    return n, choose, draw(SEEDS), draw(st.sampled_from([torch.float32, torch.bfloat16]))


@given(trainings())
@often(30)
def test_selected_entries_train_as_by_hand_and_the_delta_takes_them_back(given_):
    """Four plain gradient steps whose selection moves after each, against a dictionary of numbers."""
    n, chosen, seed, dtype = given_
    model = nn.Linear(3, n, bias=False)
    model.weight.data = randn(seed, n, 3, dtype=torch.float32).to(dtype)
    before = model.weight.data.clone()
    step = iter(chosen[1:])
    tuned = sparse.Selected(
        model, {"weight": model.weight}, {"weight": torch.tensor(chosen[0])}, dict,
        lambda name, weight, at: torch.tensor(next(step)), every=1,
    )  # fmt: skip
    leaf, x = tuned.leaves()[0], randn(seed + 1, 3, dtype=torch.float32)
    flat, held = before.view(-1).float().tolist(), dict[int, float]()
    held = {i: flat[i] for i in chosen[0]}
    for at in range(3):
        (model(x.to(dtype)).float() * torch.arange(1, n + 1)).sum().backward()
        assert model.weight.grad is None
        gradient = ((torch.arange(1, n + 1, dtype=torch.float32).to(dtype))[:, None] * x.to(dtype)).view(-1).float()
        assert torch.equal(leaf.grad, gradient[torch.tensor(chosen[at])])
        with torch.no_grad():
            leaf -= 0.125 * leaf.grad
        leaf.grad = None
        held = {i: float(torch.tensor(v) - 0.125 * gradient[i]) for i, v in held.items()}
        for i, v in held.items():
            flat[i] = float(torch.tensor(v).to(dtype))
        tuned.after_step(at + 1)
        held = {i: held.get(i, flat[i]) for i in chosen[at + 1]}
    assert model.weight.data.view(-1).float().tolist() == flat
    index, old, new = tuned.delta()["weight"]
    again = before.clone().view(-1)
    assert torch.equal(again[index.long()], old)
    again[index.long()] = new
    assert torch.equal(again, model.weight.data.view(-1))
    again[index.long()] = old
    assert torch.equal(again, before.view(-1))


@st.composite
def deltas(draw):
    """Two states of a model's tensors: here and there an entry differs, some by a sign of zero or a NaN."""
    n = draw(st.integers(1, 40))
    old = draw(fp32(n))
    new = old.clone()
    for place in draw(st.lists(st.integers(0, n - 1), max_size=n)):
        new[place] = draw(st.sampled_from([0.0, -0.0, 1.0, float("nan"), 1e-45]))
    return old, new


@given(deltas())
@often(40)
def test_a_delta_applies_and_reverts_to_the_bit(given_):
    from luthier.checkpoint.delta import Delta

    old, new = given_
    delta = Delta.between({"w": old}, {"w": new})
    target = {"w": old.clone()}
    delta.apply_(target)
    assert bits(target["w"]) == bits(new)
    delta.revert_(target)
    assert bits(target["w"]) == bits(old)
    assert bool(delta.changes) == (bits(old) != bits(new))
    if delta.changes:
        spoilt = {"w": torch.full_like(old, 7.25)}
        with pytest.raises(Exception, match="not that of the base"):
            delta.apply_(spoilt)
        assert bits(spoilt["w"]) == bits(torch.full_like(old, 7.25))


@given(deltas(), st.integers(0, 40), st.integers(0, 40))
@often(40)
def test_stretches_of_a_delta_are_those_of_the_whole(given_, start, count):
    from luthier.checkpoint.delta import Delta

    old, new = given_
    delta = Delta.between({"w": old}, {"w": new})
    if delta.changes:
        stop = min(start + count, len(old))
        start = min(start, stop)
        assert bits(delta.changes["w"].stretch(old[start:stop], start)) == bits(new[start:stop])


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), SEEDS)
@often(30)
def test_the_projection_is_the_best_low_rank_approximation(rows, columns, rank, seed):
    matrix = randn(seed, rows, columns, dtype=torch.float32)
    rank = min(rank, rows, columns)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    got = project(matrix, leading(matrix, rank)).double()
    gap, floor = float((got - matrix.double()).norm()), float(s[rank:].norm())
    assert gap <= floor + 1e-4 * float(s[0]) and gap >= floor - 1e-4 * float(s[0])
    if rank < min(rows, columns) and float(s[rank - 1] - s[rank]) > 0.1 * float(s[0]):
        assert float((got - best).norm()) < 1e-3 * float(s[0])
    twice = project(got.float(), leading(matrix, rank))
    assert torch.allclose(twice, got.float(), atol=1e-4 * float(s[0]))


@given(st.integers(4, 14), st.integers(4, 14), SEEDS)
@often(20)
def test_subspace_iteration_from_the_whole_space_is_exact(rows, columns, seed):
    matrix = randn(seed, rows, columns, dtype=torch.float32)
    basis = leading(matrix, min(rows, columns))
    moved = matrix + 0.01 * randn(seed + 1, rows, columns, dtype=torch.float32)
    got = refine(moved, basis, steps=2)
    assert torch.allclose(got.T @ got, torch.eye(got.shape[1]), atol=1e-4)
    spectrum = torch.linalg.svdvals(moved)
    assert torch.allclose((moved if rows <= columns else moved.T).T.mm(got).norm(dim=0), spectrum, atol=2e-3)


class _Piece:
    def __init__(self, name, depth, base, experts):
        self.name, self.depth, self.base, self.experts = name, depth, base, experts


@given(st.integers(1, 20).flatmap(lambda n: st.tuples(fp32(n), fp32(n), fp32(n))), st.floats(-4, 4))
@often(30)
def test_changes_are_differences_and_add_takes_them_back(tensors, scale):
    base, one, two = (t.clamp(-1e30, 1e30) for t in tensors)
    piece = _Piece("w", 0.5, base, (one, two))
    got = changes(piece)
    assert all(torch.equal(c, e - base) for c, e in zip(got, (one, two), strict=True))
    assert torch.allclose(add(piece, got[0], scale), base + scale * (one - base), rtol=1e-5, atol=1e-30)
    assert each(None, 2.0, piece, 2) == [2.0, 2.0] and each([1.0, [0.0, 4.0]], 9.0, piece, 2) == [1.0, 2.0]
