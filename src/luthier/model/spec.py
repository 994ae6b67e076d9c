"""What a Part is told of its place when it is built.

The forward of a built module, by slot (`Pass` and `Aux` are in `kit.parts`):

    mixer, ffn, norm, layer, stack    module(x_BTD, at: Pass) -> (y_BTD, aux)
    linear, head                      stand in for nn.Linear: module(x) -> y, no aux

A `layer` owns its norms and residuals; a `stack` owns order, sharing and recursion, and calls its
layers by `at.run(layer, x, at)`. A module may have: `initial`, a map from the names of its own
parameters and buffers to the constants they start from (others start from a normal distribution, the
bias of a linear layer from zero); `observe(aux)`, called once after each training pass with the
decoder's aux; `after_step()`, called by the trainer after each optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

from torch import nn

from luthier.errors import LuthierError
from luthier.model.config import LuthierConfig


@dataclass(frozen=True)
class Spec:
    """One place of the decoder.

    sizes: (in, out) of a linear or head, None elsewhere.
    """

    config: LuthierConfig
    slot: str = "stack"
    layer: int | None = None
    sizes: tuple[int, int] | None = None
    _shared: dict[Hashable, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def depth(self) -> float | None:
        """The layer's place in [0, 1]; None outside the layers."""
        return None if self.layer is None else self.layer / max(1, self.config.num_hidden_layers - 1)

    def at(self, layer: int | None) -> Spec:
        """The same place in another layer."""
        return replace(self, layer=layer)

    def part(self, slot: str) -> nn.Module:
        """The module of a nested slot, in the same layer."""
        part = self.config.part(slot, self.layer)
        if part is not None:
            return part.build(replace(self, slot=slot))
        from luthier.model.plain import PLAIN  # the built-in layer and stack are built from Specs themselves

        if slot not in PLAIN:
            raise LuthierError(f"nothing fills the slot {slot!r}", where="slots")
        return PLAIN[slot](replace(self, slot=slot))

    def linear(self, n_in: int, n_out: int, slot: str = "linear") -> nn.Module:
        """A linear map without bias: nn.Linear, or what fills the slot `linear`."""
        part = self.config.part(slot, self.layer)
        if part is None:
            return nn.Linear(n_in, n_out, bias=False)
        return part.build(replace(self, slot=slot, sizes=(n_in, n_out)))

    def shared(self, key: Hashable, make: Callable[[], nn.Module]) -> nn.Module:
        """One module for all places that ask with an equal key; saving writes it once."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]
