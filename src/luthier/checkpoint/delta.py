"""Delta: what has changed against a base, in a fixed form on disk, applied and reverted exactly.

dense and sparse: `delta.safetensors` with, for each tensor, the values before and after ("old:NAME",
"new:NAME") and, where only some entries moved, their ascending flat indices ("index:NAME"), int32
where they fit; `delta.json` holds shapes and the base's hash. Because the old values are there, a delta
knows its base when it meets it, and reverting restores the bytes. low-rank: a PEFT LoRA adapter
folder (`checkpoint.lora`). Tensor names are those on disk.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from luthier.checkpoint.anatomy import disk_views, places
from luthier.checkpoint.atomic import write_folder
from luthier.checkpoint.header import fault, naturals, read_header, read_json
from luthier.checkpoint.lora import LowRank, open_adapter, save_adapter
from luthier.checkpoint.reader import inside
from luthier.errors import LuthierError, said, unknown

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """Entries of one tensor that moved. index: ascending flat indices, None when all are given.

    old, new: values before and after, flat, in the tensor's dtype.  shape: the tensor's.
    """

    shape: tuple[int, ...]
    old: Tensor
    new: Tensor
    index: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.old, self.new, self.index) if t is not None)

    def norm(self) -> float:
        """Euclidean length of the change, in fp64."""
        return float((self.new.double() - self.old.double()).norm())

    def stretch(self, base: Tensor, start: int) -> Tensor:
        """`base`, the flat stretch of the base from `start`, with the new values in place.

        LuthierError if the base holds there what the change did not start from.
        """
        if self.index is None:
            place, cut = slice(None), slice(start, start + base.numel())
        else:
            ends = torch.tensor([start, start + base.numel()], dtype=self.index.dtype)
            cut = slice(*torch.searchsorted(self.index, ends).tolist())
            place = self.index[cut].long() - start
        if not same_bits(base[place].to(self.old.dtype), self.old[cut]):
            what = "the base holds other values than this change was made from"
            raise LuthierError(what, do="name the base it belongs to")
        out = base.clone()
        out[place] = self.new[cut].to(out.dtype)
        return out

    def fits(self, tensor: Tensor, forward: bool) -> bool:
        """Whether the tensor holds what it must before the change (or, backward, after it), bit for bit."""
        return same_bits(self._gather(tensor), self.old if forward else self.new)

    def put_(self, tensor: Tensor, forward: bool) -> None:
        """Write the new values into the tensor, or the old ones."""
        values = (self.new if forward else self.old).to(tensor.device)
        flat = tensor.detach().view(-1)
        if self.index is None:
            flat.copy_(values)
        else:
            flat[self.index.to(tensor.device).long()] = values

    def _gather(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().view(-1)
        return flat if self.index is None else flat[self.index.to(tensor.device).long()]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes: a NaN equals itself, -0 is not 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = _BITS[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(kind), b.to(a.device).contiguous().view(kind))


@dataclass
class Delta:
    """Changes by tensor name. base: hash of the base they belong to, "" if unknown.  notes: kept in delta.json."""

    changes: Mapping[str, Change | LowRank]
    base: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    _stash: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> Literal["dense", "sparse", "lowrank"]:
        if any(isinstance(c, LowRank) for c in self.changes.values()):
            return "lowrank"
        return "sparse" if all(c.index is not None for c in self.changes.values()) else "dense"  # type: ignore[union-attr]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(change.nbytes for change in self.changes.values())

    @classmethod
    def sparse(
        cls, entries: Mapping[str, tuple[Tensor, Tensor, Tensor]], model: nn.Module, base: str = "", **notes: Any
    ) -> Delta:
        """{live name: (ascending flat indices, values before, values now)} of a live model, in disk names."""
        live = dict(model.state_dict(keep_vars=True))
        names: dict[str, list[str]] = {}
        spots = places(model)
        for disk, place in spots.items():
            names.setdefault(place.live, []).append(disk)
        changes = {}
        for name, (index, old, new) in entries.items():
            if name not in names:
                raise unknown("parameter", name, names)
            for disk in names[name]:
                place = spots[disk]
                low, high = place.start, place.start + prod(place.shape)
                cut = slice(*torch.searchsorted(index.cpu().long(), torch.tensor([low, high])).tolist())
                inside = index[cut].cpu().long() - low
                kept = inside.to(torch.int32 if prod(place.shape) < 2**31 else torch.int64)
                dtype = live[name].dtype
                changes[disk] = Change(place.shape, old[cut].cpu().to(dtype), new[cut].cpu().to(dtype), kept)
        return cls(changes, base, notes)

    @classmethod
    def between(cls, old: Any, new: Any, base: str = "", **notes: Any) -> Delta:
        """The change from `old` to `new`: modules, Checkpoints or maps of tensors with the same names and shapes.

        A tensor is stored sparsely where that takes fewer bytes, and left out where nothing moved.
        """
        before, after = _readers(old), _readers(new)
        if set(before) != set(after):
            odd = sorted(set(before) ^ set(after))[0]
            raise LuthierError(f"tensor {odd!r} is in one of the two only")
        changes = {}
        for name in before:
            change = _difference(name, before[name](), after[name]())
            if change is not None:
                changes[name] = change
        return cls(changes, base, notes)

    def apply_(self, target: nn.Module | Mapping[str, Tensor]) -> None:
        """Change a model, or tensors by disk name, in place. LuthierError, with nothing changed, on another base."""
        self._put(target, forward=True)

    def revert_(self, target: nn.Module | Mapping[str, Tensor]) -> None:
        """Undo `apply_`, to the byte. A low-rank delta can be reverted only by the object that applied it."""
        self._put(target, forward=False)

    @torch.no_grad()
    def _put(self, target: nn.Module | Mapping[str, Tensor], forward: bool) -> None:
        tensors = disk_views(target) if isinstance(target, nn.Module) else target
        for name, change in self.changes.items():
            _check_shape(name, change, tensors)
            exact = (
                change.fits(tensors[name], forward) if isinstance(change, Change) else forward or name in self._stash
            )
            if not exact:
                state = "the base this delta was made from" if forward else "a model this delta was applied to"
                raise LuthierError(f"tensor {name!r} is not that of {state}")
        for name, change in self.changes.items():
            if isinstance(change, Change):
                change.put_(tensors[name], forward)
            elif forward:
                self._stash[name] = tensors[name].detach().clone()
                tensors[name].detach().copy_(change.onto(tensors[name]))
            else:
                tensors[name].detach().copy_(self._stash.pop(name))

    def norms(self) -> dict[str, float]:
        """Euclidean length of each tensor's change."""
        return {name: change.norm() for name, change in self.changes.items()}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the delta as a folder, atomically."""
        if self.kind == "lowrank":
            about = self.notes.get("base_model"), bool(self.notes.get("tied"))
            return save_adapter(folder, self.changes, *about)  # type: ignore[arg-type]
        tensors = {}
        for name, change in self.changes.items():
            parts = {"index": change.index, "old": change.old, "new": change.new}  # type: ignore[union-attr]
            tensors.update({f"{part}:{name}": t.cpu().contiguous() for part, t in parts.items() if t is not None})
        shapes = {name: list(change.shape) for name, change in self.changes.items()}
        about = {"luthier_delta": 1, "kind": self.kind, "base": self.base, "notes": dict(self.notes), "shapes": shapes}
        with write_folder(folder) as temp:
            (temp / "delta.json").write_text(json.dumps(about, indent=1) + "\n")
            save_file(tensors, temp / "delta.safetensors")
        return Path(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Delta:
        """The delta in `folder`, ours or a PEFT LoRA adapter. Values are mapped from the file, not read at once."""
        folder = Path(folder)
        if (folder / "adapter_config.json").is_file():
            return cls(*open_adapter(folder))
        if not (folder / "delta.json").is_file():
            raise LuthierError("holds no delta.json and no adapter_config.json", where=str(folder))
        about = read_json(inside(folder, "delta.json"))
        if about.get("luthier_delta") != 1 or not isinstance(about.get("shapes"), dict):
            raise LuthierError("is not a delta this version reads", where=str(folder / "delta.json"))
        if not isinstance(about.get("notes") or {}, dict):
            raise LuthierError("its notes are no map", where=str(folder / "delta.json"))
        odd = next((name for name, shape in about["shapes"].items() if not naturals(shape)), None)
        if odd is not None:
            raise fault(folder / "delta.json", f"the shape {said(about['shapes'][odd])} makes no sense", odd)
        stored = map_tensors(inside(folder, "delta.safetensors"))
        changes = {name: _change(name, tuple(shape), stored, folder) for name, shape in about["shapes"].items()}
        return cls(changes, str(about.get("base", "")), about.get("notes") or {})


def _check_shape(name: str, change: Change | LowRank, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors:
        raise unknown("tensor", name, tensors)
    if tuple(tensors[name].shape) != tuple(change.shape):
        raise LuthierError(f"tensor {name!r} is {list(tensors[name].shape)}, the delta's is {list(change.shape)}")


def _readers(source: Any) -> dict[str, Any]:
    """name → function that gives the tensor, for a module, a Checkpoint or a map."""
    if isinstance(source, nn.Module):
        source = disk_views(source)
    if isinstance(source, Mapping):
        return {name: lambda t=t: t.detach().cpu() for name, t in source.items()}
    return {name: lambda n=name: source.read(n) for name in source.tensors}


def _difference(name: str, old: Tensor, new: Tensor) -> Change | None:
    if old.shape != new.shape or old.dtype != new.dtype:
        raise LuthierError(
            f"tensor {name!r} is {list(old.shape)} {old.dtype} before, {list(new.shape)} {new.dtype} after"
        )
    bits = _BITS[old.dtype.itemsize]
    a, b = old.contiguous().view(-1), new.contiguous().view(-1)
    index = (a.view(bits) != b.view(bits)).nonzero().view(-1)
    if index.numel() == 0:
        return None
    wide = 4 if a.numel() < 2**31 else 8
    if index.numel() * (2 * old.dtype.itemsize + wide) >= a.numel() * 2 * old.dtype.itemsize:
        return Change(tuple(old.shape), a.clone(), b.clone())
    kept = index.to(torch.int32 if wide == 4 else torch.int64)
    return Change(tuple(old.shape), a[index], b[index], kept)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one small safetensors file, mapped from disk; the mapping is private, the file stays."""
    entries = read_header(path)[0]
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        e.name: torch.frombuffer(memory, dtype=e.dtype, count=prod(e.shape), offset=e.start).view(e.shape)
        if e.nbytes
        else torch.empty(e.shape, dtype=e.dtype)
        for e in entries
    }


def _change(name: str, shape: tuple[int, ...], stored: Mapping[str, Tensor], folder: Path) -> Change:
    file = folder / "delta.safetensors"
    old, new, index = (stored.get(f"{part}:{name}") for part in ("old", "new", "index"))
    if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype or old.dim() != 1:
        raise fault(file, "the values before and after are missing or do not match", name)
    if index is None:
        if old.numel() != prod(shape):
            raise fault(file, f"{old.numel():,} values for the shape {list(shape)}", name)
    elif index.dtype not in (torch.int32, torch.int64) or index.shape != old.shape:
        raise fault(file, "indices and values do not match", name)
    elif index.numel() and (
        bool((index[1:] <= index[:-1]).any()) or int(index[0]) < 0 or int(index[-1]) >= prod(shape)
    ):
        raise fault(file, f"indices are not ascending inside the shape {list(shape)}", name)
    return Change(shape, old, new, index)
