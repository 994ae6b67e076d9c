"""Restore: an expert back in the coordinates of its base, by matching weights: it undoes locks, and aligns relatives.

Paper: arXiv 2606.30360.  What an expert changed is small beside the base, so the base shows which coordinates
the expert is in, without key or data: heads and hidden units are matched one to one by likeness
(Hungarian), and least squares of the expert's weights on the base's give the matrix of each key-value
head, one complex number for each pair of a key that turns together, and the factor of each hidden unit.
The expert computes the same before and after. Orthogonal Procrustes, which MergeLock's authors tried
and found wanting, finds turns only: it fails where lengths were changed.

Footguns: a fit takes a little of what the expert learnt for a change of coordinates, so a part is left as
it is unless that divides its squared distance to the base by `gain`, and a block where the fit of one side (keys)
takes the other (queries) further away than both were. The base must be the one the expert
comes from: two models trained apart are no nearer afterwards than heads and units can bring them.

Shapes: G key-value heads, M query heads that share one, H width of a head, F pairs that turn, X inputs or
outputs, U hidden units, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from luthier.checkpoint.heads import AttentionAt, attention_of, units_of
from luthier.fields import Range
from luthier.flows import Ctx, Group
from luthier.kit.assign import assigned, cosines
from luthier.kit.symmetry import Heads, Shuffle, Turn, Units, on_keys, on_values, shuffled, still, swapped, turned
from luthier.shapes import Reduces, Transform


class Restore(Transform):
    parts: tuple[Literal["qk", "vo", "mlp", "heads"], ...] = ("qk", "vo", "mlp", "heads")
    """what is aligned: queries and keys, values and output, hidden units of the MLP, the places of heads"""
    fit: Literal["least_squares", "procrustes"] = "least_squares"
    """least squares finds turns and lengths; procrustes finds turns only"""
    match: bool = True
    """look for heads and hidden units at other places; false takes each for the one at its own place"""
    gain: Annotated[float, Range(1.0)] = 2.0
    """a part is left as it is unless its squared distance to the base falls by this factor at least, to that share
    of its squared length or less"""

    takes = 1
    granularity = "group"
    unit = "layer"
    reduces_to = Reduces({"parts": ()}, "identity", given={"experts": 1})

    def plan(self, inputs: Any) -> Any:
        for layer in {t.layer for t in inputs.tensors.values() if t.layer is not None}:
            self._places(inputs.config, {n: t for n, t in inputs.tensors.items() if t.layer == layer})
        return inputs

    def survey(self, inputs: Any, ctx: Ctx) -> Mapping[str, Any]:
        return inputs.config

    def _places(self, config: Mapping[str, Any], layer: Mapping[str, Any]) -> tuple[AttentionAt | None, list[Any]]:
        """Where the blocks lie that are aligned."""
        attention = attention_of(config, layer) if {"qk", "vo", "heads"} & set(self.parts) else None
        return attention, units_of(config, layer) if "mlp" in self.parts else []

    def transform(self, tensors: Group, ctx: Ctx) -> dict[str, Tensor]:
        base = {name: piece.base for name, piece in tensors.pieces.items() if piece.base is not None}
        made = {name: piece.experts[0] for name, piece in tensors.pieces.items()}
        if not tensors.unit:
            return made
        attention, blocks = self._places(ctx.survey, tensors.pieces)
        if attention:
            made |= attention.write(self._aligned(attention, attention.read(base), attention.read(made)), made)
        for block in blocks:
            made |= block.write(self._sorted(block.read(base), block.read(made)), made)
        return {name: tensor.float() for name, tensor in made.items()}

    def _aligned(self, at: AttentionAt, base: Heads, heads: Heads) -> Heads:
        """The heads in the base's coordinates: groups first, then what turned each, then the heads in each."""
        search, given = self.match and "heads" in self.parts, heads
        if search and at.groups > 1:
            alike_GG = _kinship(at, base, heads)
            heads = turned(heads, replace(still(heads), groups_G=assigned(lambda rows: alike_GG[rows], at.groups)))
        turn = still(heads)
        if "qk" in self.parts:
            turn = self._keys(at, turn, base.k_GHX, heads.k_GHX)
        if "vo" in self.parts:
            fits = [self._matrix(b_HX, e_HX) for b_HX, e_HX in zip(base.v_GHX, heads.v_GHX, strict=True)]
            turn = on_values(turn, torch.stack(fits))
        heads = turned(heads, turn.inverse())
        if search and at.heads > at.groups:
            members = [self._members(base, heads, group) for group in range(at.groups)]
            heads = turned(heads, replace(still(heads), members_GM=torch.stack(members)))
        return heads if _heads_far(base, heads) <= _heads_far(base, given) else given

    def _keys(self, at: AttentionAt, turn: Turn, base_GHX: Tensor, expert_GHX: Tensor) -> Turn:
        """What turned the keys: complex numbers for pairs, a matrix for the entries that do not turn."""
        dot_GF, length_GF = _products(at.pairs_F2, base_GHX, expert_GHX)
        z_GF = torch.where((dot_GF != 0) & (length_GF != 0), dot_GF / length_GF, 1.0)
        if at.normed:  # quarter turns, which all heads share up to the sign
            swap_F = (z_GF.imag.abs() - z_GF.real.abs()).sum(0) > 0
            z_GF = torch.complex(z_GF.real.sign() * ~swap_F, z_GF.imag.sign() * swap_F)
            made = on_keys(turn, z_GF, turn.key_GHH, at.pairs_F2)
            better = self._better(base_GHX, expert_GHX, made.key_GHH, 0)
            return replace(made, gains_H=swapped(swap_F, at.pairs_F2, at.width)) if better else turn
        if self.fit == "procrustes":
            z_GF = z_GF / z_GF.abs()
        rest_GHH, turns = turn.key_GHH.clone(), 2 * len(at.pairs_F2)
        pairs = zip(base_GHX[:, turns:], expert_GHX[:, turns:], strict=True)
        rest_GHH[:, turns:, turns:] = torch.stack([self._matrix(b_NX, e_NX) for b_NX, e_NX in pairs])
        made = on_keys(turn, z_GF, rest_GHH, at.pairs_F2)
        kept = [self._better(b, e, m, 1) for b, e, m in zip(base_GHX, expert_GHX, made.key_GHH, strict=True)]
        kept_G11 = torch.tensor(kept)[:, None, None]
        return replace(
            turn, key_GHH=torch.where(kept_G11, made.key_GHH, turn.key_GHH),
            query_GHH=torch.where(kept_G11, made.query_GHH, turn.query_GHH),
        )  # fmt: skip

    def _matrix(self, base_NX: Tensor, expert_NX: Tensor) -> Tensor:
        """What turned the base's rows into the expert's; the identity, if that is as good."""
        if self.fit == "procrustes":
            u_NN, _, v_NN = torch.linalg.svd(expert_NX @ base_NX.T)
            found_NN, free = u_NN @ v_NN, len(base_NX) / 2
        else:
            found_NN, free = torch.linalg.lstsq(base_NX.T, expert_NX.T, driver="gelsd").solution.T, len(base_NX)
        same_NN = torch.eye(len(base_NX), dtype=torch.float64)
        whole = torch.linalg.matrix_rank(found_NN) == len(found_NN)
        return found_NN if whole and self._better(base_NX, expert_NX, found_NN, free) else same_NN

    def _better(self, base: Tensor, expert: Tensor, matrix: Tensor, free: float) -> bool:
        """Whether a change of coordinates leaves little of the expert unexplained, beside what no change leaves, or
        no base at all: strangers do not count. `free` numbers for each row explain as many inputs of anything."""
        inputs = base.shape[-1]
        left = (expert - matrix @ base).square().sum() * self.gain * inputs
        there = torch.minimum((expert - base).square().sum(), expert.square().sum())
        return bool(there * max(0.0, inputs - free) > left)

    def _members(self, base: Heads, heads: Heads, group: int) -> Tensor:
        """Which query head of a group stands for each of the base's."""
        alike_MM = sum(cosines(b[group].flatten(1), e[group].flatten(1))
                       for b, e in ((base.q_GMHX, heads.q_GMHX), (base.o_GMHX, heads.o_GMHX)))  # fmt: skip
        return assigned(lambda rows: alike_MM[rows], len(alike_MM))  # type: ignore[index, arg-type]

    def _sorted(self, base: Units, units: Units) -> Units:
        """The hidden units at the base's places, with its lengths."""
        if self.match:
            order_U = assigned(lambda rows: _likeness(base, units, rows), len(base.up_UX))
            units = shuffled(units, Shuffle(torch.ones(len(order_U), dtype=torch.float64), order_U))
        if base.gate_UX is None:
            return units
        scale_U = (base.up_UX * units.up_UX).sum(1) / base.up_UX.square().sum(1)
        if self.fit == "procrustes":
            scale_U = scale_U.sign()
        scale_U = torch.where(scale_U.isfinite() & (scale_U != 0), scale_U, 1.0)
        made = shuffled(units, Shuffle(1 / scale_U, torch.arange(len(scale_U))))
        nearer = _units_far(base, made) <= _units_far(base, units)
        return made if nearer and _apart(base, units) > self.gain * _apart(base, made) else units


