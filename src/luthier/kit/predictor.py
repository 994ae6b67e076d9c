"""A network that says of every candidate monomial how likely the squares of p need it.

One token a candidate, numbers of the candidate as its embedding, and attention between all candidates with a
bias that is a linear map of what is known of each pair. Nothing tells it the order of the candidates or of the
variables: positions are all 0, and the numbers are counts, degrees and coefficients that no renaming of
variables changes. So it is equivariant by construction, and needs no voting over permutations.

Attention, feed-forward layer and norm are the decoder's own Parts (`block.attention` looking both ways, with
the bias as its mask; `block.dense`; `norm.rms`); embedding, bias and the last map are linear layers.
Shapes: B polynomials, N candidates, F numbers of a candidate, E numbers of a pair, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.kit.gram import keys
from luthier.kit.parts import Pass
from luthier.kit.polynomial import Exponents, Polynomial
from luthier.shapes import Part

TOKEN, PAIR = 12, 5
"""numbers of a candidate and of a pair"""
NEVER = -1e4
"""bias towards padding"""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a network, under the names that Parts read them by."""

    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    intermediate_size: int = 128
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Place:
    """What a Part is told of where it is built."""

    config: Sizes
    layer: int

    def linear(self, n_in: int, n_out: int) -> nn.Module:
        return nn.Linear(n_in, n_out, bias=False)


def parts(place: Any, causal: bool = False) -> dict[str, nn.Module]:
    """Attention, feed-forward layer and their norms of one layer."""
    uses: dict[str, Any] = {
        "norm1": "norm.rms", "mixer": {"use": "block.attention", "set": {"causal": causal}},
        "norm2": "norm.rms", "ffn": "block.dense",
    }  # fmt: skip
    return {name: Part.from_value(use).build(place) for name, use in uses.items()}


def residual(layer: Any, x_BTD: Tensor, at: Pass) -> Tensor:
    """x + mixer(norm(x)), then x + ffn(norm(x))."""
    x_BTD = x_BTD + layer["mixer"](layer["norm1"](x_BTD, at)[0], at)[0]
    return x_BTD + layer["ffn"](layer["norm2"](x_BTD, at)[0], at)[0]


class Network(nn.Module):
    """See the head of this file."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, depth = sizes.hidden_size, sizes.num_hidden_layers
        self.embed = nn.Linear(TOKEN, width)
        self.layers = nn.ModuleList(nn.ModuleDict(parts(Place(sizes, i))) for i in range(depth))
        self.bias = nn.ModuleList(nn.Linear(PAIR, sizes.num_attention_heads) for _ in range(depth))
        self.norm = Part.from_value("norm.rms").build(Place(sizes, depth))
        self.score = nn.Linear(width, 1)

    def forward(self, token_BNF: Tensor, pair_BNNE: Tensor, keep_BN: Tensor) -> Tensor:
        """Logits, (B, N). keep: which candidates are no padding."""
        x_BND = self.embed(token_BNF)
        positions = torch.zeros(keep_BN.shape, dtype=torch.long)
        padding = (~keep_BN)[:, None, None] * NEVER
        for layer, bias in zip(self.layers, self.bias, strict=True):
            both = bias(pair_BNNE).permute(0, 3, 1, 2) + padding
            x_BND = residual(layer, x_BND, Pass(positions_BT=positions, both=both))
        return self.score(self.norm(x_BND)[0])[..., 0]


def features(
    terms_TK: np.ndarray, coefficients_T: np.ndarray, candidates_NK: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N, F) and (N, N, E) in fp32, from exponents and coefficients; K counts variables.

    Of a pair a, b: whether a+b is an exponent of p; that over the number of pairs, in both orders, with this sum;
    the signed root of its coefficient, in units of the largest; its size; 1 over the number of pairs.
    """
    codes, support = keys(candidates_NK.tolist()), keys(terms_TK.tolist())
    order = np.argsort(support)
    sums, place, counts = np.unique(codes[:, None] + codes[None], return_inverse=True, return_counts=True)
    at = order[np.minimum(np.searchsorted(support, sums, sorter=order), len(order) - 1)]
    hit = (support[at] == sums).astype(np.float64)
    size = np.abs(coefficients_T).max() or 1.0
    root = np.sign(coefficients_T) * np.sqrt(np.abs(coefficients_T) / size)
    value, once = hit * root[at], 1.0 / counts
    table = np.stack([hit, hit * once, value, np.abs(value), once], axis=1)
    pair = table[place.reshape(len(codes), len(codes))]
    own = pair[np.arange(len(codes)), np.arange(len(codes))]
    degree = candidates_NK.sum(axis=1) / max(1, terms_TK.sum(axis=1).max() // 2)
    means = pair.mean(axis=1)
    lone = ((pair[..., 4] > 0.4) * (pair[..., 0] - 0.5)).mean(axis=1) * 2  # sums of one pair alone: hit or missed
    spread = (candidates_NK > 0).sum(axis=1) / max(1, candidates_NK.shape[1])
    token = np.column_stack([own[:, [0, 1, 2, 4]], means, degree, lone, spread])
    return token.astype(np.float32), pair.astype(np.float32)


def batch(several: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
    """Features of several polynomials, padded."""
    most = max(len(token) for token, _ in several)
    token_BNF = torch.zeros(len(several), most, TOKEN)
    pair_BNNE = torch.zeros(len(several), most, most, PAIR)
    keep_BN = torch.zeros(len(several), most, dtype=torch.bool)
    for i, (token, pair) in enumerate(several):
        n = len(token)
        token_BNF[i, :n], pair_BNNE[i, :n, :n], keep_BN[i, :n] = torch.from_numpy(token), torch.from_numpy(pair), True
    return token_BNF, pair_BNNE, keep_BN


@torch.no_grad()
def scores(network: Network, p: Polynomial, candidates: Sequence[Exponents]) -> list[float]:
    """The probability of each candidate."""
    if not candidates:
        return []
    terms = np.array(p.support, dtype=np.int64)
    rows = np.array(candidates, dtype=np.int64)
    numbers = np.array([float(c) for _, c in p.terms])
    return torch.sigmoid(network(*batch([features(terms, numbers, rows)])))[0].tolist()


def from_tensors(tensors: Mapping[str, Tensor]) -> Network:
    """The network that these weights are of; its sizes are those of the tensors."""
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    width, inner = tensors["layers.0.ffn.down_proj.weight"].shape
    made = Network(Sizes(width, depth, len(tensors["bias.0.weight"]), inner))
    made.load_state_dict(dict(tensors))
    return made.eval()


@cache
def shipped(name: str) -> Network:
    """The trained network that comes with the package."""
    from safetensors.torch import load_file

    return from_tensors(load_file(Path(__file__).parents[1] / "sos" / f"{name}.safetensors"))
