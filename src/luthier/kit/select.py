"""Order statistics of streams: the k-th largest magnitude, exactly, without a sort and in bounded memory.

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

SMALL = 1 << 20
"""Streams up to this many entries need no sample: everything is inside the bracket."""
KEPT = 1 << 22
"""Entries kept inside a bracket, at most."""
SPREAD = 32.0
"""Half the bracket's width, in shares of the stream, times the root of the sample's size. Stretches of
65,536 entries resemble themselves more than one another, so it is far above an independent sample's 3."""

Stream = Callable[[bool], Iterable[Sequence[Tensor]]]
"""stream(sample) yields flat fp32 magnitudes, one tensor a member, as often as asked; with `sample` set
only a share of them, at the stream's choice."""


def kept(density: float, count: int) -> int:
    """How many of `count` entries a density keeps, rounded down, as the published merge codes do."""
    return int(density * count)


def trim(values_N: Tensor, cut: float) -> Tensor:
    """A copy with zeros where the magnitude is below `cut`."""
    below = torch.nextafter(torch.tensor(cut, dtype=torch.float32), torch.tensor(0.0))
    return torch.nn.functional.hardshrink(values_N, float(below))  # the one fused kernel for this


def largest(stream: Stream, keep: Sequence[int], count: int) -> list[float]:
    """For each member, the keep-th largest of its `count` magnitudes; infinity where keep is 0.

    Entries >= the result number at least `keep`; more only where some equal it.
    """
    brackets = [Bracket(k) for k in keep]
    if count > SMALL:
        samples = zip(*stream(True), strict=True)
        brackets = [_guess(torch.cat(s), k, count) for s, k in zip(samples, keep, strict=True)]
    for stretch in stream(False):
        for bracket, magnitude_N in zip(brackets, stretch, strict=True):
            bracket.add(magnitude_N)
    found = [bracket.answer() for bracket in brackets]
    if None in found:
        found = _by_bits(stream, keep)
    return [f for f in found if f is not None]


class Bracket:
    """Counts of a stream around the open interval (low, high), and what lies inside it."""

    def __init__(self, keep: int, low: float = -1.0, high: float = math.inf):
        self.keep, self.low, self.high = keep, low, high
        self.above = self.from_high = self.from_low = self.held = 0
        self.inside: list[Tensor] = []

    def add(self, magnitude_N: Tensor) -> None:
        """Take in a stretch of the stream."""
        above, from_high, from_low, inside = _split(magnitude_N, self.low, self.high)
        self.above, self.from_high, self.from_low = (
            self.above + above,
            self.from_high + from_high,
            self.from_low + from_low,
        )
        self.held += inside.numel()
        if self.held <= KEPT:
            self.inside.append(inside)
        else:
            self.inside.clear()

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
        return _rank(torch.cat(self.inside), self.keep - self.from_high) if self.inside else None


def _split(magnitude_N: Tensor, low: float, high: float) -> tuple[int, int, int, Tensor]:
    """How many are > high, >= high, >= low, and those strictly between."""
    if magnitude_N.device.type == "cpu":  # numpy compares and compresses some ten times faster than torch
        values = magnitude_N.numpy()
        above, from_high, from_low = values > high, values >= high, values >= low
        inside = values[(values > low) & ~from_high]
        count = np.count_nonzero
        return int(count(above)), int(count(from_high)), int(count(from_low)), torch.from_numpy(inside)
    above, from_high, from_low = magnitude_N > high, magnitude_N >= high, magnitude_N >= low
    return int(above.sum()), int(from_high.sum()), int(from_low.sum()), magnitude_N[(magnitude_N > low) & ~from_high]


def _rank(values: Tensor, rank: int) -> float:
    """The rank-th largest of a flat tensor, by partition rather than sort."""
    place = values.numel() - rank
    if values.device.type == "cpu":
        return float(np.partition(values.numpy(), place)[place])
    return float(values.kthvalue(place + 1).values)


def _guess(sample: Tensor, keep: int, count: int) -> Bracket:
    """A bracket between two quantiles of the sample on either side of the wanted one."""
    size = sample.numel()
    width = SPREAD / math.sqrt(size)
    first, last = int((keep / count - width) * size), int((keep / count + width) * size) + 1
    high = math.inf if first < 1 else _rank(sample, first)
    low = -1.0 if last > size else _rank(sample, last)
    return Bracket(keep, low, high)


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
