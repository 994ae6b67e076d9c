"""Checkpoint: a lazy, checked view of a safetensors directory. Opening reads headers, never weights."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from luthier.checkpoint import anatomy
from luthier.checkpoint.cache import cache_folder
from luthier.checkpoint.header import CODES, as_bytes, fault, pread_into, read_header, read_json
from luthier.errors import LuthierError, unknown

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SIDECARS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_VOLATILE = ("transformers_version", "_name_or_path")


class TensorInfo(NamedTuple):
    """A tensor on disk and what it is. start: byte offset in `file`.  depth: the layer's place in [0, 1]."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int
    role: str = "other"
    layer: int | None = None
    depth: float | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Checkpoint:
    """A safetensors directory, opened lazily and trusted with nothing.

    path: the folder.  config: config.json.  tensors: name → TensorInfo, in the order of the bytes:
    shard after shard, by offset.  notices: what the user should know, one line each.
    """

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo], notices: tuple[str, ...]):
        self.path, self.config, self.tensors, self.notices = path, config, tensors, notices
        self._files: dict[Path, int] = {}
        weakref.finalize(self, _close, self._files)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """The checkpoint in the folder `path`; LuthierError, one line, for whatever is wrong with it."""
        path = Path(path)
        if not path.is_dir():
            raise LuthierError("is not a folder", where=str(path), do="give a folder with config.json and safetensors")
        if not (path / "config.json").is_file():
            raise LuthierError("holds no config.json", where=str(path), do=_what_is_there(path))
        config = read_json(inside(path, "config.json"), limit=8_000_000)
        if not isinstance(config.get("model_type"), str):
            raise LuthierError("names no model_type", where=str(path / "config.json"))
        tensors = _locate(path, config)
        _check_against_config(path, config, tensors)
        notices = ()
        if "auto_map" in config:
            notices = (f"{path.name}: config.json asks for remote code (auto_map); it is ignored and never run",)
        return cls(path, config, tensors, notices)

    @property
    def family(self) -> str:
        return self.config["model_type"]

    @property
    def n_params(self) -> int:
        """Elements in all tensors on disk; a tied head counts once."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor; LuthierError with the nearest name."""
        if name not in self.tensors:
            raise unknown("tensor", name, self.tensors, where=str(self.path))
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own, in the dtype on disk."""
        info = self.info(name)
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def read_flat(self, name: str, start: int, count: int) -> Tensor:
        """Elements start … start+count of the flattened tensor, in memory of its own. Safe in threads."""
        info = self.info(name)
        if start < 0 or count < 0 or start + count > info.numel:
            raise ValueError(f"{name}: no elements {start} to {start + count} in {info.numel}")
        if count == 0:
            return torch.empty(0, dtype=info.dtype)
        size = info.dtype.itemsize
        raw = np.empty(count * size, dtype=np.uint8)  # an array's memory is at hand sooner than a tensor's
        pread_into(self._fd(info.file), raw.data, info.start + start * size, info.file)
        return torch.from_numpy(raw).view(info.dtype)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one at a time, in file order."""
        for name in self.tensors:
            yield name, self.read(name)

    def hash(self) -> str:
        """Hash of the content: config, tokenizer, and each tensor's name, dtype, shape and bytes.

        The same weights sharded otherwise hash alike. Remembered in the cache folder for as long as
        no file of the checkpoint changes in size or time.
        """
        stamp = hashlib.sha256(json.dumps(self._stamp()).encode()).hexdigest()[:32]
        note = cache_folder("hashes") / stamp
        if note.is_file() and len(known := note.read_text().strip()) == 64:
            return known
        made = self._content_hash()
        with suppress(OSError):  # a full or read-only cache only costs the next run its time
            part = note.with_suffix(f".{os.getpid()}")
            part.write_text(made)
            part.replace(note)
        return made

    def _stamp(self) -> list[Any]:
        files = sorted({info.file for info in self.tensors.values()} | {self.path / s for s in SIDECARS})
        return [
            [str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ino] for f in files if f.is_file() for s in [f.stat()]
        ]

    def _content_hash(self) -> str:
        digest = hashlib.sha256()
        config = {k: v for k, v in self.config.items() if k not in _VOLATILE}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name in SIDECARS[1:]:
            if (self.path / name).is_file():
                digest.update(f"\n{name}\n".encode() + (self.path / name).read_bytes())
        for name, info in sorted(self.tensors.items()):
            digest.update(json.dumps([name, CODES[info.dtype], info.shape]).encode())
            for start in range(0, info.numel, 1 << 24):
                stretch = self.read_flat(name, start, min(1 << 24, info.numel - start))
                digest.update(as_bytes(stretch))
        return digest.hexdigest()

    def _fd(self, file: Path) -> int:
        if file not in self._files:
            opened = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if self._files.setdefault(file, opened) != opened:  # another thread was first
                os.close(opened)
        return self._files[file]

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.family}, {self.n_params:,} parameters)"


def _close(files: dict[Path, int]) -> None:
    for fd in files.values():
        os.close(fd)


