"""Slices: layers picked from the models before a merge sees them, one stretch after another.

A slice names models and a stretch of layers of each, all of one length: layer 0 of the slice is made from
the first of every stretch, and so on. What stands before the layers comes from the models of the first
slice, what stands after them from those of the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.checkpoint.layers import Stack, restacked
from luthier.engine.pieces import Inputs, Read
from luthier.errors import LuthierError

Slice = Sequence[tuple[int | None, int, int]]
"""Of each model (an expert's index, None for the base) the first layer and the one past the last."""


def sliced(inputs: Inputs, slices: Sequence[Slice], method: Any) -> Inputs:
    """The inputs of a merge whose layers are those of `slices`, one after another.

    Raises LuthierError for layers a model does not have, stretches of different lengths, a slice without the
    base where the method needs one, and one without all experts where the method must see them together.
    """
    models = {n: Stack(source) for n, source in [*enumerate(inputs.experts), (None, inputs.base)] if source}
    for number, piece in enumerate(slices):
        _check(number, piece, models, method)
    home = models[None if inputs.base else 0]
    made: dict[str, list[Read]] = {}
    kept: list[tuple[Stack, int]] = []  # the layers of the first model of each slice
    for piece in slices:
        lead, first, past = piece[0]
        for layer in range(first, past):
            for rest in models[lead].layers[layer]:
                made[home.name(len(kept), rest)] = [
                    (m, models[m].name(layer - first + start, rest)) for m, start, _ in piece
                ]
            kept.append((models[lead], layer))
    outside: dict[str, list[Read]] = {}
    for before, piece in ((True, slices[0]), (False, slices[-1])):
        for info in models[piece[0][0]].outside:
            if info.role.startswith("embed") == before:
                outside[info.name] = [(m, info.name) for m, _, _ in piece]
    ends = {role: {m: next((i for i in models[m].outside if i.role == role), None) for m in models}
            for role in ("embed", "head")}  # fmt: skip
    head = _head(ends, slices)
    tied = any(ends["head"][m] is None for piece in (slices[0], slices[-1]) for m, _, _ in piece)
    told = {"tie_word_embeddings": False} if head and tied else {}
    return inputs.giving(outside | head | made, restacked(home, kept) | told)


def _head(ends: Mapping[str, Mapping[int | None, Any]], slices: Sequence[Slice]) -> dict[str, list[Read]]:
    """The head, where one of the models at either end has its own: of the others it is their embedding."""
    found = [(m, ends["head"][m] or ends["embed"][m]) for m, _, _ in slices[-1]]
    own = next((h for piece in (slices[-1], slices[0]) for m, _, _ in piece if (h := ends["head"][m])), None)
    first, last = ends["embed"][slices[0][0][0]], found[0][1]
    if first and last and first.shape != last.shape:
        what = f"a head of {list(last.shape)} after an embedding of {list(first.shape)}"
        raise LuthierError(what, where=f"slices[{len(slices) - 1}]", do="set tokenizer: base, union or a model's name")
    return {own.name: [(m, info.name) for m, info in found if info]} if own else {}


def _check(number: int, piece: Slice, models: Mapping[int | None, Stack], method: Any) -> None:
    where = f"slices[{number}]"
    named = [m for m, _, _ in piece]
    lengths = {past - first for _, first, past in piece}
    if len(lengths) > 1:
        raise LuthierError(f"the stretches have different lengths: {sorted(lengths)}", where=where)
    for model, first, past in piece:
        count = len(models[model].layers)
        if not 0 <= first < past <= count:
            raise LuthierError(f"layers [{first}, {past}] of a model that has {count}", where=where,
                               do=f"give [FIRST, PAST THE LAST] within [0, {count}]")  # fmt: skip
    if "base" in method.roles and None not in named:
        raise LuthierError("lacks the base", where=where, do=f"{method.id} needs it in every slice")
    if all(m is None for m in named):
        raise LuthierError("names no expert", where=where, do="there is nothing to merge in it")
    experts = sum(m is not None for m in models)
    if len([m for m in named if m is not None]) < experts and not method.partial:
        what = f"names {len(named) - (None in named)} of {experts} experts"
        raise LuthierError(what, where=where, do=f"{method.id} must see all of them together")
