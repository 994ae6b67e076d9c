"""MergeLock: a model in secret coordinates: it computes the same, and does not merge with others.

Paper: arXiv 2509.01548.  The paper multiplies queries and keys by any invertible matrix, which is exact
where positions are added to the input (it tests ViT and T5). Under rotary embeddings that changes the
output, so here keys take what commutes with the rotation: one complex number for each pair of entries
that turn together. Values take any matrix of bounded condition, as in the paper. Hidden units of the
feed-forward block and heads change places, which the paper leaves out. Layers in float64, stored in the
model's dtype. Models with QK-norm: queries and keys take quarter turns, nothing else is exact there.
Low-rank attention (DeepSeek) and clipped projections are refused by name.

Footguns: this raises a cost and is no security. Who has the base model undoes it without the key
(`protect.restore`, 10 s of CPU at 135M parameters), and a merge is then as good as before. Whoever loses the
key and the base has lost the way back. Models locked by one key still merge with each other. Storage in
bf16 rounds anew: the outputs move about as much as bf16 arithmetic moves them, more at a higher `condition`.

Shapes: G key-value heads, M query heads that share one, H width of a head, F pairs that turn, U hidden
units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from luthier.checkpoint.heads import AttentionAt, UnitsAt, attention_of, units_of
from luthier.errors import LuthierError
from luthier.fields import Range, thaw
from luthier.flows import Ctx, Group
from luthier.kit.secret import Secret
from luthier.kit.symmetry import Heads, Shuffle, Turn, Units, on_keys, on_values, shuffled, still, swapped, turned
from luthier.shapes import Reduces, Transform

ATTENTION = ("qk", "vo", "heads")
ENTRY = "luthier_lock"
"""in config.json: which key, which parts, which condition; not the key"""


class MergeLock(Transform):
    parts: tuple[Literal["qk", "vo", "mlp", "heads"], ...] = ("qk", "vo", "mlp", "heads")
    """what is locked: queries and keys, values and output, hidden units of the MLP, the places of heads"""
    condition: Annotated[float, Range(1.0, 1e4)] = 10.0
    """the most that a matrix stretches one direction over another; 1 only turns. bf16 wants 10 or less"""
    invert: bool = False
    """unlock, with the key, parts and condition of the lock"""

    roles = ("model", "key")
    takes = 0
    granularity = "group"
    unit = "layer"
    reduces_to = Reduces({"parts": ()}, "base")

    def plan(self, inputs: Any) -> Any:
        secret = inputs.roles.get("key")
        if not isinstance(secret, Secret):
            raise LuthierError("needs a key", where=self.id, do="name a key file: key: PATH")
        for layer in {t.layer for t in inputs.tensors.values() if t.layer is not None} if self.parts else ():
            self._places(inputs.config, {n: t for n, t in inputs.tensors.items() if t.layer == layer})
        entry = {"key": secret.fingerprint, "parts": list(self.parts), "condition": self.condition}
        there = inputs.config.get(ENTRY)
        if not self.invert:
            if there:
                raise LuthierError("is locked already", where=self.id, do="unlock it first: set: {invert: true}")
            return replace(inputs, config={**inputs.config, ENTRY: entry}, notes=(*inputs.notes, *_honest(secret)))
        config = {k: v for k, v in inputs.config.items() if k != ENTRY}
        if there is None:
            note = "Unlocked without a check: config.json names no lock, so a wrong key would not have shown"
            return replace(inputs, config=config, notes=(*inputs.notes, note))
        for name, value in entry.items():
            if thaw(there.get(name)) != value:
                what = f"the model was locked with {name} {there.get(name)!r}, given is {value!r}"
                raise LuthierError(what, where=self.id, do=f"give the {name} of the lock")
        return replace(inputs, config=config)

    def survey(self, inputs: Any, ctx: Ctx) -> tuple[Mapping[str, Any], Secret]:
        return inputs.config, inputs.roles["key"]

    def _places(self, config: Mapping[str, Any], layer: Mapping[str, Any]) -> tuple[AttentionAt | None, list[UnitsAt]]:
        """Where the blocks lie that this lock changes."""
        attention = attention_of(config, layer) if set(self.parts) & set(ATTENTION) else None
        return attention, units_of(config, layer) if "mlp" in self.parts else []

    def transform(self, tensors: Group, ctx: Ctx) -> dict[str, Tensor]:
        config, secret = ctx.survey
        made = {name: piece.base for name, piece in tensors.pieces.items() if piece.base is not None}
        if not tensors.unit:
            return made
        attention, blocks = self._places(config, tensors.pieces)
        if attention:
            heads = attention.read(made)
            turn = self._turn(secret, f"{tensors.layer}", attention, heads)
            made |= attention.write(turned(heads, turn.inverse() if self.invert else turn), made)
        for block in blocks:
            units = block.read(made)
            shuffle = self._shuffle(secret, f"{tensors.layer} {block.label}", units)
            made |= block.write(shuffled(units, shuffle.inverse() if self.invert else shuffle), made)
        return {name: tensor.float() for name, tensor in made.items()}

    def _turn(self, secret: Secret, label: str, at: AttentionAt, heads: Heads) -> Turn:
        """The secret turn of a layer's heads."""
        turn = still(heads)
        if "qk" in self.parts and at.normed:
            swap_F = secret.uniform(f"{label} swap", len(at.pairs_F2)) > 0.5
            sign_GF = (secret.uniform(f"{label} sign", at.groups, len(at.pairs_F2)) - 0.5).sign()
            z_GF = torch.complex(sign_GF * ~swap_F, sign_GF * swap_F)
            turn = on_keys(turn, z_GF, turn.key_GHH, at.pairs_F2)
            turn = replace(turn, gains_H=swapped(swap_F, at.pairs_F2, at.width))
        elif "qk" in self.parts:
            phase_GF = secret.uniform(f"{label} phase", at.groups, len(at.pairs_F2)) * 2 * torch.pi
            z_GF = torch.polar(secret.spread(f"{label} length", self.condition, *phase_GF.shape), phase_GF)
            rest_GHH = torch.eye(at.width, dtype=torch.float64).repeat(at.groups, 1, 1)
            turns = 2 * len(at.pairs_F2)
            rest_GHH[:, turns:, turns:] = self._matrix(secret, f"{label} rest", at.groups, at.width - turns)
            turn = on_keys(turn, z_GF, rest_GHH, at.pairs_F2)
        if "vo" in self.parts:
            turn = on_values(turn, self._matrix(secret, f"{label} value", at.groups, at.width))
        if "heads" in self.parts:
            groups_G = secret.order(f"{label} groups", at.groups)
            members = [secret.order(f"{label} members {g}", at.heads // at.groups) for g in range(at.groups)]
            turn = replace(turn, groups_G=groups_G, members_GM=torch.stack(members))
        return turn

    def _matrix(self, secret: Secret, label: str, count: int, width: int) -> Tensor:
        """Random matrices of at most this condition: a turn, a stretch of every direction, another turn."""
        first, last = (secret.rotation(f"{label} {side}", count, width, width) for side in ("first", "last"))
        return first * secret.spread(f"{label} stretch", self.condition, count, 1, width) @ last

    def _shuffle(self, secret: Secret, label: str, units: Units) -> Shuffle:
        """The secret places and factors of a block's hidden units; without a gate no factor is exact."""
        count = len(units.up_UX)
        scale_U = secret.spread(f"{label} scale", self.condition, count)
        sign_U = (secret.uniform(f"{label} sign", count) - 0.5).sign()
        scale_U = torch.ones_like(scale_U) if units.gate_UX is None else scale_U * sign_U
        return Shuffle(scale_U, secret.order(f"{label} units", count))


def _honest(secret: Secret) -> tuple[str, ...]:
    """What a lock is worth, for the card and the report."""
    return (
        f"Locked with the key {secret.fingerprint}: it computes what it did before, in other coordinates, so that "
        "averaging its weights with those of other models destroys it",
        "What the lock costs an attacker who holds the base model: one run of protect.restore, 10 s of CPU at 135M "
        "parameters, without the key, data or training; a merge is then as good as if there had been no lock",
        "What the lock does not stop: using, tuning, distilling, quantising or pruning the model as it is; merging it "
        "with models of the same key; alignment to any relative whose weights are close to it",
    )
