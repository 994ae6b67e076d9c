"""Writing checkpoints: stretches of tensors in place, or a live model, always with all that goes with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.checkpoint.alike import must_be_dense
from luthier.checkpoint.atomic import write_folder
from luthier.checkpoint.card import put_card
from luthier.checkpoint.header import Entry, as_bytes, pack_header
from luthier.checkpoint.reader import SIDECARS, Checkpoint, inside
from luthier.errors import LuthierError

__all__ = [
    "ShardWriter", "check_saveable", "config_with_dtype", "copy_sidecars", "put_model", "save_model", "write_folder",
]  # fmt: skip
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


class ShardWriter:
    """Safetensors files of known layout, preallocated, into which stretches are written in place.

    infos: anything with name, dtype and shape, in the order they shall lie.  One file
    model.safetensors, or shards of at most `max_shard_bytes` and their index.  Safe in threads.
    Use as a context manager inside `write_folder`.
    """

    def __init__(
        self,
        folder: Path,
        infos: Iterable[Any],
        metadata: Mapping[str, str] | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ):
        self.folder = folder
        self._at: dict[str, tuple[int, Entry]] = {}
        self._fds: list[int] = []
        shards = _share_out([(i.name, i.dtype, tuple(i.shape)) for i in infos], max_shard_bytes)
        names = (
            ["model.safetensors"]
            if len(shards) == 1
            else [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        )
        try:
            for name, shard in zip(names, shards, strict=True):
                self._allocate(folder / name, shard, {"format": "pt", **(metadata or {})})
            if len(shards) > 1:
                self._index(names, shards)
        except OSError:
            self.close()
            raise

    def _allocate(self, path: Path, shard: list, metadata: dict[str, str]) -> None:
        raw, entries = pack_header(shard, metadata)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._fds.append(fd)
        _pwrite(fd, memoryview(raw), 0)
        end = entries[-1].start + entries[-1].nbytes if entries else len(raw)
        if hasattr(os, "posix_fallocate"):  # a full disk shows now, not after an hour
            os.posix_fallocate(fd, 0, end)
        os.ftruncate(fd, end)
        self._at.update({entry.name: (fd, entry) for entry in entries})

    def _index(self, names: list[str], shards: list[list]) -> None:
        total = sum(entry.nbytes for _, entry in self._at.values())
        listed = {info[0]: name for name, shard in zip(names, shards, strict=True) for info in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": listed}, indent=1)
        (self.folder / "model.safetensors.index.json").write_text(text)

    def write(self, name: str, start: int, tensor: Tensor) -> None:
        """Write a flat or shaped stretch at element `start` of `name`, cast to the dtype it was declared with."""
        fd, entry = self._at[name]
        flat = tensor.detach().to(device="cpu", dtype=entry.dtype).contiguous().view(-1)
        offset = start * entry.dtype.itemsize
        if start < 0 or offset + flat.numel() * entry.dtype.itemsize > entry.nbytes:
            raise ValueError(f"{name}: {flat.numel()} elements from {start} do not fit {list(entry.shape)}")
        _pwrite(fd, as_bytes(flat), entry.start + offset)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pwrite(fd: int, view: memoryview, start: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + (1 << 30)], start + done)


def _share_out(infos: list, limit: int) -> list[list]:
    """Tensors in order, a new shard where the next one would not fit; every shard has at least one."""
    shards: list[list] = [[]]
    filled = 0
    for info in infos:
        nbytes = torch.Size(info[2]).numel() * info[1].itemsize
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += nbytes
    return shards


def sidecars(src: Checkpoint) -> list[Path]:
    """The files beside weights and config that a model made from `src` takes along.

    LuthierError for links out of the folder, and for quantized weights, which are no numbers to compute with.
    """
    must_be_dense(src)
    there = [name for name in SIDECARS[1:] if os.path.lexists(src.path / name)]
    there += [file.name for pattern in _LICENCES for file in src.path.glob(pattern) if not file.is_dir()]
    return [inside(src.path, name) for name in there]


def copy_sidecars(src: Checkpoint, folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Copy config, tokenizer, generation config, chat template and licence of `src` into `folder`.

    config: written instead of the source's. Requests for remote code (`auto_map`) are dropped. Raises what
    `sidecars` does.
    """
    for file in sidecars(src):
        shutil.copyfile(file, folder / file.name)
    made = {k: v for k, v in (config or src.config).items() if k != "auto_map"}
    (folder / "config.json").write_text(json.dumps(made, indent=2) + "\n")


def config_with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json's map with its dtype changed, under the key it used."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: str(dtype).removeprefix("torch.")}


def save_model(folder: str | os.PathLike[str], model: Any, tokenizer: Any = None, card: str = "") -> Path:
    """Save a live model as a plain Hugging Face folder: names as on disk, tied weights once, dtype kept.

    Writes config, generation config, tokenizer with chat template, and README.md from `card`.
    Raises LuthierError for live parametrizations and attached quantizers, which do not reload.
    """
    check_saveable(model, folder)
    with write_folder(folder) as temp:
        put_model(temp, model, tokenizer, card)
    return Path(folder)


def put_model(folder: Path, model: Any, tokenizer: Any = None, card: str = "") -> None:
    """What `save_model` writes, into a folder of `write_folder`; the model has passed `check_saveable`."""
    with no_progress_bar():
        model.save_pretrained(folder, max_shard_size="5GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card:
        put_card(folder, card)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers prints one for each save; who watches a run hears from its context instead."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_saveable(model: Any, folder: str | os.PathLike[str]) -> None:
    """LuthierError for what would not reload: live parametrizations and attached quantizers."""
    held = next((n for n, m in model.named_modules() if hasattr(m, "parametrizations")), None)
    if held is not None:
        raise LuthierError(f"{held}: a live parametrization would not reload", where=str(folder), do="bake it first")
    if getattr(model, "hf_quantizer", None) is not None:
        raise LuthierError(
            "the model is quantized and cannot be saved",
            where=str(folder),
            do="open it with luthier, which makes it dense",
        )
