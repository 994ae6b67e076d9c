"""Order statistics of streams: the k-th largest magnitude, exactly, without a sort and in bounded memory.
Of rows that are at hand: the same, and every entry's rank.

A sample gives a bracket that almost surely holds the answer; one pass then counts what lies above the
bracket and keeps what lies inside. Should the answer lie elsewhere, or too much inside, two passes of
histograms find it for certain: of the upper 16 bits of every magnitude, then of the lower 16 of those
in the right bin, since non-negative floats are ordered like their bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from luthier.kit.compiled import flat, kernels

SMALL = 1 << 20
"""Streams up to this many entries are gathered in memory."""
KEPT = 1 << 22
"""Entries kept inside a bracket, at most."""
THIN = 7
"""Of a sampled stretch one entry in so many is looked at: it is stretches that differ. A width is no multiple of it."""
FEW, SPARSE = 1 << 14, 61
"""From so many entries in memory on, a bracket is worth its sample, which is one entry in so many."""
SPREAD, SURE, LUMP = 0.12, 4.0, 0.01
"""Half the bracket's width at the median for a sample of one stretch, in shares of the stream, at least; the same in
standard errors of what the stretches say. Ends that are more of the stream than this are counted, not kept."""

Stream = Callable[[bool], Iterable[Sequence[Tensor]]]
"""stream(sample) yields flat fp32 magnitudes, one tensor a member, as often as asked; with `sample` set
only a share of them, at the stream's choice."""


def kept(density: float, count: int) -> int:
    """How many of `count` entries a density keeps: rounded down, but at least one, as published codes do."""
    return max(1, int(density * count)) if density > 0 and count else 0


def below(cut: float) -> float:
    """The largest number of fp32 that a magnitude from `cut` on is above; 0 for a cut of 0."""
    return float(np.nextafter(np.float32(cut), np.float32(0)))


def trim(values_N: Tensor, cut: float) -> Tensor:
    """A copy with zeros where the magnitude is below `cut`."""
    return torch.nn.functional.hardshrink(values_N, below(cut))  # the one fused kernel for this


def keep_(values: Tensor, found: Tensor) -> Tensor:
    """Zero the values where `found` is false, in place. Both are contiguous and hold as many entries."""
    if values.device.type == "cpu":  # numpy multiplies by booleans some three times faster than torch
        array = flat(values)
        if compiled := kernels():
            compiled.thin(array, flat(found))
        else:
            np.multiply(array, flat(found), out=array)
        return values
    return values.mul_(found.view_as(values))


