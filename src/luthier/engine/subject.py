"""Subjects: models by name, folder, delta or in memory, held only while they are looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.checkpoint.delta import Delta
from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.resolve import resolve
from luthier.errors import LuthierError
from luthier.kit.precision import cast_, working


class Subject_:
    """A `flows.Subject`.

    source: a Checkpoint, a folder, a known name or Hub id, a live module (then with `tokenizer`), or a
    (module, tokenizer) pair; also a delta or LoRA adapter folder, which then stands on `base`.
    device, dtype: where and in what a stored model computes (None: the CPU, and as stored or, where the
    machine only emulates 16 bits, fp32); a live one stays as it is.
    """

    def __init__(
        self, name: str, source: Any, tokenizer: Any = None, *, device: Any = None,
        dtype: torch.dtype | None = None, base: Any = None,
    ):  # fmt: skip
        self.name = name
        if isinstance(source, tuple):
            source, tokenizer = source
        self._delta = _delta(source, base)
        self._source = base if self._delta else source
        self._tokenizer, self._device, self._dtype = tokenizer, device, dtype
        if isinstance(self._source, nn.Module) and tokenizer is None:
            raise LuthierError(f"{name} is a live model without a tokenizer", do="give both")
        if not isinstance(self._source, (nn.Module, Checkpoint)):
            self._source = resolve(self._source)

    @contextmanager
    def open(self) -> Iterator[tuple[nn.Module, Any]]:
        """The model in eval mode and its tokenizer; a live model gets its modes back afterwards."""
        if isinstance(self._source, nn.Module):
            modes = {module: module.training for module in self._source.modules()}
            self._source.eval()
            try:
                yield self._changed(self._source), self._tokenizer
            finally:
                if self._delta:
                    self._delta.revert_(self._source)
                for module, mode in modes.items():
                    module.training = mode
        else:
            model, tokenizer = load(self._source)
            device = torch.device(self._device or "cpu")
            dtype = self._dtype or working(next(model.parameters()).dtype, device)
            yield cast_(self._changed(model), dtype).to(device).eval(), self._tokenizer or tokenizer

    def _changed(self, model: nn.Module) -> nn.Module:
        if self._delta:
            self._delta.apply_(model)
        return model


def load(source: Checkpoint) -> tuple[Any, Any]:
    """The model of a checkpoint, in the dtype it is stored in, and its tokenizer. No remote code is run."""
    import transformers

    import luthier.model  # noqa: F401  registers our own architecture with the Auto classes

    path = source.path
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True)
    return model, transformers.AutoTokenizer.from_pretrained(path)


def _delta(source: Any, base: Any) -> Delta | None:
    if isinstance(source, Delta):
        found = source
    elif isinstance(source, (str, os.PathLike)) and _is_delta(Path(source)):
        found = Delta.open(source)
    else:
        return None
    if base is None:
        raise LuthierError(f"{source} is a change to a model, not a model", do="say which base it belongs to")
    return found


def _is_delta(path: Path) -> bool:
    return (path / "delta.json").is_file() or (path / "adapter_config.json").is_file()
