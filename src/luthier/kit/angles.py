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


def gram(vectors_RC: Sequence[Tensor]) -> Tensor:
    """The inner products of every two of E vectors within each row: (R, E, E), fp64."""
    rows_REC = torch.stack(tuple(vectors_RC), dim=1).double()
    return rows_REC @ rows_REC.mT


def flat_gram(vectors_N: Sequence[Tensor]) -> Tensor:
    """The inner products of every two of E vectors of any one shape: (E, E), fp64."""
    flat_N = [vector_N.reshape(-1) for vector_N in vectors_N]
    short = -flat_N[0].numel() % LANE
    return gram([torch.nn.functional.pad(v_N, (0, short)).view(-1, LANE) for v_N in flat_N]).sum(0).cpu()


def grams(inputs: Any, vectors: Callable[[Piece], Sequence[Tensor]]) -> dict[str, Tensor]:
    """`flat_gram` of what `vectors` makes of each tensor, by name, in one pass over all pieces.

    inputs: what a Transform's `survey` is given.
    """
    found: dict[str, Tensor] = {}
    for name, part_EE in inputs.each(lambda piece: (piece.name, flat_gram(vectors(piece)))):
        found[name] = found[name] + part_EE if name in found else part_EE
    return found


def cosines(gram_EE: Tensor) -> Tensor:
    """The cosines of all angles, (..., E, E); 0 where a vector has no length, as if at right angles."""
    squares_E = gram_EE.diagonal(dim1=-2, dim2=-1)
    lengths_EE = (squares_E.unsqueeze(-1) * squares_E.unsqueeze(-2)).sqrt()
    return torch.where(lengths_EE > 0, gram_EE / lengths_EE, 0.0).clamp(-1.0, 1.0)


def along_arc(cosine: float, share: float) -> tuple[float, float]:
    """Factors of two vectors at this angle whose combination lies at `share` of the way from one to the other."""
    angle = math.acos(cosine)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)
