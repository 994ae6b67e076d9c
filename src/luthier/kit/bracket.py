"""Counts of a stream of magnitudes around an interval: the k-th largest follows from them, or a narrower interval.

What lies inside is kept while it is little, and else counted in bins of its bits, since non-negative floats are
ordered like these. So memory is bounded, and whatever the stream a third pass at the latest is exact.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Split = tuple[int, int, int, Tensor]
INFINITE = 0x7F800000
"""The bits of infinity."""


class Bracket:
    """Counts around an interval from low to high, and what lies inside it. keep: the rank asked for.

    room: entries that are kept inside.  bins: for what is inside if it is more.  ends: whether what equals low or
    high lies inside, which saves passes where these are few; else it is counted.
    """

    def __init__(self, keep: int, low: float, high: float, room: int, bins: int, ends: bool = False):
        self.keep, self.low, self.high, self.room, self.ends = keep, low, high, room, ends
        self.above = self.from_high = self.from_low = self.held = self.binned = 0
        self._inside: Tensor | None = None
        self._bins, self._first, self._last = bins, _bits(max(low, 0.0)), _bits(high) - (not ends)
        self._shift = max(0, (self._last - self._first).bit_length() - (bins.bit_length() - 1))
        self._counts: np.ndarray | None = None

    def look(self, magnitude_N: Tensor) -> Split:
        """What a stretch of the stream holds; changes nothing, so that threads may look at several at once."""
        return split(magnitude_N, self.low, self.high, self.ends)

    def take(self, seen: Split) -> None:
        """Take in what was seen of a stretch."""
        above, from_high, from_low, inside = seen
        self.above += above
        self.from_high += from_high
        self.from_low += from_low
        if self.held + inside.numel() > self.room and self._inside is not None:
            self._bin(self._inside[: self.held])
            self.held = 0
        if inside.numel() > self.room:
            self._bin(inside)
            return
        if self._inside is None:  # one block: thousands of small ones would scatter over the heap
            self._inside = inside.new_empty(self.room)
        self._inside[self.held : self.held + inside.numel()] = inside
        self.held += inside.numel()

    def answer(self) -> float | None:
        """The keep-th largest, or None if it lies outside [low, high] or in a bin of several values."""
        if self.keep == 0:
            return math.inf
        if not self.above < self.keep <= self.from_low:
            return None
        if self.keep <= self.from_high:
            return self.high
        if self.keep > self.from_high + self.held + self.binned:
            return self.low
        if not self.binned:
            assert self._inside is not None
            return rank_(self._inside[: self.held], self.keep - self.from_high)
        return None if self._shift else _value(self._first + self._place())

    def narrower(self) -> Bracket:
        """Where the answer lies, if this has none."""
        low, high = -1.0, math.inf
        if self.keep <= self.above:
            low = self.high
        elif self.keep > self.from_low:
            high = self.low
        else:
            low, high = (_value(self._first + (self._place() + end << self._shift)) for end in (0, 1))
        return Bracket(self.keep, low, high, self.room, self._bins)

    def _bin(self, inside: Tensor) -> None:
        keys = inside.cpu().numpy().view(np.int32) - self._first >> self._shift
        size = (self._last - self._first >> self._shift) + 1
        counts = np.bincount(keys, minlength=size)
        self._counts = counts if self._counts is None else np.add(self._counts, counts, out=self._counts)
        self.binned += inside.numel()

    def _place(self) -> int:
        """The bin that holds the answer."""
        if self.held:
            assert self._inside is not None
            self._bin(self._inside[: self.held])
            self.held = 0
        assert self._counts is not None
        reached = np.cumsum(self._counts[::-1]) >= self.keep - self.from_high
        return len(self._counts) - 1 - int(reached.argmax())


def _bits(value: float) -> int:
    return INFINITE if value == math.inf else int(np.float32(value).view(np.int32))


def _value(bits: int) -> float:
    return float(np.int32(min(bits, INFINITE)).view(np.float32))


def split(magnitude_N: Tensor, low: float, high: float, ends: bool = False) -> Split:
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


def rank_(magnitudes: Tensor, rank: int) -> float:
    """The rank-th largest of flat magnitudes, by partition rather than sort; they are left reordered."""
    place = magnitudes.numel() - rank
    if magnitudes.device.type == "cpu":
        values = magnitudes.numpy()
        values.view(np.int32).partition(place)  # ordered like the floats, and three times faster
        return float(values[place])
    return float(magnitudes.kthvalue(place + 1).values)