def _far(*pairs: tuple[Tensor, Tensor]) -> float:
    """Squared distance of all together: what a fit wins on one side of a product it may lose on the other."""
    return math.fsum(float((base - expert).square().sum()) for base, expert in pairs)


def _heads_far(base: Heads, heads: Heads) -> float:
    return _far((base.q_GMHX, heads.q_GMHX), (base.k_GHX, heads.k_GHX),
                (base.v_GHX, heads.v_GHX), (base.o_GMHX, heads.o_GMHX))  # fmt: skip


def _units_far(base: Units, units: Units) -> float:
    return _far((base.up_UX, units.up_UX), (base.down_UX, units.down_UX))


def _products(pairs_F2: Tensor, base_GHX: Tensor, expert_GHX: Tensor) -> tuple[Tensor, Tensor]:
    """Of every pair of rows, as complex numbers: the base's product with the expert's, and with itself."""
    base_GFX, expert_GFX = (torch.complex(t[..., pairs_F2[:, 0], :], t[..., pairs_F2[:, 1], :])
                            for t in (base_GHX, expert_GHX))  # fmt: skip
    return (base_GFX.conj() * expert_GFX).sum(-1), base_GFX.abs().square().sum(-1)


def _kinship(at: AttentionAt, base: Heads, heads: Heads) -> Tensor:
    """How alike the base's key-value heads are to the expert's, whatever has turned them: rows the base's."""
    turns = 2 * len(at.pairs_F2)
    alike_GG = _overlap(base.v_GHX, heads.v_GHX)
    if turns < at.width:
        alike_GG = alike_GG + _overlap(base.k_GHX[:, turns:], heads.k_GHX[:, turns:])
    if turns:
        dot_GGF, base_GGF = _products(at.pairs_F2, base.k_GHX[:, None], heads.k_GHX[None])
        other_GF = _products(at.pairs_F2, heads.k_GHX, heads.k_GHX)[1]
        alike_GG = alike_GG + (dot_GGF.abs().square() / (base_GGF * other_GF).clamp(min=1e-300)).mean(-1)
    return alike_GG


