"""Which entries of every expert's change stay, and what is made of these: their vote, their sum, their mass.

With compiled kernels a block of entries goes through all steps within the first cache and no change is ever
written out; otherwise torch takes the steps one by one. Both give the same bytes.

E: experts.  N: entries of a stretch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from luthier.flows import Piece
from luthier.kit.compiled import address, kernels
from luthier.kit.deltas import add, changes
from luthier.kit.mass import LANES, mass_, total
from luthier.kit.select import FEW, keep_, keep_between_, largest_in, trim
from luthier.kit.vote import alike, fuse_, majority


class Sieve(NamedTuple):
    """What stays, each field one an expert or None for everything.

    low, high: the least and the largest magnitude that stays, a number or one a row as a column; high goes with low.
    found: flat booleans, None for an expert that keeps all.
    """

    low: Sequence[float | Tensor] | None = None
    high: Sequence[float | Tensor] | None = None
    found: Sequence[np.ndarray | None] | None = None


def magnitudes(piece: Piece) -> list[Tensor]:
    """Every expert's change without its sign, flat; tensors of their own."""
    if (compiled := kernels()) and piece.stored:
        return list(torch.from_numpy(_magnitudes(compiled, piece)))
    return [change_N.abs_().flatten() for change_N in changes(piece)]


def least(piece: Piece, keep: Sequence[int]) -> list[float]:
    """The smallest magnitude of each expert's `keep` largest changes, of a piece that shows all of its tensor."""
    if not (compiled := kernels()) or not piece.stored or math.prod(piece.seen) >= FEW:
        return largest_in(magnitudes(piece), keep)
    made_EN = _magnitudes(compiled, piece)
    found = {0: [math.inf] * len(made_EN)}
    for k in set(keep) - {0}:
        made_EN.view(np.int32).partition(made_EN.shape[1] - k, axis=1)  # ordered like the floats
        found[k] = made_EN[:, made_EN.shape[1] - k].tolist()
    return [found[k][number] for number, k in enumerate(keep)]


def _magnitudes(compiled: Any, piece: Piece) -> np.ndarray:
    assert piece.stored is not None
    _, base, experts = piece.stored
    made_EN = np.empty((len(experts), base.size), dtype=np.float32)
    compiled.magnitudes(base, np.array([address(bits) for bits in experts]), made_EN)
    return made_EN


def sifted(piece: Piece, sieve: Sieve) -> list[Tensor]:
    """Every expert's change, with zeros for what does not stay; tensors of their own."""
    moved = changes(piece)
    for number, (change_N, found) in enumerate(zip(moved, _found(sieve, piece), strict=True)):
        if sieve.low and sieve.high:
            keep_between_(change_N, sieve.low[number], sieve.high[number])
        elif sieve.low:
            moved[number] = change_N = trim(change_N, float(sieve.low[number]))
        if found is not None:
            keep_(change_N, torch.from_numpy(found).to(change_N.device))
    return moved


def masses(piece: Piece, sieve: Sieve) -> list[tuple[float, float]]:
    """Every expert's mass, of its whole change and of what was found of it."""
    if (compiled := _compiled(piece, sieve)) and piece.stored:
        _, base, experts = piece.stored
        made = [_masses(compiled, bits, base, found) for bits, found in zip(experts, _found(sieve, piece), strict=True)]
        if all(math.isfinite(mass) for pair in made for mass in pair):
            return made
    whole = [mass_(change_N) for change_N in changes(piece)]
    return list(zip(whole, map(mass_, sifted(piece, sieve)), strict=True))


def _masses(compiled: Any, bits: np.ndarray, base: np.ndarray, found: np.ndarray | None) -> tuple[float, float]:
    before, after = np.zeros((2, LANES), dtype=np.float32)
    compiled.masses(bits, base, np.ones(bits.size, dtype=bool) if found is None else found, before, after)
    return total(before), total(after)


def votes(piece: Piece, sieve: Sieve, factors: Sequence[float]) -> float:
    """How many entries have a weighted sum above 0, less those below."""
    if compiled := _compiled(piece, sieve):
        return float(compiled.votes(*_given(piece, sieve), np.array(factors, dtype=np.float32)))
    return majority(sifted(piece, sieve), factors)


def fused(
    piece: Piece, sieve: Sieve, factors: Sequence[float], weights: Sequence[float], tie: float | None, normalize: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    """The base with what stays added: `vote.fuse_` of the sifted changes, times a scale."""
    if not (compiled := _compiled(piece, sieve)):
        return add(piece, fuse_(sifted(piece, sieve), factors, weights, tie, normalize), scale)
    out_N = np.empty(piece.seen, dtype=np.float32)
    given, by = _given(piece, sieve), np.array(factors, dtype=np.float32)
    if tie is None:
        divisor = np.float32(sum(weights) if normalize else 1)
        compiled.added(*given, by, divisor, np.float32(scale), out_N.ravel())
        return torch.from_numpy(out_N)
    counted = alike(weights)
    each, unit = ([1.0] * len(weights), weights[0]) if counted else (weights, 1.0)
    compiled.voted(
        *given, by, np.array(each, dtype=np.float32), tie < 0, tie == 0, normalize, np.float32(unit),
        np.float32(scale), out_N.ravel(),
    )  # fmt: skip
    return torch.from_numpy(out_N)


def _compiled(piece: Piece, sieve: Sieve) -> Any:
    """The kernels, if they can take these."""
    rows = any(isinstance(bound, Tensor) for bound in (*(sieve.low or ()), *(sieve.high or ())))
    return kernels() if piece.stored and not rows else None


def _found(sieve: Sieve, piece: Piece) -> Sequence[np.ndarray | None]:
    """One an expert."""
    return sieve.found or [None] * piece.count


def _given(piece: Piece, sieve: Sieve) -> tuple[Any, ...]:
    """A piece and a sieve as kernels take them. What is pointed at must live as long: the caller holds both."""
    assert piece.stored is not None
    _, base, experts = piece.stored
    found = [0 if part is None else address(part) for part in _found(sieve, piece)]
    low = np.array(sieve.low or [0.0] * len(experts), dtype=np.float32)
    high = np.array(sieve.high or [math.inf] * len(experts), dtype=np.float32)
    return base, np.array([address(bits) for bits in experts]), np.array(found), low, high