def check_finite(name: str, tensor: Tensor, where: str | os.PathLike[str]) -> None:
    """LuthierError if a tensor holds NaN or infinity. where: its file, with or without its name."""
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        bad, at = int((~tensor.float().isfinite()).sum()), f"tensor {name!r}"
        what = f"{bad:,} of {tensor.numel():,} values are NaN or infinite"
        raise LuthierError(what, where=f"{where}" if f"{where}".endswith(at) else f"{where}: {at}")


def _what_is_there(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    if "adapter_config.json" in names or "delta.json" in names:
        return "it holds a change to a model: name the base it belongs to as well"
    if any(n.endswith(".gguf") for n in names):
        return "it holds a GGUF: give the path of the .gguf file itself"
    inside = [p.name for p in path.iterdir() if p.is_dir() and (p / "config.json").is_file()]
    return f"did you mean {path / sorted(inside)[0]}?" if inside else "give a folder that holds a model"


def _locate(path: Path, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Every tensor of the folder, from model.safetensors, or the index and its shards."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists() or (path / "model.safetensors").is_symlink():
        return _of_files(path, ["model.safetensors"], config)
    if os.path.lexists(index):
        listed = _read_index(inside(path, index.name))
        found = _of_files(path, sorted(set(listed.values())), config)
        _check_index(index, listed, found)
        return found
    single = sorted(p.name for p in path.glob("*.safetensors"))
    if len(single) == 1 and not single[0].startswith("adapter"):
        return _of_files(path, single, config)
    if single:
        raise LuthierError(
            f"{len(single)} safetensors files ({single[0]}, ...) and no model.safetensors.index.json", where=str(path)
        )
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickled:
        raise LuthierError(
            f"{pickled[0]} is a pickle, which can run any program when it is read: refused",
            where=str(path),
            do="convert it to safetensors where you trust it",
        )
    raise LuthierError("holds no safetensors", where=str(path), do="give a folder with model.safetensors or shards")


def _read_index(index: Path) -> dict[str, str]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
        raise LuthierError("has no weight_map from tensors to files", where=str(index))
    for name, file in listed.items():
        if Path(file).name != file or file in ("", ".", "..") or len(file) > 200 or "\\" in file or "\0" in file:
            raise LuthierError(f"tensor {name!r} points outside the folder, to {file!r}: refused", where=str(index))
    return listed


def _check_index(index: Path, listed: Mapping[str, str], found: Mapping[str, TensorInfo]) -> None:
    for name, file in listed.items():
        if name not in found or found[name].file.name != file:
            raise LuthierError(f"tensor {name!r} should be in {file}, which does not hold it", where=str(index))
    extra = next((name for name in found if name not in listed), None)
    if extra:
        raise LuthierError(f"tensor {extra!r} of {found[extra].file.name} is not in the index", where=str(index))


def _of_files(path: Path, files: list[str], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    family, layers = config["model_type"], anatomy.layers_of(config)
    found: dict[str, TensorInfo] = {}
    for name in files:
        file = inside(path, name)
        for entry in read_header(file)[0]:
            if entry.name in found:
                raise fault(file, f"is also in {found[entry.name].file.name}", entry.name)
            role, layer = anatomy.role_of(family, entry.name)
            depth = None if layer is None or not layers else min(layer / max(layers - 1, 1), 1.0)
            found[entry.name] = TensorInfo(
                entry.name, entry.dtype, entry.shape, file, entry.start, entry.nbytes, role, layer, depth
            )
    if not found:
        raise LuthierError("holds not one tensor", where=str(path / files[0]))
    return found


def inside(path: Path, name: str) -> Path:
    """The file `name` of the folder, refused if a link leads it elsewhere (the Hub's own cache excepted)."""
    file = path / name
    if not file.is_file():
        raise LuthierError("the file is missing", where=str(file), do="get the whole checkpoint again")
    real, home = file.resolve(), path.resolve()
    hub = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if real.parent != home and not hub:
        raise LuthierError(f"is a link out of its folder, to {real}: refused", where=str(file), do="copy the file")
    return file


def _check_against_config(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Cheap tests that config.json and the tensors speak of the same model."""
    if config["model_type"] not in anatomy.FAMILIES:
        return
    layers, said = anatomy.layers_of(config), anatomy.layers_said(config)
    if said is not None and layers is None:
        raise LuthierError(f"says {said!r} layers", where=str(path / "config.json"))
    have = {info.layer for info in tensors.values()}
    missing = next((n for n in range(layers or 0) if n not in have), None)
    if missing is not None:
        raise LuthierError(f"layer {missing} of {layers} has no tensors", where=str(path), do="a shard may be missing")
    text, row = anatomy.text_config(config), anatomy.family(config["model_type"])
    expected = (text.get("vocab_size"), text.get(row.hidden))
    for info in tensors.values():
        if info.role in ("embed", "head") and None not in expected and info.shape != expected:
            raise LuthierError(
                f"has the shape {list(info.shape)}, config.json says {list(expected)}",
                where=f"{info.file}: tensor {info.name!r}",
            )
