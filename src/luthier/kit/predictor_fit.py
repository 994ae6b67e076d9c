"""What the network of `kit.predictor` is trained on: planted polynomials, a new one for every place of every step.

A candidate is no token: it is a row of numbers, with a matrix of pairs beside it; `engine.drawn` gives such batches to
the trainer of language models. Everything is keyed by one number; the same key gives the same weights on one machine
with one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kit import gram, lattice
from luthier.kit.planted import STRUCTURES, Planted, Planting, generator, plant
from luthier.kit.polynomial import Polynomial, graded
from luthier.kit.predictor import Network, Sizes, batch, features

SHAPES = (
    *((2, half) for half in (2, 3, 4, 5)), *((3, half) for half in (2, 3, 4, 5)), *((4, half) for half in (2, 3, 4, 5)),
    *((5, half) for half in (2, 3, 4)), *((6, half) for half in (2, 3, 4)), (7, 2), (7, 3), (8, 2), (8, 3),
)  # fmt: skip
"""variables and half degrees, so that all monomials are at most 210"""
LARGEST = 210
PAPER = 0.4
"""share of polynomials drawn as the paper does; the others are coercive"""
ENTRIES, MOST = 160_000, 24
"""pairs of one step, and polynomials at most"""
CANDIDATES = 800
"""that a polynomial of a task may leave; the pairs of these fit into memory"""
Example = tuple[np.ndarray, np.ndarray, np.ndarray]
"""features of candidates and of their pairs, and labels"""
MISSED = 2.0
"""weight of a needed candidate: one that is missing costs another program, one too many only makes it larger"""


@dataclass(frozen=True)
class Fit:
    """How a network is trained: AdamW, a linear rise of the learning rate over the share `warmup`, then a cosine."""

    steps: int
    lr: float = 2e-3
    warmup: float = 0.03
    decay: float = 0.01
    sizes: Sizes = Sizes()

    def of(self, steps: int) -> Fit:
        """The same with another number of steps."""
        return replace(self, steps=steps)


FIT = Fit(steps=4000)
"""as the shipped network was trained"""


@dataclass(frozen=True)
class Training:
    """What `engine.drawn` asks for, of a `predictor.Network`. task: what all polynomials are drawn as."""

    fit: Fit
    key: int
    task: Planting | None = None

    def network(self) -> Network:
        """A network with keyed initial weights."""
        return keyed(lambda: Network(self.fit.sizes), self.key)

    def batch(self, step: int) -> dict[str, Tensor]:
        """Of a step, from 0. token (B, N, F), pair (B, N, N, E), attention_mask (B, N): candidates that are no padding,
        labels (B, N): 1 for the planted ones. All polynomials are of one shape, or of the task."""
        rng = generator(self.key, step)
        several = _mixed(rng) if self.task is None else _of(self.task, rng)
        token, pair, keep = batch([(token, pair) for token, pair, _ in several])
        labels = torch.zeros(keep.shape)
        for i, (*_, label) in enumerate(several):
            labels[i, : len(label)] = torch.from_numpy(label)
        return {"token": token, "pair": pair, "attention_mask": keep, "labels": labels}

    def loss(self, network: Network, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of each candidate, the mean over a polynomial's, then over polynomials."""
        keep_BN = batch["attention_mask"]
        weight = torch.full((), MISSED, device=keep_BN.device)
        logits_BN = network(batch["token"], batch["pair"], keep_BN)
        each_BN = F.binary_cross_entropy_with_logits(logits_BN, batch["labels"], pos_weight=weight, reduction="none")
        return ((each_BN * keep_BN).sum(1) / keep_BN.sum(1)).mean()


def keyed(make: Callable[[], Any], key: int) -> Any:
    """What `make` makes, with keyed initial weights: N(0, 1 / inputs), biases 0, gains as they are."""
    rng = torch.Generator().manual_seed(key)
    with torch.random.fork_rng([]):  # modules draw weights of their own when they are made
        network = make()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.dim() == 2:
                p.normal_(0.0, p.shape[1] ** -0.5, generator=rng)
            elif name.endswith("bias"):
                p.zero_()
    return network


def _mixed(rng: np.random.Generator) -> list[Example]:
    n, half = SHAPES[int(rng.integers(len(SHAPES)))]
    most = math.comb(n + half, half)
    return [example(n, half, rng) for _ in range(max(2, min(MOST, ENTRIES // most**2)))]


def _of(task: Planting, rng: np.random.Generator) -> list[Example]:
    """As many polynomials of one task as a step has room for; what leaves too many candidates is drawn again."""
    several: list[Example] = []
    room = ENTRIES
    for _ in range(2 * MOST):
        made = plant(task, rng)
        p, hidden = made.polynomial, set(made.hidden)
        rows = lattice.possible(p)
        if rows is None or len(rows) > CANDIDATES:
            continue
        terms, coefficients = zip(*p.terms, strict=True)
        label = np.array([row in hidden for row in rows], dtype=np.float32)
        several.append((*features(np.array(terms), np.array(coefficients, dtype=np.float64), np.array(rows)), label))
        room -= len(rows) ** 2
        if len(several) == MOST or (room <= 0 and len(several) > 1):
            break
    if not several:
        what = f"no polynomial of it was found that leaves at most {CANDIDATES} candidates"
        raise LuthierError(what, where=f"n={task.n}, half={task.half}", do="train on another setting")
    return several


def example(n: int, half: int, rng: np.random.Generator) -> Example:
    """Features of a random polynomial of this shape and which candidates are in its planted basis."""
    most = math.comb(n + half, half)
    coercive = bool(rng.random() >= PAPER)
    low = n + 2 if coercive else 3
    size = int(rng.integers(low, max(low + 1, min(40, most // 2))))
    structure = STRUCTURES[int(rng.integers(len(STRUCTURES)))]
    made = plant(Planting(n=n, half=half, size=size, matrix=structure, coercive=coercive), rng)
    rows = candidates(made, coercive, half)
    hidden = set(map(tuple, made.basis.tolist()))
    label = np.array([tuple(row) in hidden for row in rows.tolist()], dtype=np.float32)
    return *features(made.terms, made.coefficients.astype(np.float64), rows), label


def candidates(made: Planted, coercive: bool, half: int) -> np.ndarray:
    """What diagonal consistency leaves; of a coercive polynomial everything."""
    width = made.terms.shape[1]
    if coercive:
        return np.array(graded(gram.up_to(width, half)), dtype=np.int64)
    points = made.terms[(made.terms % 2 == 0).all(axis=1)] // 2
    inside = lattice.hull(points)
    assert inside is not None  # at most LARGEST monomials lie in the box
    rows = graded(map(tuple, inside.tolist()))
    support = Polynomial(("",) * width, tuple((tuple(row), Fraction(1)) for row in made.terms.tolist()))
    return np.array(gram.consistent(support, rows), dtype=np.int64)
