"""Order statistics of streams: the k-th largest magnitude, exactly, without a sort and in bounded memory.
Of rows that are at hand: the same, and every entry's rank.

A sample gives a bracket that almost surely holds the answer; one pass then counts what lies above the
bracket and keeps or bins what lies inside. Should the answer lie elsewhere, the counts say where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.kit.bracket import Bracket, rank_
from luthier.kit.compiled import flat, kernels

SMALL = 1 << 20
"""Streams up to this many entries are gathered in memory, shorter ones where there are many members."""
KEPT, BINS, ROOM, RANKED = 1 << 20, 1 << 20, 1 << 23, 12
"""Entries kept inside a member's bracket, bins for them if there are more, and either for all members together, at
most; bytes of an entry and its bin."""
THIN = 7
"""Of a sampled stretch one entry in so many is looked at: it is stretches that differ. A width is no multiple of it."""
FEW, SPARSE = 1 << 14, 61
"""From so many entries in memory on, a bracket is worth its sample, which is one entry in so many."""
SPREAD, SURE, LUMP = 0.12, 4.0, 0.01
"""Half the bracket's width at the median for a sample of one stretch, in shares of the stream, at least; the same in
standard errors of what the stretches say. Ends that are more of the stream than this are counted, not kept."""

See = Callable[[Sequence[Tensor]], Any]
Stream = Callable[[bool, See], Iterable[Any]]
"""stream(sample, see) yields see(flat fp32 magnitudes, one tensor a member), as often as asked, and may have several
threads see at once; with `sample` set only a share of them, at the stream's choice."""


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


def largest(stream: Stream, keep: Sequence[int], count: int, room: int = ROOM) -> list[float]:
    """For each member, the keep-th largest of its `count` magnitudes; infinity where keep is 0.

    Entries >= the result number at least `keep`; more only where some equal it.  room: entries that may be held of
    all members together, at least one a member; it decides how often the stream is looked at, never the answer.
    """
    share = max(1, room // max(1, len(keep)))
    if count <= min(SMALL, share):
        return _gathered(stream, keep, count)
    samples = list(zip(*stream(True, lambda stretch: [m_N[::THIN].clone() for m_N in stretch]), strict=True))
    limits = min(KEPT, share), 1 << min(BINS, max(2, share)).bit_length() - 1
    open_ = {n: _guess(samples[n], k, count, limits, lumps=True) for n, k in enumerate(keep)}
    found: dict[int, float] = {}
    lumps = {n for n, bracket in open_.items() if bracket.low == bracket.high}
    while open_:
        for seen in stream(False, partial(_looked, open_)):
            for bracket, part in zip(open_.values(), seen, strict=True):
                bracket.take(part)
        missed: dict[int, Bracket] = {}
        for n, bracket in open_.items():
            if (answer := bracket.answer()) is not None:
                found[n] = answer
            elif n in lumps:  # it was none after all
                missed[n] = _guess(samples[n], keep[n], count, limits, lumps=False)
                lumps.remove(n)
            else:
                missed[n] = bracket.narrower()
        open_ = missed
    return [found[n] for n in range(len(keep))]


def _looked(brackets: Mapping[int, Bracket], stretch: Sequence[Tensor]) -> list[Any]:
    return [bracket.look(stretch[n]) for n, bracket in brackets.items()]


def _gathered(stream: Stream, keep: Sequence[int], count: int) -> list[float]:
    """The same with all magnitudes in memory; members that are one tensor share theirs."""
    first: list[int] = []  # for each member, the first that is the same tensor
    whole: dict[int, Tensor] = {}
    at = 0
    for stretch in stream(False, lambda stretch: stretch):
        if not whole:
            first = [next(n for n, other in enumerate(stretch) if other is m_N) for m_N in stretch]
            whole = {n: stretch[n].new_empty(count) for n in first}
        for n, magnitude_N in whole.items():
            magnitude_N[at : at + stretch[n].numel()] = stretch[n]
        at += stretch[0].numel()
    return largest_in([whole[n] for n in first], keep)


def largest_in(members: Sequence[Tensor], keep: Sequence[int]) -> list[float]:
    """`largest` of flat magnitudes in memory, which are left reordered; members may be one tensor."""
    asked: dict[int, list[int]] = {}
    for magnitude_N, k in zip(members, keep, strict=True):
        asked.setdefault(id(magnitude_N), []).append(k)
    found = {id(m_N): _ranks_(m_N, asked.pop(id(m_N))) for m_N in members if id(m_N) in asked}
    return [found[id(m_N)][k] for m_N, k in zip(members, keep, strict=True)]


def _ranks_(magnitudes: Tensor, ranks: Sequence[int]) -> dict[int, float]:
    """Each rank's magnitude, which is infinity for rank 0."""
    found = {0: math.inf}
    for rank in set(ranks) - {0}:
        near = _bracketed(magnitudes, rank) if magnitudes.device.type == "cpu" else None
        found[rank] = rank_(magnitudes, rank) if near is None else near
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
        bracket = Bracket(rank, least, most, count, 2)
        bracket.take(bracket.look(magnitudes))
        if (found := bracket.answer()) is not None:
            return found
    return None


def _guess(stretches: Sequence[Tensor], keep: int, count: int, limits: tuple[int, int], lumps: bool) -> Bracket:
    """A bracket between two quantiles of the sample on either side of the wanted one; with `lumps` that one alone,
    which costs little to count, if it is likely to be many of one value. limits: a Bracket's `room` and `bins`."""
    stretches = [stretch_N for stretch_N in stretches if stretch_N.numel()]
    if not stretches:
        return Bracket(keep, -1.0, math.inf, *limits)
    sample = torch.cat(stretches)
    size = sample.numel()
    share = keep / count
    middle = rank_(sample, min(size, int(share * size) + 1))
    sizes = np.array([stretch_N.numel() for stretch_N in stretches])
    shares = np.array([float((stretch_N >= middle).float().mean()) for stretch_N in stretches])
    weights = sizes / sizes.sum()  # a norm's few entries say less than a matrix's
    spread = SPREAD * 2 * math.sqrt(share * (1 - share) * float((weights**2).sum()))
    error = math.sqrt(float((weights**2 * (shares - shares @ weights) ** 2).sum()))
    width = max(spread, SURE * error) + 2 / size
    first, last = int((share - width) * size), int((share + width) * size) + 1
    high = math.inf if first < 1 else rank_(sample, first)
    low = -1.0 if last > size else rank_(sample, last)
    above, reached = (float(compared.float().mean()) for compared in (sample > middle, sample >= middle))
    if lumps and above + width / 2 < share < reached - width / 2:
        low = high = middle
    many = float(((sample == low) | (sample == high)).float().mean()) > LUMP
    return Bracket(keep, low, high, *limits, ends=low < middle < high and not many)
