"""The k-th largest of a stream: against a sort, on every way to it."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.kit import select
from luthier.kit.bracket import Bracket
from luthier.kit.select import kept, largest, trim


def stream_of(members, stretch, sampled=1):
    """Equal-length magnitudes in stretches; with `sample` every `sampled`-th."""

    def stream(sample, see):
        for start in range(0, len(members[0]), stretch):
            if not sample or (start // stretch) % sampled == 0:
                yield see([m[start : start + stretch].clone() for m in members])

    return stream


class Counted:
    """A stream that counts how often all of it is looked at."""

    def __init__(self, stream):
        self.stream, self.passes = stream, 0

    def __call__(self, sample, see):
        self.passes += not sample
        return self.stream(sample, see)


def slow(values, keep):
    return math.inf if keep == 0 else float(values.sort(descending=True).values[keep - 1])


numbers = st.one_of(st.integers(0, 5).map(float), st.floats(0, 2.0**127, width=32))


@settings(max_examples=150, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=60), st.integers(1, 20), st.data())
def test_every_way_equals_a_sort(values, stretch, data):
    first = torch.tensor(values, dtype=torch.float32)
    members = [first, first.flip(0) * 0.5]
    keep = [data.draw(st.integers(0, len(values))) for _ in members]
    wanted = [slow(m, k) for m, k in zip(members, keep, strict=True)]
    stream = stream_of(members, stretch, sampled=3)
    assert largest(stream, keep, len(values)) == wanted
    with pytest.MonkeyPatch.context() as patch:
        ways = [(0, 1 << 20, 0.3), (0, 1 << 20, 0.0), (0, 2, 0.3), (1 << 20, 2, 0.3)]
        for (small, room, spread), sparse, bins in itertools.product(ways, (1, 5), (2, 1 << 10, 1 << 20)):
            named = {
                "SMALL": small,
                "KEPT": room,
                "BINS": bins,
                "SPREAD": spread,
                "THIN": 2,
                "FEW": 1,
                "SPARSE": sparse,
            }
            for name, value in named.items():
                patch.setattr(select, name, value)
            assert largest(stream, keep, len(values)) == wanted


def many(seed, count):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=gen).abs() * torch.linspace(0.5, 1, count)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999])
def test_a_sample_is_enough(monkeypatch, density):
    """Mixed stretches: the bracket holds the answer; where there is no room for what lies inside, a bin of it does."""
    monkeypatch.setattr(select, "SMALL", 0)
    values = many(1, 1 << 18)
    keep = kept(density, len(values))
    for room, passes in ((1 << 20, 1), (1 << 9, 2)):
        monkeypatch.setattr(select, "KEPT", room)
        stream = Counted(stream_of([values], 1 << 11, 8))
        assert largest(stream, [keep], len(values)) == [slow(values, keep)]
        assert stream.passes == passes


def test_small_tensors_do_not_widen_the_bracket(monkeypatch):
    """Norms, whose few entries are unlike the matrices', hardly count among these."""
    monkeypatch.setattr(select, "SMALL", 0)
    monkeypatch.setattr(select, "KEPT", 100_000)
    values, norms = many(1, 1 << 18).view(64, -1), torch.full((64, 16), 9.0)
    whole = torch.cat([values, norms], 1)

    def stream(sample, see):
        for row in range(0, 64, 4 if sample else 1):
            yield see([values[row].clone()])
            yield see([norms[row].clone()])

    counted = Counted(stream)
    assert largest(counted, [50_000], whole.numel()) == [slow(whole.flatten(), 50_000)]
    assert counted.passes == 1


@pytest.mark.parametrize("bins", [1 << 20, 1 << 16, 1 << 8])
def test_few_passes_whatever_the_sample_says(monkeypatch, bins):
    """A sample that says nothing true costs one pass more, and as many as the bins need."""
    monkeypatch.setattr(select, "SMALL", 0)
    monkeypatch.setattr(select, "KEPT", 100)
    monkeypatch.setattr(select, "BINS", bins)
    values = many(2, 1 << 14).view(-1, 1 << 10)
    values[::4] *= 1e-6
    values = values.reshape(-1)
    stream = Counted(stream_of([values], 1 << 10, 4))
    assert largest(stream, [5000], len(values)) == [slow(values, 5000)]
    assert stream.passes <= {1 << 20: 3, 1 << 16: 3, 1 << 8: 5}[bins]


