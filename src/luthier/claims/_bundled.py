"""The bundled 135M model, opened once for the claims about measures and decoding. Its weights are dequantised Q4_1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from luthier.engine.data import open_data
from luthier.engine.subject import Subject_
from luthier.flows import Data
from luthier.kit.context import Context
from luthier.testing.tiny import TinyData


@cache
def host() -> tuple[Any, Any]:
    """(model, tokenizer), in fp32."""
    with Subject_("smollm2", "smollm2", dtype=torch.float32).open() as pair:
        return pair


class Host:
    """A `flows.Subject` around a model held in memory, the bundled one if none is given."""

    def __init__(self, name: str = "smollm2", model: Any = None, tokenizer: Any = None):
        self.name, self._model, self._tokenizer = name, model, tokenizer

    @contextmanager
    def open(self) -> Iterator[tuple[Any, Any]]:
        yield self._model or host()[0], self._tokenizer or host()[1]


def data(name: str, seed: int, source: str, test: int, **settings: Any) -> Data:
    """Test items only, others for each seed."""
    spec = {"source": source, "set": settings, "split": {"test": test}}
    if source.startswith("gym:"):
        return open_data(name, spec, Context(seed=seed))
    spec["split"] = {"by": "window", "test": 1.0}
    windows = open_data(name, spec, Context(seed=seed)).test  # in the order of their hashes
    return TinyData(name, (), windows[seed * test : (seed + 1) * test])
