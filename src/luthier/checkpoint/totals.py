"""Totals: sums as large as a model, kept in a file instead of memory and read like a checkpoint.

The file is one safetensors file of fp32, mapped and added to in place: the system writes it out and forgets
it when memory is short, so what a method must hold stays bounded.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from luthier.checkpoint.header import read_header
from luthier.checkpoint.reader import TensorInfo
from luthier.checkpoint.writer import ShardWriter

STRETCH = 1 << 22


class Totals:
    """Named fp32 tensors in a folder of their own, zero at first.

    tensors: name → TensorInfo, as of a Checkpoint.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]):
        folder.mkdir(parents=True)
        infos = {n: TensorInfo(n, torch.float32, s, folder, 0, 4 * math.prod(s)) for n, s in shapes.items()}
        ShardWriter(folder, infos.values(), max_shard_bytes=1 << 62).close()
        file = folder / "model.safetensors"
        with file.open("r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), 0)
        self.tensors: dict[str, TensorInfo] = {
            e.name: infos[e.name]._replace(file=file, start=e.start) for e in read_header(file)[0]
        }

    def add_(self, name: str, values: Tensor, start: int = 0) -> None:
        """Add to the entries from `start` of the flattened tensor."""
        values = values.detach().reshape(-1)
        self._view(name, start, values.numel()).add_(values.to("cpu", torch.float32))

    def read_flat(self, name: str, start: int, count: int) -> Tensor:
        """Entries start … start+count of the flattened tensor, in memory of their own."""
        return self._view(name, start, count).clone()

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        info = self.tensors[name]
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def norm(self, names: Iterable[str] | None = None) -> float:
        """Euclidean length of all of them together, or of those named, in fp64."""
        parts = (part.double().square().sum() for name in names or self.tensors for part in self._stretches(name))
        return math.sqrt(sum(float(part) for part in parts))

    def below(self, limits: Mapping[str, float]) -> int:
        """How many entries are smaller than their tensor's limit."""
        return sum(int((part < limits[name]).sum()) for name in self.tensors for part in self._stretches(name))

    def _stretches(self, name: str) -> Iterator[Tensor]:
        count = self.tensors[name].numel
        for start in range(0, count, STRETCH):
            yield self._view(name, start, min(STRETCH, count - start))

    def _view(self, name: str, start: int, count: int) -> Tensor:
        info = self.tensors[name]
        if start < 0 or start + count > info.numel:
            raise ValueError(f"{name}: no entries {start} to {start + count} in {info.numel}")
        if not count:
            return torch.empty(0)
        return torch.frombuffer(self._memory, dtype=torch.float32, count=count, offset=info.start + 4 * start)