def test_a_misleading_sample_is_found_out(monkeypatch):
    """All sampled stretches are tiny: the bracket lies below the answer, and the histograms find it."""
    monkeypatch.setattr(select, "SMALL", 0)
    values = many(2, 1 << 14).view(-1, 1 << 10)
    values[::4] *= 1e-6
    values = values.reshape(-1)
    keep = kept(0.3, len(values))
    assert largest(stream_of([values], 1 << 10, 4), [keep], len(values)) == [slow(values, keep)]


@pytest.mark.parametrize("rank", [1, 2, 300, 20_000, 39_999, 40_000])
@pytest.mark.parametrize("steps", [3, 64, 1 << 20])
def test_in_memory_a_sample_finds_it_too(rank, steps):
    """Plateaus of many equal values, narrow ones, and none."""
    values = (many(5, 40_000) * steps).round() / steps
    assert select._bracketed(values, rank) == slow(values, rank)
    assert select._ranks_(values.clone(), [rank, 0, 7]) == {0: math.inf, rank: slow(values, rank), 7: slow(values, 7)}


def test_a_plateau_is_counted_and_nothing_kept(monkeypatch):
    """A share that is amid equal values needs no room; one that only looks so is found by a second pass."""
    monkeypatch.setattr(select, "SMALL", 0)
    values = (many(6, 1 << 17) * 4).round() / 4
    amid = slow(values, 1 << 16)
    above, reached = int((values > amid).sum()), int((values >= amid).sum())
    for keep in (above + 1, (above + reached) // 2, reached):
        assert largest(stream_of([values], 1 << 11, 8), [keep], len(values)) == [amid]
    monkeypatch.setattr(select, "KEPT", 0)
    monkeypatch.setattr(Bracket, "_bin", None)
    stream = Counted(stream_of([values], 1 << 11, 8))
    assert largest(stream, [(above + reached) // 2], len(values)) == [amid] and stream.passes == 1
    monkeypatch.undo()
    monkeypatch.setattr(select, "SMALL", 0)
    values.view(-1, 1 << 11)[::8] = 7.0
    keep = int((values == 7.0).sum()) + 9
    assert largest(stream_of([values], 1 << 11, 8), [keep], len(values)) == [slow(values, keep)]


def test_few_distinct_values(monkeypatch):
    """Changes of bf16 models: whole plateaus, also where the bracket ends."""
    monkeypatch.setattr(select, "SMALL", 0)
    values = (many(3, 1 << 14) * 8).round() / 8
    for keep in (1, 100, 5000, 12000, 1 << 14):
        assert largest(stream_of([values], 1 << 9, 4), [keep], len(values)) == [slow(values, keep)]


def test_answers_do_not_depend_on_room(monkeypatch):
    values = many(4, 1 << 14)
    monkeypatch.setattr(select, "SMALL", 0)
    answers = set()
    for room in (10, 1000, 1 << 20):
        monkeypatch.setattr(select, "KEPT", room)
        answers.add(largest(stream_of([values], 1 << 9, 4), [3000], len(values))[0])
    assert answers == {slow(values, 3000)}


def test_trim_keeps_what_equals_the_cut():
    values = torch.tensor([0.0, -1.0, 1.0, 2.0, -3.0, 1e-45, -0.5])
    assert trim(values, 1.0).tolist() == [0.0, -1.0, 1.0, 2.0, -3.0, 0.0, 0.0]
    assert torch.equal(trim(values, 0.0), values)
    assert trim(values, math.inf).abs().sum() == 0
    assert trim(values, 1e-45)[5] == values[5]
    just = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert trim(torch.stack([just, torch.tensor(1.0)]), float(just)).tolist() == [float(just), 0.0]


def test_kept():
    assert [kept(d, 10) for d in (0.0, 0.01, 0.1, 0.29, 0.999, 1.0)] == [0, 1, 1, 2, 9, 10]
    assert kept(0.5, 0) == 0


@pytest.mark.parametrize("sure", [select.SURE, 0.0])
def test_stretches_that_disagree_widen_the_bracket(monkeypatch, sure):
    """Each stretch has a spread of its own, as tensors of a model have: what is sampled differs from the rest."""
    monkeypatch.setattr(select, "SMALL", 0)
    monkeypatch.setattr(select, "SURE", sure)
    passes = set()
    for seed in range(12):
        spread = torch.randn(128, 1, generator=torch.Generator().manual_seed(seed)).mul(2).exp()
        values = (many(seed, 1 << 15).view(128, -1) * spread).reshape(-1)
        keep = kept(0.3, len(values))
        stream = Counted(stream_of([values], 1 << 8, 8))
        assert largest(stream, [keep], len(values)) == [slow(values, keep)]
        passes.add(stream.passes)
    assert (passes == {1}) == (sure > 0)
