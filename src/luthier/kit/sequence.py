"""The published form of the predictor: an encoder reads p's terms, a decoder writes the basis, monomial by monomial.

Paper: arXiv 2510.13444, with the monomial embedding of Kera et al. One position is one monomial: the sum of an
embedding for each variable with its exponent and of a small network of the coefficient. The decoder's state is
mapped to one choice of an exponent for each variable, and to whether the basis ends; decoding is greedy. Terms and
basis stand in lexicographic order.

Ours in the details: layers are the decoder's own Parts, with rotary in place of learned positions; a decoder layer
looks at the encoder's states and at what is written so far in one attention, not in two; coefficients are signed
roots in units of the largest. It depends on the order of the variables, as the published one does.
Shapes: B polynomials, S terms, T monomials of the basis, K variables, D width, V exponents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.kit.parts import Pass
from luthier.kit.polynomial import Exponents, Polynomial
from luthier.kit.predictor import NEVER, Place, Sizes, parts, residual
from luthier.shapes import Part

VARIABLES, EXPONENTS = 8, 17
"""at most, from 0"""
HEADS = 8
"""of every network of this form: the weights do not tell"""
LONGEST = 80
"""monomials that are written at most"""


class Sequence2Basis(nn.Module):
    """See the head of this file."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, depth = sizes.hidden_size, sizes.num_hidden_layers
        self.monomial = nn.Embedding(VARIABLES * EXPONENTS, width)
        self.coefficient = nn.Sequential(nn.Linear(1, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.start = nn.Embedding(1, width)
        self.encoder = nn.ModuleList(nn.ModuleDict(parts(Place(sizes, i))) for i in range(depth))
        self.decoder = nn.ModuleList(nn.ModuleDict(parts(Place(sizes, i))) for i in range(depth))
        self.norm = Part.from_value("norm.rms").build(Place(sizes, depth))
        self.exponents = nn.Linear(width, VARIABLES * EXPONENTS)
        self.ends = nn.Linear(width, 1)

    def embedded(self, rows_BSK: Tensor) -> Tensor:
        """The sum of the embeddings of (variable, exponent)."""
        places = torch.arange(VARIABLES) * EXPONENTS
        return self.monomial(rows_BSK + places).sum(dim=-2)

    def read(self, rows_BSK: Tensor, values_BS: Tensor, keep_BS: Tensor) -> Tensor:
        """The encoder's states, (B, S, D)."""
        x_BSD = self.embedded(rows_BSK) + self.coefficient(values_BS[..., None])
        positions = torch.arange(x_BSD.shape[1])[None]
        at = Pass(positions_BT=positions, both=((~keep_BS) * NEVER)[:, None, None])
        for layer in self.encoder:
            x_BSD = residual(layer, x_BSD, at)
        return x_BSD

    def written(self, memory_BSD: Tensor, keep_BS: Tensor, rows_BTK: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the next monomial's exponents, (B, T+1, K, V), and of the end, after each of those written."""
        seen, count = memory_BSD.shape[1], rows_BTK.shape[1] + 1
        start_B1D = self.start.weight[None].expand(len(rows_BTK), -1, -1)
        x_BTD = torch.cat([start_B1D, self.embedded(rows_BTK)], dim=1)
        allowed = torch.ones(seen + count, seen + count, dtype=torch.bool).tril()
        allowed[:, :seen] = True
        mask = torch.where(allowed, 0.0, NEVER)[None, None].repeat(len(x_BTD), 1, 1, 1)
        mask[..., :seen] += ((~keep_BS) * NEVER)[:, None, None]
        positions = torch.cat([torch.arange(seen), torch.arange(count)])[None]
        at = Pass(positions_BT=positions, both=mask)
        for layer in self.decoder:
            layer: Any
            joined = layer["norm1"](torch.cat([memory_BSD, x_BTD], dim=1), at)[0]
            x_BTD = x_BTD + layer["mixer"](joined, at)[0][:, seen:]
            x_BTD = x_BTD + layer["ffn"](layer["norm2"](x_BTD, at)[0], at)[0]
        x_BTD = self.norm(x_BTD, at)[0]
        return self.exponents(x_BTD).unflatten(-1, (VARIABLES, EXPONENTS)), self.ends(x_BTD)[..., 0]


def source(p_terms: np.ndarray, coefficients: np.ndarray) -> tuple[Tensor, Tensor]:
    """Terms in lexicographic order, padded to VARIABLES columns, and their coefficients' signed roots."""
    order = np.lexsort(p_terms.T[::-1])[::-1]
    rows = np.zeros((len(p_terms), VARIABLES), dtype=np.int64)
    rows[:, : p_terms.shape[1]] = p_terms[order]
    size = np.abs(coefficients).max() or 1.0
    values = np.sign(coefficients) * np.sqrt(np.abs(coefficients) / size)
    return torch.from_numpy(rows), torch.from_numpy(values[order].astype(np.float32))


def fits(p: Polynomial) -> bool:
    """Whether the network has embeddings for this polynomial."""
    return len(p.variables) <= VARIABLES and all(max(m, default=0) < EXPONENTS for m in p.support)


@torch.no_grad()
def greedy(network: Sequence2Basis, p: Polynomial) -> list[Exponents]:
    """The basis that the network writes, the likeliest exponent at a time; what it repeats stands once."""
    terms = np.array(p.support, dtype=np.int64)
    rows_SK, values_S = source(terms, np.array([float(c) for _, c in p.terms]))
    keep_BS = torch.ones(1, len(rows_SK), dtype=torch.bool)
    memory_BSD = network.read(rows_SK[None], values_S[None], keep_BS)
    written = torch.zeros(1, 0, VARIABLES, dtype=torch.long)
    for _ in range(LONGEST):
        exponents, ends = network.written(memory_BSD, keep_BS, written)
        if ends[0, -1] > 0:
            break
        written = torch.cat([written, exponents[:, -1:].argmax(dim=-1)], dim=1)
    return list(dict.fromkeys(tuple(row[: terms.shape[1]]) for row in written[0].tolist()))


def votes(network: Sequence2Basis, p: Polynomial, orders: Sequence[Sequence[int]]) -> list[list[Exponents]]:
    """What the network writes under each renaming of the variables, named back."""
    found = []
    for order in orders:
        moved = Polynomial(p.variables, tuple((tuple(e[i] for i in order), c) for e, c in p.terms))
        back = {i: place for place, i in enumerate(order)}
        found.append([tuple(a[back[i]] for i in range(len(order))) for a in greedy(network, moved)])
    return found


def from_tensors(tensors: Mapping[str, Tensor]) -> Sequence2Basis:
    """The network that these weights are of."""
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("encoder."))
    width, inner = tensors["encoder.0.ffn.down_proj.weight"].shape
    made = Sequence2Basis(Sizes(width, depth, HEADS, inner))
    made.load_state_dict(dict(tensors))
    return made.eval()
