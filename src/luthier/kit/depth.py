"""The layers of a live model, watched and skipped through hooks that are gone afterwards.

`layers` is the list `checkpoint.roles.live_layers` gives; a layer that is used at several depths stands in
it as often, and its calls are told apart by their order.
B: sequences, T: positions, D: channels, N: states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

Look = Callable[[int, Tensor, Tensor], None]
"""(place, what the layer was given, what it gave), states (B, T, D)"""


@contextmanager
def skipping(layers: Sequence[nn.Module], places: Sequence[int]) -> Iterator[None]:
    """Inside, the layers at these places hand on what they are given.

    They still run, so their entries in a cache are written as ever; what they compute is thrown away,
    auxiliary losses too.
    """

    def hand_on(place: int, x_BTD: Tensor, given: Any) -> Any:
        if place not in places:
            return given
        return (x_BTD, *map(_lossless, given[1:])) if isinstance(given, tuple) else x_BTD

    with _hooked(layers, hand_on):
        yield


@contextmanager
def watching(layers: Sequence[nn.Module], look: Look, leaves: bool = False) -> Iterator[None]:
    """Inside, `look` sees every call of every layer.

    leaves: each layer is given a leaf that wants its gradient in place of its input, so that the
    derivative of one layer can be taken by itself while gradients are on.
    """

    def seen(place: int, x_BTD: Tensor, given: Any) -> None:
        look(place, x_BTD, given[0] if isinstance(given, tuple) else given)

    with _hooked(layers, seen, leaves):
        yield


@contextmanager
def _hooked(layers: Sequence[nn.Module], after: Callable[[int, Tensor, Any], Any], leaves: bool = False) -> Iterator:
    handles: list[Any] = []
    try:
        for layer in dict.fromkeys(layers):
            turns = cycle([place for place, other in enumerate(layers) if other is layer])

            def call(module: Any, args: tuple, kwargs: dict, given: Any, turns: Any = turns) -> Any:
                return after(next(turns), args[0] if args else kwargs["hidden_states"], given)

            if leaves:
                handles.append(layer.register_forward_pre_hook(_leaf, with_kwargs=True))
            handles.append(layer.register_forward_hook(call, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lossless(value: Any) -> Any:
    """Aux without its losses, anything else as it is."""
    return {k: v for k, v in value.items() if not k.startswith("loss/")} if isinstance(value, dict) else value


def _leaf(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def angular(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """The angle between each pair of states as a share of a half turn, (N,) in fp64.

    By the half-angle form, which unlike the arc cosine is exact for states that hardly differ.
    """
    u_ND, v_ND = (nn.functional.normalize(z_ND.double(), dim=-1) for z_ND in (x_ND, y_ND))
    return 2 * torch.atan2((u_ND - v_ND).norm(dim=-1), (u_ND + v_ND).norm(dim=-1)) / math.pi
