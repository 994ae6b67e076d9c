"""What a layer's weights may do without a change to what it computes: turns of its heads, shuffles of its units.

Attention sees queries and keys only through their products, values only through what reads them. So
keys may take any matrix that commutes with the rotary embedding, if queries take its dual (the inverse,
transposed): per pair of entries that turn together one complex number, and any matrix among the entries
that do not turn. Values may take any matrix, if the output projection takes its dual. Both are shared by
the query heads that read one key-value head. Heads may change places with their group, and within it.
Behind RMS norms of queries and keys (QK-norm) lengths and gains are fixed: quarter turns remain, with the
two gains of a pair changing places. Hidden units may change places; where a gate multiplies them, `up` may
be scaled by any number that `down` takes back.

Shapes: G key-value heads, M query heads that share one, H width of a head, R its entries that turn, F
pairs of them, X inputs (a bias is one more) or outputs, U hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Attention of a layer, fp64. The output projection is transposed; gains are those of a QK-norm."""

    q_GMHX: Tensor
    k_GHX: Tensor
    v_GHX: Tensor
    o_GMHX: Tensor
    q_gain_GMH: Tensor | None = None
    k_gain_GH: Tensor | None = None
    """one row, where all heads share their gains"""


@dataclass(frozen=True)
class Turn:
    """A change of coordinates: matrices for keys and values with their duals, then new places.

    groups: the key-value head that goes to each place.  members: of the group that goes to each place, the
    query head that goes to each place in it.  gains: the entry that goes to each place of the gains.
    """

    key_GHH: Tensor
    query_GHH: Tensor
    value_GHH: Tensor
    output_GHH: Tensor
    groups_G: Tensor
    members_GM: Tensor
    gains_H: Tensor

    def inverse(self) -> Turn:
        back_G = self.groups_G.argsort()

        def undone(dual_GHH: Tensor) -> Tensor:
            return dual_GHH.transpose(1, 2)[self.groups_G]

        return Turn(
            undone(self.query_GHH), undone(self.key_GHH), undone(self.output_GHH), undone(self.value_GHH),
            back_G, self.members_GM[back_G].argsort(1), self.gains_H.argsort(),
        )  # fmt: skip


@dataclass(frozen=True)
class Units:
    """A feed-forward block, fp64. `down` is transposed; without a gate nothing may be scaled."""

    gate_UX: Tensor | None
    up_UX: Tensor
    down_UX: Tensor


@dataclass(frozen=True)
class Shuffle:
    """A factor for each hidden unit, then new places: the unit that goes to each."""

    scale_U: Tensor
    order_U: Tensor

    def inverse(self) -> Shuffle:
        return Shuffle(1 / self.scale_U[self.order_U], self.order_U.argsort())


def still(heads: Heads) -> Turn:
    """The turn that changes nothing."""
    groups, members, width, _ = heads.q_GMHX.shape
    same_GHH = torch.eye(width, dtype=torch.float64).repeat(groups, 1, 1)
    place = torch.arange(max(groups, members, width))
    return Turn(
        same_GHH, same_GHH, same_GHH, same_GHH,
        place[:groups], place[:members].repeat(groups, 1), place[:width],
    )  # fmt: skip


def turned(heads: Heads, turn: Turn) -> Heads:
    """The heads in other coordinates."""
    g, gm = turn.groups_G, (turn.groups_G[:, None], turn.members_GM)
    q_gain, k_gain = heads.q_gain_GMH, heads.k_gain_GH
    if q_gain is not None and k_gain is not None:
        q_gain, k_gain = q_gain[..., turn.gains_H], k_gain[..., turn.gains_H]
        if k_gain.shape[0] == len(g) and q_gain.shape[:2] == heads.q_GMHX.shape[:2]:
            q_gain, k_gain = q_gain[gm], k_gain[g]
    return Heads(
        (turn.query_GHH[:, None] @ heads.q_GMHX)[gm], (turn.key_GHH @ heads.k_GHX)[g],
        (turn.value_GHH @ heads.v_GHX)[g], (turn.output_GHH[:, None] @ heads.o_GMHX)[gm], q_gain, k_gain,
    )  # fmt: skip


def shuffled(units: Units, shuffle: Shuffle) -> Units:
    """The hidden units at other places."""
    order_U, scale_U1 = shuffle.order_U, shuffle.scale_U[:, None]
    gate_UX = None if units.gate_UX is None else units.gate_UX[order_U]
    return Units(gate_UX, (units.up_UX * scale_U1)[order_U], (units.down_UX / scale_U1)[order_U])


def rotary(z_GF: Tensor, rest_GHH: Tensor, pairs_F2: Tensor) -> Tensor:
    """The matrix of each head that multiplies pair f, as a complex number, by z, and acts as `rest` elsewhere."""
    made_GHH, (i_F, j_F) = rest_GHH.clone(), pairs_F2.T
    turning = torch.cat((i_F, j_F))
    made_GHH[:, turning], made_GHH[:, :, turning] = 0.0, 0.0
    made_GHH[:, i_F, i_F] = made_GHH[:, j_F, j_F] = z_GF.real
    made_GHH[:, j_F, i_F], made_GHH[:, i_F, j_F] = z_GF.imag, -z_GF.imag
    return made_GHH


def on_keys(turn: Turn, z_GF: Tensor, rest_GHH: Tensor, pairs_F2: Tensor) -> Turn:
    """The turn with these complex numbers, and matrices among the entries that do not turn, on the keys."""
    dual_GHH = torch.linalg.inv(rest_GHH).transpose(1, 2)
    key_GHH, query_GHH = rotary(z_GF, rest_GHH, pairs_F2), rotary(1 / z_GF.conj(), dual_GHH, pairs_F2)
    return replace(turn, key_GHH=key_GHH, query_GHH=query_GHH)


def on_values(turn: Turn, value_GHH: Tensor) -> Turn:
    """The turn with these matrices on the values."""
    return replace(turn, value_GHH=value_GHH, output_GHH=torch.linalg.inv(value_GHH).transpose(1, 2))


def swapped(swap_F: Tensor, pairs_F2: Tensor, width: int) -> Tensor:
    """Places of gains whose pairs change places where `swap_F` says so."""
    place_H = torch.arange(width)
    i_F, j_F = pairs_F2[swap_F].T
    place_H[i_F], place_H[j_F] = j_F, i_F
    return place_H