def keep_between_(values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Zero what has a magnitude below low or above high, in place: numbers, or one a row as columns."""
    return keep_(values, between(values.abs(), low, high))


def between(magnitude: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Where low <= magnitude <= high: numbers, or one a row as columns."""
    if magnitude.device.type == "cpu":  # numpy compares with columns some three times faster than torch
        values, (least, most) = magnitude.numpy(), (np.asarray(bound, dtype=np.float32) for bound in (low, high))
        return torch.from_numpy((values >= least) & (values <= most))
    return (magnitude >= low) & (magnitude <= high)


def positive(values: Tensor) -> Tensor:
    """Where values are above 0."""
    if values.device.type == "cpu":  # numpy compares some ten times faster than torch
        return torch.from_numpy(values.numpy() > 0)
    return values > 0


def row_band(magnitude_RC: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Of each row the last-th and the first-th largest, as columns; infinity for both if last is 0."""
    rows, columns = magnitude_RC.shape
    if last == 0:
        infinite_R1 = magnitude_RC.new_full((rows, 1), math.inf)
        return infinite_R1, infinite_R1
    low, high = columns - last, columns - first
    if magnitude_RC.device.type == "cpu":
        bits = np.partition(magnitude_RC.numpy().view(np.int32), low, axis=-1)  # ordered like the floats
        low_R1 = torch.from_numpy(bits[:, low : low + 1].copy()).view(torch.float32)
        upper = bits[:, low:]
        upper.partition(high - low, axis=-1)
        return low_R1, torch.from_numpy(upper[:, high - low :][:, :1].copy()).view(torch.float32)
    ranked_RC = magnitude_RC.sort(dim=-1).values
    return ranked_RC[:, low : low + 1], ranked_RC[:, high : high + 1]


def row_ranks(magnitude_RC: Tensor) -> Tensor:
    """Each entry's place in its row by magnitude, from 0 for the smallest; equal ones in their order (int64)."""
    columns_C = torch.arange(magnitude_RC.shape[-1], device=magnitude_RC.device)
    if magnitude_RC.device.type == "cpu":  # pairs of magnitude and place: numpy sorts these much faster than torch
        pairs = magnitude_RC.numpy().view(np.int32).astype(np.int64)
        pairs <<= 32
        pairs |= columns_C.numpy()
        pairs.sort(axis=-1)
        pairs &= 0xFFFFFFFF
        order_RC = torch.from_numpy(pairs)
    else:
        order_RC = magnitude_RC.argsort(dim=-1, stable=True)
    return torch.empty_like(order_RC).scatter_(-1, order_RC, columns_C.expand_as(order_RC))


def largest(stream: Stream, keep: Sequence[int], count: int) -> list[float]:
    """For each member, the keep-th largest of its `count` magnitudes; infinity where keep is 0.

    Entries >= the result number at least `keep`; more only where some equal it.
    """
    if count <= SMALL:
        return _gathered(stream, keep, count)
    samples = list(zip(*([m_N[::THIN].clone() for m_N in stretch] for stretch in stream(True)), strict=True))
    found: list[float | None] = [None] * len(keep)
    for lumps in (True, False):  # what a lump has missed, a bracket of some width finds
        wanted = [n for n, f in enumerate(found) if f is None]
        brackets = {n: _guess(samples[n], keep[n], count, lumps) for n in wanted}
        for stretch in stream(False) if wanted else ():
            for n, bracket in brackets.items():
                bracket.add(stretch[n])
        found = [brackets[n].answer() if f is None else f for n, f in enumerate(found)]
    return [f for f in found if f is not None] if None not in found else _by_bits(stream, keep)


def _gathered(stream: Stream, keep: Sequence[int], count: int) -> list[float]:
    """The same with all magnitudes in memory; members that are one tensor share theirs."""
    first: list[int] = []  # for each member, the first that is the same tensor
    whole: dict[int, Tensor] = {}
    at = 0
    for stretch in stream(False):
        if not whole:
            first = [next(n for n, other in enumerate(stretch) if other is m_N) for m_N in stretch]
            whole = {n: stretch[n].new_empty(count) for n in first}
        for n, magnitude_N in whole.items():
            magnitude_N[at : at + stretch[n].numel()] = stretch[n]
        at += stretch[0].numel()
    found: dict[int, dict[int, float]] = {}
    for n, magnitude_N in whole.items():
        found[n] = _ranks_(magnitude_N, [k for other, k in zip(first, keep, strict=True) if other == n])
    return [found[n][k] for n, k in zip(first, keep, strict=True)]


def _ranks_(magnitudes: Tensor, ranks: Sequence[int]) -> dict[int, float]:
    """Each rank's magnitude, which is infinity for rank 0."""
    found = {0: math.inf}
    for rank in set(ranks) - {0}:
        near = _bracketed(magnitudes, rank) if magnitudes.device.type == "cpu" else None
        found[rank] = _rank_(magnitudes, rank) if near is None else near
    return found


def _bracketed(magnitudes: Tensor, rank: int) -> float | None:
    """The rank-th largest, found in the bracket that a sample gives; None where there are few, or it lies outside.

    A partition of changes of bfloat16, which repeat, takes three times as long.
    """
    count, share = magnitudes.numel(), rank / magnitudes.numel()
    if count < FEW:
        return None
    bits = np.sort(magnitudes.numpy().view(np.int32)[::SPARSE])  # ordered like the floats
    width = SURE * math.sqrt(share * (1 - share) / bits.size) + 1 / bits.size
    first, place, last = (int((1 - share + w) * bits.size) for w in (-width, 0.0, width))
    values = bits.view(np.float32)
    low = float(values[first]) if first > 0 else -1.0
    middle, high = float(values[min(place, bits.size - 1)]), float(values[last]) if last < bits.size else math.inf
    for least, most in ((middle, middle), (low, high)):  # the first is many of one value, or misses and is cheap
        bracket = Bracket(rank, count, least, most)
        bracket.add(magnitudes)
        if (found := bracket.answer()) is not None:
            return found
    return None


class Bracket:
    """Counts of a stream around an interval from low to high, and what lies inside it, up to `room`.

    ends: whether what equals low or high lies inside, which saves passes where these are few; else it is counted.
    """

    def __init__(self, keep: int, room: int, low: float, high: float, ends: bool = False):
        self.keep, self.room, self.low, self.high, self.ends = keep, room, low, high, ends
        self.above = self.from_high = self.from_low = self.held = 0
        self.inside: Tensor | None = None

    def add(self, magnitude_N: Tensor) -> None:
        """Take in a stretch of the stream."""
        above, from_high, from_low, inside = _split(magnitude_N, self.low, self.high, self.ends)
        self.above += above
        self.from_high += from_high
        self.from_low += from_low
        if self.inside is None:  # one block: thousands of small ones would scatter over the heap
            self.inside = magnitude_N.new_empty(self.room)
        if self.held + inside.numel() <= self.room:
            self.inside[self.held : self.held + inside.numel()] = inside
        self.held += inside.numel()

    def answer(self) -> float | None:
        """The keep-th largest, or None if it lies outside [low, high] or too much lies inside."""
        if self.keep == 0:
            return math.inf
        if not self.above < self.keep <= self.from_low:
            return None
        if self.keep <= self.from_high:
            return self.high
        if self.keep > self.from_high + self.held:
            return self.low
        if self.inside is None or self.held > self.room:
            return None
        return _rank_(self.inside[: self.held], self.keep - self.from_high)


def _split(magnitude_N: Tensor, low: float, high: float, ends: bool = False) -> tuple[int, int, int, Tensor]:
    """How many are > high, >= high, >= low, and those strictly between; with `ends`, on the CPU, how many are > high
    twice, >= low, and those between, both ends included."""
    if magnitude_N.device.type == "cpu":  # numpy compares and compresses some ten times faster than torch
        values, count = magnitude_N.numpy(), np.count_nonzero
        if low == high:
            from_low = int(count(values >= low))
            return int(count(values > high)), from_low, from_low, magnitude_N[:0]
        if ends:
            within = values >= low
            from_low = int(count(within))
            inside = torch.from_numpy(np.compress(np.logical_and(within, values <= high, out=within), values))
            return from_low - inside.numel(), from_low - inside.numel(), from_low, inside
        over, under = values > low, values < high
        from_high, from_low = values.size - int(count(under)), int(count(over)) + int(count(values == low))
        inside = torch.from_numpy(np.compress(np.logical_and(over, under, out=over), values))
        return from_high - int(count(values == high)), from_high, from_low, inside
    over, from_high, from_low = magnitude_N > high, magnitude_N >= high, magnitude_N >= low
    return int(over.sum()), int(from_high.sum()), int(from_low.sum()), magnitude_N[(magnitude_N > low) & ~from_high]


def _rank_(magnitudes: Tensor, rank: int) -> float:
    """The rank-th largest of flat magnitudes, by partition rather than sort; they are left reordered."""
    place = magnitudes.numel() - rank
    if magnitudes.device.type == "cpu":
        magnitudes.numpy().view(np.int32).partition(place)  # ordered like the floats, and three times faster
        return float(magnitudes[place])
    return float(magnitudes.kthvalue(place + 1).values)


def _guess(stretches: Sequence[Tensor], keep: int, count: int, lumps: bool) -> Bracket:
    """A bracket between two quantiles of the sample on either side of the wanted one; with `lumps` that one alone,
    which costs little to count, if it is likely to be many of one value."""
    stretches = [stretch_N for stretch_N in stretches if stretch_N.numel()]
    if not stretches:
        return Bracket(keep, min(count, KEPT), -1.0, math.inf)
    sample = torch.cat(stretches)
    size = sample.numel()
    middle = _rank_(sample, min(size, int(keep / count * size) + 1))
    shares = [float((stretch_N >= middle).float().mean()) for stretch_N in stretches]
    spread = SPREAD * 2 * math.sqrt(keep / count * (1 - keep / count))
    width = max(spread, SURE * float(np.std(shares))) / math.sqrt(len(stretches)) + 2 / size
    first, last = int((keep / count - width) * size), int((keep / count + width) * size) + 1
    high = math.inf if first < 1 else _rank_(sample, first)
    low = -1.0 if last > size else _rank_(sample, last)
    above, reached = (float(compared.float().mean()) for compared in (sample > middle, sample >= middle))
    if lumps and above + width / 2 < keep / count < reached - width / 2:
        low = high = middle
    many = float(((sample == low) | (sample == high)).float().mean()) > LUMP
    return Bracket(keep, min(count, KEPT), low, high, ends=low < middle < high and not many)


def _by_bits(stream: Stream, keep: Sequence[int]) -> list[float]:
    """The same by histograms of 16 bits at a time."""
    bins = [torch.zeros(1 << 16, dtype=torch.int64) for _ in keep]
    for stretch in stream(False):
        for total, magnitude_N in zip(bins, stretch, strict=True):
            total += torch.bincount(magnitude_N.view(torch.int32) >> 16, minlength=1 << 16).cpu()
    upper = [_bin(total, k) for total, k in zip(bins, keep, strict=True)]
    rest = [k - int(total[u + 1 :].sum()) for total, k, u in zip(bins, keep, upper, strict=True)]
    bins = [torch.zeros_like(total) for total in bins]
    for stretch in stream(False):
        for total, magnitude_N, u in zip(bins, stretch, upper, strict=True):
            bits = magnitude_N.view(torch.int32)
            total += torch.bincount(bits[bits >> 16 == u] & 0xFFFF, minlength=1 << 16).cpu()
    bits = [(u << 16) | _bin(total, k) for total, k, u in zip(bins, rest, upper, strict=True)]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()
    return [v if k else math.inf for v, k in zip(values, keep, strict=True)]


def _bin(total: Tensor, keep: int) -> int:
    """The bin that holds the keep-th entry, counted from the last bin."""
    reached = total.flip(0).cumsum(0) >= max(keep, 1)
    return total.numel() - 1 - int(reached.int().argmax())
