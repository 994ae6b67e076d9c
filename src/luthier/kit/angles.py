"""Inner products of stretches of tensors, from which norms and angles follow.

Products are summed in fp64, within stretches whose bounds depend on nothing but the shape, and stretches
in the canonical order: so the sums are the same bits for any number of threads and any memory.
E: vectors.  R: rows.  C: columns.  N: entries of a flat stretch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.flows import Piece

LANE = 1024
"""Entries of a flat stretch that one inner product takes."""
LANES = 64
"""So many at once, as they are wider than what they are made of."""


def gram(vectors_RC: Sequence[Tensor]) -> Tensor:
    """The inner products of every two of E vectors within each row: (R, E, E), fp64."""
    first_RC = vectors_RC[0]
    rows_REC = first_RC.new_empty((len(first_RC), len(vectors_RC), first_RC.shape[1]), dtype=torch.float64)
    for place, vector_RC in enumerate(vectors_RC):
        rows_REC[:, place] = vector_RC
    return rows_REC @ rows_REC.mT


def flat_gram(vectors_N: Sequence[Tensor]) -> Tensor:
    """The inner products of every two of E vectors of any one shape: (E, E), fp64."""
    flat_N, parts = [vector_N.reshape(-1) for vector_N in vectors_N], []
    for start in range(0, len(flat_N[0]), LANES * LANE):
        some_N = [v_N[start : start + LANES * LANE] for v_N in flat_N]
        short = -len(some_N[0]) % LANE
        parts.append(gram([torch.nn.functional.pad(v_N, (0, short)).view(-1, LANE) for v_N in some_N]))
    return torch.cat(parts).sum(0).cpu()


def grams(inputs: Any, vectors: Callable[[Piece], Sequence[Tensor]]) -> dict[str, Tensor]:
    """`flat_gram` of what `vectors` makes of each tensor, by name, in one pass over all pieces.

    inputs: what a Transform's `survey` is given.
    """
    found: dict[str, Tensor] = {}
    room_NEE = torch.empty(0)  # one block: small ones that stay, between large ones that go, would scatter the heap
    for name, part_EE in inputs.each(lambda piece: (piece.name, flat_gram(vectors(piece)))):
        if not found:
            room_NEE = part_EE.new_zeros(len(inputs.tensors), *part_EE.shape)
        if name not in found:
            found[name] = room_NEE[len(found)]
        found[name] += part_EE
    return found


def cosines(gram_EE: Tensor) -> Tensor:
    """The cosines of all angles, (..., E, E); 0 where a vector has no length, as if at right angles."""
    squares_E = gram_EE.diagonal(dim1=-2, dim2=-1)
    return cosine(gram_EE, squares_E.unsqueeze(-1), squares_E.unsqueeze(-2))


def cosine(product: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """From inner products and the squares of both lengths; 0 where a vector has none."""
    lengths = (one * other).sqrt()
    return torch.where(lengths > 0, product / lengths, 0.0).clamp(-1.0, 1.0)


def along_arc(cosine: float, share: float) -> tuple[float, float]:
    """Factors of two vectors at this angle whose combination lies at `share` of the way from one to the other."""
    angle = math.acos(cosine)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)
