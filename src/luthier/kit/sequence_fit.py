"""Trains the network of `kit.sequence` on planted polynomials: teacher forcing, cross-entropy of every exponent.

Smaller than the published task, which takes a network of 90 million weights and 990,000 polynomials for each of its
hundred settings: 2 to 6 variables, half degrees 2 and 3, up to 14 monomials, both kinds of polynomials of
`kit.predictor_fit`, in one network.
Shapes: as in `kit.sequence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kit.planted import STRUCTURES, Planted, Planting, generator, plant
from luthier.kit.predictor import Sizes
from luthier.kit.predictor_fit import PAPER, Fit, Told, descended, keyed, silent
from luthier.kit.sequence import EXPONENTS, HEADS, VARIABLES, Sequence2Basis, source

SHAPES = tuple((n, half) for n in range(2, 7) for half in (2, 3))
MOST, BATCH = 14, 24
"""monomials of a basis, about, and polynomials of a step"""
PAIRS = 4_000_000
"""pairs of terms that attention looks at in one step of a task, about"""
FIT = Fit(steps=2000, lr=1e-3, sizes=Sizes(96, 3, HEADS, 256))


def fitted(fit: Fit, key: int, told: Told = silent, task: Planting | None = None) -> dict[str, Tensor]:
    """Trained weights by name. task: what all polynomials are drawn as.

    Raises LuthierError for a task of more variables or higher exponents than the network reads.
    """
    if task and (task.n > VARIABLES or 2 * task.half >= EXPONENTS):
        what = f"the form sequence reads {VARIABLES} variables and exponents up to {EXPONENTS - 1}"
        raise LuthierError(what, where=f"n={task.n}, degree {2 * task.half}", do="take form: candidates")
    network = keyed(lambda: Sequence2Basis(fit.sizes), key)
    return descended(network, batches(key, fit.steps, task), loss_of, fit, told)


def loss_of(network: Sequence2Basis, inputs: Mapping[str, Tensor], target_BTK: Tensor) -> Tensor:
    """Cross-entropy of the exponents and of the end, the mean over the monomials that are to be written."""
    memory_BSD = network.read(inputs["rows"], inputs["values"], inputs["keep"])
    exponents, ends_BT = network.written(memory_BSD, inputs["keep"], target_BTK)
    lengths_B = inputs["lengths"]
    places = torch.arange(target_BTK.shape[1] + 1)[None]
    inside_BT, last_BT = places < lengths_B[:, None], places == lengths_B[:, None]
    each_BTK = F.cross_entropy(exponents[:, :-1].reshape(-1, EXPONENTS), target_BTK.reshape(-1), reduction="none")
    wrong = (each_BTK.reshape(target_BTK.shape).sum(-1) * inside_BT[:, :-1]).sum()
    stop = F.binary_cross_entropy_with_logits(ends_BT, last_BT.float(), reduction="none")
    return (wrong + (stop * (inside_BT | last_BT)).sum()) / (inside_BT | last_BT).sum()


def batches(key: int, steps: int, task: Planting | None = None) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Inputs and the basis to be written, step by step; polynomials of one step have as many variables."""
    for step in range(steps):
        rng = generator(key, step)
        if task:
            number = max(2, min(BATCH, PAIRS // (task.size**2 // 2) ** 2))  # a basis of m gives about m^2 / 2 terms
            yield joined([written(plant(task, rng)) for _ in range(number)])
        else:
            n, half = SHAPES[int(rng.integers(len(SHAPES)))]
            yield joined([example(n, half, rng) for _ in range(BATCH)])


def joined(several: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Terms, coefficients and bases, padded."""
    pad = torch.nn.utils.rnn.pad_sequence
    rows, values, targets = (pad(list(column), batch_first=True) for column in zip(*several, strict=True))
    counts = torch.tensor([len(v) for _, v, _ in several])
    keep = torch.arange(values.shape[1])[None] < counts[:, None]
    lengths = torch.tensor([len(t) for *_, t in several])
    return {"rows": rows, "values": values, "keep": keep, "lengths": lengths}, targets


def example(n: int, half: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, coefficients and planted basis of a random polynomial, in lexicographic order."""
    coercive = bool(rng.random() >= PAPER)
    size = int(rng.integers(n + 1 if coercive else 3, MOST + 1))
    structure = STRUCTURES[int(rng.integers(len(STRUCTURES)))]
    return written(plant(Planting(n=n, half=half, size=size, matrix=structure, coercive=coercive), rng))


def written(made: Planted) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a planted polynomial."""
    target = np.zeros((len(made.basis), VARIABLES), dtype=np.int64)
    target[:, : made.basis.shape[1]] = made.basis[np.lexsort(made.basis.T[::-1])[::-1]]
    return *source(made.terms, made.coefficients.astype(np.float64)), torch.from_numpy(target)
