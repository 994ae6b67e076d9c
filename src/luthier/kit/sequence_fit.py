"""What the network of `kit.sequence` is trained on: teacher forcing, cross-entropy of every exponent.

Smaller than the published task, which takes a network of 90 million weights and 990,000 polynomials for each of its
hundred settings: 2 to 6 variables, half degrees 2 and 3, up to 14 monomials, both kinds of polynomials of
`kit.predictor_fit`, in one network.
Shapes: as in `kit.sequence`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kit.planted import STRUCTURES, Planted, Planting, generator, plant
from luthier.kit.predictor import Sizes
from luthier.kit.predictor_fit import PAPER, Fit, keyed
from luthier.kit.sequence import EXPONENTS, HEADS, VARIABLES, Sequence2Basis, source

SHAPES = tuple((n, half) for n in range(2, 7) for half in (2, 3))
MOST, BATCH = 14, 24
"""monomials of a basis, about, and polynomials of a step"""
PAIRS = 4_000_000
"""pairs of terms that attention looks at in one step of a task, about"""
FIT = Fit(steps=2000, lr=1e-3, sizes=Sizes(96, 3, HEADS, 256))


@dataclass(frozen=True)
class Training:
    """What `engine.drawn` asks for, of a `Sequence2Basis`. task: what all polynomials are drawn as.

    Raises LuthierError for a task of more variables or higher exponents than the network reads.
    """

    fit: Fit
    key: int
    task: Planting | None = None

    def __post_init__(self) -> None:
        task = self.task
        if task and (task.n > VARIABLES or 2 * task.half >= EXPONENTS):
            what = f"the form sequence reads {VARIABLES} variables and exponents up to {EXPONENTS - 1}"
            raise LuthierError(what, where=f"n={task.n}, degree {2 * task.half}", do="take form: candidates")

    def network(self) -> Sequence2Basis:
        """A network with keyed initial weights."""
        return keyed(lambda: Sequence2Basis(self.fit.sizes), self.key)

    def batch(self, step: int) -> dict[str, Tensor]:
        """Of a step, from 0: terms and coefficients, which of them are no padding (attention_mask), the bases to be
        written (labels) and their lengths. All polynomials have as many variables, or are of the task."""
        rng = generator(self.key, step)
        if self.task:
            number = max(2, min(BATCH, PAIRS // (self.task.size**2 // 2) ** 2))  # m monomials give about m^2 / 2 terms
            return joined([written(plant(self.task, rng)) for _ in range(number)])
        n, half = SHAPES[int(rng.integers(len(SHAPES)))]
        return joined([example(n, half, rng) for _ in range(BATCH)])

    def loss(self, network: Sequence2Basis, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of the exponents and of the end, the mean over the monomials that are to be written."""
        keep_BS, target_BTK, lengths_B = batch["attention_mask"], batch["labels"], batch["lengths"]
        memory_BSD = network.read(batch["rows"], batch["values"], keep_BS)
        exponents, ends_BT = network.written(memory_BSD, keep_BS, target_BTK)
        places = torch.arange(target_BTK.shape[1] + 1, device=lengths_B.device)[None]
        inside_BT, last_BT = places < lengths_B[:, None], places == lengths_B[:, None]
        each_BTK = F.cross_entropy(exponents[:, :-1].reshape(-1, EXPONENTS), target_BTK.reshape(-1), reduction="none")
        wrong = (each_BTK.reshape(target_BTK.shape).sum(-1) * inside_BT[:, :-1]).sum()
        stop = F.binary_cross_entropy_with_logits(ends_BT, last_BT.float(), reduction="none")
        return (wrong + (stop * (inside_BT | last_BT)).sum()) / (inside_BT | last_BT).sum()


def joined(several: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Terms, coefficients and bases, padded."""
    pad = torch.nn.utils.rnn.pad_sequence
    rows, values, targets = (pad(list(column), batch_first=True) for column in zip(*several, strict=True))
    counts = torch.tensor([len(v) for _, v, _ in several])
    keep = torch.arange(values.shape[1])[None] < counts[:, None]
    lengths = torch.tensor([len(t) for *_, t in several])
    return {"rows": rows, "values": values, "attention_mask": keep, "labels": targets, "lengths": lengths}


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
