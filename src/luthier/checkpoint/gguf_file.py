"""The GGUF container and its simplest quantisers, read with the same suspicion as safetensors.

A file is the magic word, a version, two counts, key-value pairs, tensor descriptions, padding, and the
data. Shapes run from the fastest axis, so they are reversed here. K-, I- and other quantisers are left
to the package `gguf`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.errors import LuthierError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Quantiser(NamedTuple):
    """size: elements a block.  nbytes: bytes a block.  decode: (blocks, nbytes) uint8 → (blocks, size) fp32."""

    size: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(blocks: Tensor, at: int) -> Tensor:
    """32 four-bit numbers from 16 bytes: the low halves are the first 16."""
    packed = blocks[:, at : at + 16]
    return torch.cat([packed & 0xF, packed >> 4], dim=1).float()


QUANTISERS: Mapping[int, Quantiser] = {
    0: Quantiser(1, 4, lambda b: b.contiguous().view(torch.float32)),
    1: Quantiser(1, 2, lambda b: b.contiguous().view(torch.float16).float()),
    2: Quantiser(32, 18, lambda b: _half(b, 0) * (_nibbles(b, 2) - 8)),  # Q4_0
    3: Quantiser(32, 20, lambda b: _half(b, 0) * _nibbles(b, 4) + _half(b, 2)),  # Q4_1
    8: Quantiser(32, 34, lambda b: _half(b, 0) * b[:, 2:].contiguous().view(torch.int8).float()),  # Q8_0
    30: Quantiser(1, 2, lambda b: b.contiguous().view(torch.bfloat16).float()),
}


class Described(NamedTuple):
    """A tensor of the file. shape: slowest axis first.  start: byte in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


class GgufFile:
    """keys: what the file says of itself.  tensors: name → Described.  read(name): fp32, in memory of its own."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise LuthierError(f"cannot be read ({error})", where=str(path)) from None
        self._at = 0
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, RecursionError):
            raise self._fault(f"is truncated or damaged at byte {self._at:,}") from None

    def _fault(self, what: str) -> LuthierError:
        return LuthierError(what, where=str(self.path), do="the file is damaged or not GGUF: get it again")

    def _parse(self) -> None:
        if self._memory[:4] != b"GGUF":
            raise self._fault("does not begin with GGUF")
        self._at = 4
        version, tensors, pairs = self._take("I"), self._take("Q"), self._take("Q")
        if version not in (2, 3):
            raise self._fault(f"is GGUF version {version}; 2 and 3 are read")
        if max(tensors, pairs) > 1_000_000:
            raise self._fault(f"claims an absurd {tensors:,} tensors and {pairs:,} keys")
        self.keys: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.keys[key] = self._value(self._take("I"))
        raw = [self._describe() for _ in range(tensors)]
        align = self.keys.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise self._fault(f"claims an alignment of {align!r}")
        data = -(-self._at // align) * align
        self.tensors = {name: self._place(name, shape, kind, data + offset) for name, shape, kind, offset in raw}
        if len(self.tensors) != len(raw):
            raise self._fault("names a tensor twice")
        end = 0
        for at in sorted(self.tensors.values(), key=lambda at: (at.start, at.nbytes)):
            if at.start < end:  # else a small file could stand for a model without end
                raise self._fault(f"tensor {at.name!r} overlaps the one before it")
            end = at.start + at.nbytes

    def _take(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._memory, self._at)
        self._at += struct.calcsize("<" + code)
        return value[0]

    def _string(self) -> str:
        length = self._take("Q")
        if length > len(self._memory) - self._at:
            raise self._fault(f"claims a word of {length:,} bytes at byte {self._at:,}, beyond its end")
        self._at += length
        return self._memory[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._fault(f"has a value of unknown kind {kind} at byte {self._at:,}")
        inner, count = self._take("I"), self._take("Q")
        if count > len(self._memory) - self._at:
            raise self._fault(f"claims a list of {count:,} at byte {self._at:,}, beyond its end")
        if inner in _SCALARS:
            code = f"<{count}{_SCALARS[inner]}"
            values = struct.unpack_from(code, self._memory, self._at)
            self._at += struct.calcsize(code)
            return list(values)
        return [self._value(inner) for _ in range(count)]

    def _describe(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self._string(), self._take("I")
        if axes > 8:
            raise self._fault(f"tensor {name!r} claims {axes} axes")
        shape = tuple(self._take("Q") for _ in range(axes))
        return name, shape[::-1], self._take("I"), self._take("Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> Described:
        size, nbytes = self._block(name, kind)
        if shape and shape[-1] % size:
            raise self._fault(f"tensor {name!r}: rows of {shape[-1]} are no whole blocks of {size}")
        if 0 in shape and prod(filter(None, shape)) >= 2**62:
            raise self._fault(f"tensor {name!r}: a shape of that size makes no sense")
        need = prod(shape) // size * nbytes
        if start + need > len(self._memory):
            raise self._fault(f"is truncated: tensor {name!r} ends at byte {start + need:,} of {len(self._memory):,}")
        return Described(name, shape, kind, start, need)

    def _block(self, name: str, kind: int) -> tuple[int, int]:
        if kind in QUANTISERS:
            return QUANTISERS[kind][:2]
        constants = _package(f"{self.path}: tensor {name!r}")
        try:
            return constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise self._fault(f"tensor {name!r} is of the unknown kind {kind}") from None

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised to fp32."""
        at = self.tensors[name]
        if at.nbytes == 0:
            return torch.empty(at.shape)
        raw = torch.frombuffer(self._memory, dtype=torch.uint8, count=at.nbytes, offset=at.start)
        if at.kind in QUANTISERS:
            made = QUANTISERS[at.kind].decode(raw.view(-1, QUANTISERS[at.kind].nbytes))
            return made.reshape(at.shape).clone()
        from gguf.quants import dequantize

        rows = raw.view(*at.shape[:-1], -1).numpy()
        kinds = _package(str(self.path)).GGMLQuantizationType
        return torch.from_numpy(dequantize(rows, kinds(at.kind))).reshape(at.shape)


def _package(where: str) -> Any:
    try:
        import gguf
    except ImportError:
        raise LuthierError("this quantiser needs the package gguf", where=where, do="run: pip install gguf") from None
    return gguf
