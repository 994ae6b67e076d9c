"""Randomness that depends on a key and on an entry's place alone, whatever the threads, pieces or order.

A counter-based generator (Philox) gives the words of any stretch without those before it. Words are of
16 bits, which halves the cost of 32; where a word equals the upper half of the bound, one entry in 65,536,
16 bits of a second stream decide, so that shares hold to 2**-32 all the same.

N: entries of a stretch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from luthier.kit.compiled import kernels

STEP = 16
"""Words of one counter step: 4 of 64 bits."""
SECOND = 1 << 64
"""What turns a key into that of the second stream: keys of `Ctx.key` have 63 bits."""
ALL = 1 << 32


def words(key: int, start: int, count: int) -> np.ndarray:
    """The 16-bit words of `count` entries from `start` on, uniform and independent."""
    first, end = start // STEP, -(-(start + count) // STEP)
    if (compiled := kernels()) and end < 1 << 63:
        raw = np.empty((end - first) * 4, dtype=np.uint64)
        compiled.philox(np.uint64(key & (1 << 64) - 1), np.uint64(key >> 64), np.uint64(first), raw)
    else:
        raw = np.random.Philox(key=key, counter=first).random_raw((end - first) * 4)  # lets go of Python's lock
    return raw.astype("<u8", copy=False).view("<u2")[start - first * STEP :][:count]


def bound(share: float) -> int:
    """The share in units of 2**-32: so many of the 2**32 draws lie below it."""
    return round(share * ALL)


def bounds_of(shares: np.ndarray) -> np.ndarray:
    """The same for many, as uint32, whose last number 2**32 - 1 stands for all."""
    return np.clip(np.rint(shares * ALL), 0, ALL - 1).astype(np.uint32)


def below(key: int, start: int, count: int, bounds: int | np.ndarray) -> np.ndarray:
    """Which of `count` entries from `start` on draw below their bound: each with probability bound / 2**32.

    bounds: one from 0 to 2**32, or one an entry, as `bounds_of` gives them.
    """
    single = isinstance(bounds, int)
    if single and bounds >= ALL:
        return np.ones(count, dtype=bool)
    if single and start % STEP == 0 and key < SECOND and (compiled := kernels()) and start + count < 1 << 63:
        found = np.empty(count, dtype=np.uint8)
        compiled.below(np.uint64(key), start, np.uint16(bounds >> 16), np.uint16(bounds & 0xFFFF), found)
        return found.view(bool)
    upper = np.uint16(bounds >> 16) if single else (bounds >> 16).astype(np.uint16)
    drawn = words(key, start, count)
    found = drawn < upper
    for at in np.flatnonzero(drawn == upper).tolist():
        exact = bounds if single else int(bounds[at])
        sure = not single and exact == ALL - 1
        found[at] = sure or words(key | SECOND, start + at, 1)[0] < exact & 0xFFFF
    return found


def drawn(key: int, start: int, count: int, share: float) -> np.ndarray | None:
    """Which of `count` entries from `start` on a random share is; None for all."""
    return None if share >= 1 else below(key, start, count, bound(share))


class Draws:
    """`drawn` for several passes over the same changes: what the first one draws is kept on disk, a bit an entry.

    counts: name → entries of each change, and how many changes there are at most.  folder: where the file lies; it
    has no name and is gone with this object.  several: false where a single pass makes every draw once, and nothing
    is kept.  OSError where there is no room for it.
    """

    def __init__(self, counts: Mapping[str, tuple[int, int]], folder: Path | None, several: bool = True):
        self._at: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (entries, changes) in counts.items():
            each = -(-entries // 8)
            self._at[name] = end, each
            end += each * changes
        self._file = tempfile.TemporaryFile(dir=folder) if several else None  # noqa: SIM115
        if self._file is not None and end and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, end)  # a full disk shows now, not after a pass
        self._drawn = False

    def seal(self) -> None:
        """Every draw has been made once, and is read from here on."""
        self._drawn = True

    def found(self, name: str, change: int, key: int, start: int, count: int, share: float) -> np.ndarray | None:
        """As `drawn`. change: its number.  start: a multiple of 8.  OSError where the disk is full."""
        if share >= 1 or self._file is None:
            return drawn(key, start, count, share)
        first, each = self._at[name]
        place = first + change * each + start // 8
        if self._drawn:
            held = np.frombuffer(os.pread(self._file.fileno(), -(-count // 8), place), dtype=np.uint8)
            return np.unpackbits(held, count=count).view(bool)
        found = below(key, start, count, bound(share))
        rest = memoryview(np.packbits(found).tobytes())
        while rest:
            done = os.pwrite(self._file.fileno(), rest, place)
            rest, place = rest[done:], place + done
        return found
