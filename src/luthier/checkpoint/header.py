"""The safetensors header, read with suspicion: nothing in the file is believed before it is checked.

A file is 8 bytes of header length (little endian), a JSON header that maps each tensor's name to its
dtype, shape and byte range, then the bytes. The format wants the ranges to cover the bytes without
hole or overlap. Every fault is one LuthierError that names the file and the tensor.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from luthier.errors import LuthierError

MAX_HEADER = 100_000_000
"""bytes; the format's own limit"""
MAX_LISTS, MAX_AXES = 2_000_000, 64
"""lists and maps in a JSON file, whose two letters take thirty times as much in memory; axes of a tensor"""
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a file. start: byte offset from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def fault(path: Path, what: str, tensor: str | None = None) -> LuthierError:
    """The error for a file that cannot be trusted."""
    where = f"{path}: tensor {tensor!r}" if tensor is not None else str(path)
    return LuthierError(what, where=where, do="the file is damaged or not safetensors: get it again")


def read_json(path: Path, limit: int = 64_000_000) -> dict[str, Any]:
    """A JSON map from a file; LuthierError if it is no such thing, too large, or has a key twice."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a device never end
            raise LuthierError("is no file", where=str(path))
        with path.open("rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise LuthierError(f"{path.stat().st_size:,} bytes are too many for a JSON file", where=str(path))
        return parse_json(raw, path)
    except OSError as error:
        raise LuthierError(f"cannot be read ({error.strerror})", where=str(path)) from None


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """A JSON map from bytes; LuthierError if it is no such thing or has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise LuthierError(f"the name {twice!r} occurs twice", where=str(path))
        return made

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    if raw.count(b"[") + raw.count(b"{") > MAX_LISTS:
        raise LuthierError(f"holds too many lists and maps, more than {MAX_LISTS:,}", where=str(path))
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise LuthierError(f"is not valid JSON ({str(error)[:80]})", where=str(path)) from None
    if not isinstance(value, dict):
        raise LuthierError(f"should hold a JSON map, holds a {type(value).__name__}", where=str(path))
    return value


def read_header(path: Path) -> tuple[list[Entry], dict[str, str], str]:
    """The tensors of one safetensors file in the order of their bytes, its metadata, its header as text."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw, length = _raw_header(file, size, path)
    except OSError as error:
        raise LuthierError(f"cannot be read ({error.strerror})", where=str(path)) from None
    header = parse_json(raw, path)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fault(path, "the metadata is not a map of words")
    data = 8 + length
    entries = sorted((_entry(n, spec, data, path) for n, spec in header.items()), key=lambda e: (e.start, e.nbytes))
    _check_cover(entries, data, size, path)
    return entries, metadata, raw.decode("utf-8")


def _raw_header(file: Any, size: int, path: Path) -> tuple[bytes, int]:
    if size < 8:
        raise fault(path, f"is truncated: {size} bytes, not even a header length")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise fault(path, f"claims an absurd header of {length:,} bytes (limit {MAX_HEADER:,})")
    if length + 8 > size:
        raise fault(path, f"is truncated: a header of {length:,} bytes in a file of {size:,}")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise fault(path, "the header does not begin with '{'")
    return raw, length


_KEYS, _LARGE = {"dtype", "shape", "data_offsets"}, 1 << 62


def _entry(name: str, spec: Any, data: int, path: Path) -> Entry:
    if not isinstance(spec, dict) or spec.keys() != _KEYS:
        raise fault(path, "the entry should hold dtype, shape and data_offsets", name)
    code, shape, span = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise fault(path, f"unknown dtype {code!r}", name)
    if not naturals(shape) or not naturals(span) or len(span) != 2 or span[0] > span[1]:
        raise fault(path, f"shape {str(shape)[:60]} or byte range {str(span)[:60]} makes no sense", name)
    if len(shape) > MAX_AXES or (0 in shape and prod(filter(None, shape)) >= 2**62):
        raise fault(path, f"a shape of {len(shape):,} axes and that size makes no sense", name)
    need = prod(shape) * DTYPES[code].itemsize
    if span[1] - span[0] != need:
        raise fault(path, f"shape {shape} of {code} needs {need:,} bytes, the header gives {span[1] - span[0]:,}", name)
    return Entry(name, DTYPES[code], tuple(shape), data + span[0], need)


def naturals(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0 that fit into 62 bits."""
    if not isinstance(value, list):
        return False
    for number in value:  # noqa: SIM110 (a loop is twice as fast as `all`, and large models ask 100,000 times)
        if type(number) is not int or not 0 <= number < _LARGE:
            return False
    return True


def _check_cover(entries: list[Entry], data: int, size: int, path: Path) -> None:
    at = data
    for entry in entries:
        if entry.start < at:
            raise fault(path, "overlaps the tensor before it", entry.name)
        if entry.start > at:
            raise fault(path, f"leaves a hole of {entry.start - at:,} bytes before it", entry.name)
        at = entry.start + entry.nbytes
        if at > size:
            raise fault(path, f"is truncated: the tensor ends at byte {at:,}, the file at {size:,}", entry.name)
    if at != size:
        raise fault(path, f"{size - at:,} bytes follow the last tensor")


def pack_header(infos: list[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> tuple[bytes, list]:
    """Length and header for tensors in this order, padded to 8 bytes, and their Entries."""
    spec: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at, spans = 0, []
    for name, dtype, shape in infos:
        nbytes = prod(shape) * dtype.itemsize
        spec[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        spans.append((at, nbytes))
        at += nbytes
    raw = json.dumps(spec, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    data = 8 + len(raw)
    entries = [Entry(*info, data + start, nbytes) for info, (start, nbytes) in zip(infos, spans, strict=True)]
    return len(raw).to_bytes(8, "little") + raw, entries


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to read from or into."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def pread_into(fd: int, view: memoryview, start: int, path: Path) -> None:
    """Fill `view` from byte `start`; LuthierError if the file ends before."""
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + (1 << 30)]], start + done)
        if got == 0:
            raise fault(path, f"ends {len(view) - done:,} bytes too early; it was cut since it was opened")
        done += got
