"""What the modules of a decoder share in one forward pass, and how their aux values add up.

Shapes: B sequences, T positions of this pass, S positions seen so far (cache and pass), H the width
of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from luthier.kit.rotary import angles

Aux: TypeAlias = dict[str, Tensor]
"""What a module returns beside its output: "loss/NAME", scalars that are added to the loss once, with
their coefficients already in; "metric/NAME", detached values for the log."""


@dataclass
class Pass:
    """The facts of one forward pass, the same for every layer.

    mask: (B, 1, T, S) boolean or additive, or None where plain causal attention is meant.  both: the
    same for modules that look both ways (which say so by `causal = False`), None where they see all.
    positions_BT: places for the rotary embedding.  keep_BT: which of the tokens are real (not
    padding), or None if all are.  cache: a transformers `Cache` or None.  run: calls a layer's module,
    through gradient checkpointing where that is on; a stack calls its layers only by it.
    """

    positions_BT: Tensor
    mask: Tensor | None = None
    both: Tensor | None = None
    keep_BT: Tensor | None = None
    cache: Any = None
    run: Callable[[nn.Module, Tensor, Pass], tuple[Tensor, Aux]] = field(default=lambda layer, x, at: layer(x, at))
    _angles: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rotary(self, width: int, theta: float) -> tuple[Tensor, Tensor]:
        """cos and sin for heads of `width`, each (B, T, width) in fp32; computed once a pass."""
        if (width, theta) not in self._angles:
            with torch.no_grad():
                self._angles[width, theta] = angles(self.positions_BT, width, theta)
        return self._angles[width, theta]


def add_aux(total: Aux, more: Mapping[str, Tensor]) -> Aux:
    """`total` with `more` in it: losses of one name add up, of metrics of one name the last stays."""
    for name, value in more.items():
        total[name] = total[name] + value if name in total and name.startswith("loss/") else value
    return total


def aux_loss(aux: Mapping[str, Tensor] | None) -> Tensor | float:
    """The sum of all "loss/..." values; 0.0 where there is none."""
    return sum((value for name, value in (aux or {}).items() if name.startswith("loss/")), 0.0)
