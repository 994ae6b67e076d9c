"""Saves of a run in progress: whole or absent, verified before they are read, never unpickled.

    folder/step-00000012/
        state.safetensors   every tensor, under its path in the tree
        state.json          the tree: dicts, lists, numbers; {"tensor": path} where a tensor stands
        manifest.json       size and sha256 of the two, written last

A save is written beside its place, synced to the disk, and renamed. A folder whose manifest does not
verify is not a save: killing the process at any moment leaves the earlier saves as they were.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.checkpoint.atomic import is_full
from luthier.errors import LuthierError

TENSORS, TREE, MANIFEST = "state.safetensors", "state.json", "manifest.json"


def save(folder: Path, step: int, tree: Any, keep: int) -> Path:
    """Write `tree` (dicts, lists, tuples, tensors, numbers, words) as the save of this step.

    Keeps the newest `keep` saves up to this one; a later one is one that did not verify, and goes too.
    LuthierError when the disk is full or refuses, or when the tree holds something else; the earlier
    saves are then as they were.
    """
    place = folder / f"step-{step:08d}"
    part = folder / f".{place.name}.part"
    try:
        _remove_leftovers(folder)
        part.mkdir(parents=True)
        _write(part, tree)
        shutil.rmtree(place, ignore_errors=True)  # only ever one that did not verify, or is written again
        os.rename(part, place)
        _sync(folder)
    except (OSError, SafetensorError) as fault:
        why, do = ("the disk is full", "free some space, try again") if is_full(fault) else (fault, "see to the disk")
        raise LuthierError(
            f"step {step} could not be saved ({why})", where=str(folder), do=f"{do}; earlier saves are intact"
        ) from fault
    finally:
        shutil.rmtree(part, ignore_errors=True)
    good = [at for at in _places(folder) if at.name <= place.name][:keep]
    for old in set(_places(folder)) - set(good):
        shutil.rmtree(old)
    return place


def newest(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest save that verifies, and the newer ones that do not."""
    broken = []
    for place in _places(folder):
        if verify(place):
            return place, broken
        broken.append(place)
    return None, broken


def verify(place: Path) -> bool:
    """Whether the manifest is there and both files are what it says."""
    try:
        manifest = json.loads((place / MANIFEST).read_text())
        return set(manifest) == {TENSORS, TREE} and all(manifest[n] == _print(place / n) for n in manifest)
    except (OSError, ValueError):
        return False


def read(place: Path, device: torch.device) -> Any:
    """The tree of a save, tensors in memory of their own: on the CPU if they were, else on `device`."""
    tensors = load_file(place / TENSORS)
    return _grow(json.loads((place / TREE).read_text()), tensors, device)


def clear(folder: Path) -> None:
    """Remove all saves: what they lead to has been written elsewhere."""
    _remove_leftovers(folder)
    for place in _places(folder):
        shutil.rmtree(place)


def _write(part: Path, tree: Any) -> None:
    tensors: dict[str, Tensor] = {}
    plain = _flatten(tree, "", tensors)
    save_file(tensors, part / TENSORS)
    (part / TREE).write_text(json.dumps(plain, allow_nan=False))
    for name in (TENSORS, TREE):
        _sync(part / name)
    (part / MANIFEST).write_text(json.dumps({name: _print(part / name) for name in (TENSORS, TREE)}))
    _sync(part / MANIFEST)
    _sync(part)


def _flatten(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of a tree; its tensors go to `tensors`. Keys of dicts keep their type."""
    if isinstance(tree, Tensor):
        name = f"{len(tensors):06d}{path}"  # numbered: two paths may spell alike
        tensors[name] = _owned(tree)
        return {"tensor": name, "device": tree.device.type}
    if isinstance(tree, dict):
        return {"dict": [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, tuple | list):
        items = [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    if isinstance(tree, float) and not math.isfinite(tree):
        raise LuthierError(f"the state holds {tree}, which cannot be saved", where=path)
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise LuthierError(f"the state holds a {type(tree).__name__}, which cannot be saved", where=path)


def _grow(plain: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if isinstance(plain, list):
        return [_grow(v, tensors, device) for v in plain]
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:  # copied: kernels must see fresh, aligned memory, not a stretch of a mapped file
        return tensors[plain["tensor"]].to("cpu" if plain["device"] == "cpu" else device, copy=True)
    if "tuple" in plain:
        return tuple(_grow(v, tensors, device) for v in plain["tuple"])
    return {k: _grow(v, tensors, device) for k, v in plain["dict"]}


def _owned(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, and alone in its storage, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _places(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _remove_leftovers(folder: Path) -> None:
    for part in folder.glob(".step-*.part"):
        shutil.rmtree(part)


def _print(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a tree."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(branch)