def _overlap(base_GHX: Tensor, expert_GHX: Tensor) -> Tensor:
    """The share that the spaces of rows of every two heads have in common."""
    base_GXH, expert_GXH = (torch.linalg.qr(t.transpose(1, 2)).Q for t in (base_GHX, expert_GHX))
    return torch.einsum("gxh,kxj->gkhj", base_GXH, expert_GXH).square().sum((2, 3)) / base_GHX.shape[1]


def _likeness(base: Units, units: Units, rows: slice) -> Tensor:
    """How alike some of the base's hidden units are to all of the expert's; lengths and signs of `up` are free."""
    if base.gate_UX is None or units.gate_UX is None:
        return cosines(base.up_UX[rows], units.up_UX) + cosines(base.down_UX[rows], units.down_UX)
    up, down = cosines(base.up_UX[rows], units.up_UX), cosines(base.down_UX[rows], units.down_UX)
    return cosines(base.gate_UX[rows], units.gate_UX) + up.abs() + down.abs()


def _apart(base: Units, units: Units) -> float:
    """Squared distance of up and down, each relative to the base's length."""
    pairs = ((base.up_UX, units.up_UX), (base.down_UX, units.down_UX))
    return math.fsum(float((b - u).square().sum() / b.square().sum()) for b, u in pairs)
