"""A LoRA adapter as a checkpoint of its own: its factors are tensors, streamed and written like any others.

So adapters of one base merge into an adapter. The factors are merged one by one: A with A, B with B. That is
not the merge of the products B·A (for it, merge onto the base and extract an adapter from the result).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.checkpoint import lora
from luthier.checkpoint.anatomy import role_of
from luthier.checkpoint.header import read_header, read_json
from luthier.checkpoint.reader import Checkpoint, TensorInfo, inside
from luthier.errors import LuthierError, said

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SAME = ("r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "ensure_weight_tying")


class Adapter(Checkpoint):
    """tensors: those of adapter_model.safetensors, with role, layer and depth of the weight they change.

    parts: the weight and what a tensor is of it: A, B, Ae or Be of an embedding, or full.
    """

    parts: Mapping[str, tuple[str, str]]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Adapter:
        """The adapter in a folder; LuthierError for what two factors cannot express, and for damage."""
        path = Path(path)
        config = read_json(inside(path, CONFIG), limit=8_000_000)
        lora.refuse_beyond(config, path)
        file = lora.weights_of(path)
        found, parts = {}, {}
        for entry in read_header(file)[0]:
            parts[entry.name] = lora.part_of(entry, file)
            role, layer = role_of("llama", parts[entry.name][0])
            found[entry.name] = TensorInfo(
                entry.name, entry.dtype, entry.shape, file, entry.start, entry.nbytes, role, layer
            )
        if not found:
            raise LuthierError("holds not one tensor", where=str(file))
        last = max((info.layer for info in found.values() if info.layer is not None), default=0)
        placed = {n: i._replace(depth=None if i.layer is None else i.layer / max(last, 1)) for n, i in found.items()}
        made = cls(path, config, placed, ())
        made.parts = parts
        return made

    @property
    def family(self) -> str:
        return "adapter"


class Nothing:
    """What adapters change against: the same tensors, all zero."""

    def __init__(self, like: Adapter):
        self.tensors: Mapping[str, TensorInfo] = like.tensors
        self.config, self.path = like.config, like.path

    def read_flat(self, name: str, start: int, count: int) -> Tensor:
        return torch.zeros(count, dtype=self.tensors[name].dtype)


def beneath(base: Any, experts: Sequence[Any], wanted: bool) -> Any:
    """The base of a merge: zeros for adapters without one, if the method wants a base; else as it is given.

    LuthierError for adapters beside whole models, and for adapters whose factors do not mean the same.
    """
    adapters = [e for e in experts if isinstance(e, Adapter)]
    if base is not None or not adapters:
        return base
    other = next((e for e in experts if not isinstance(e, Adapter)), None)
    if other is not None:
        what = f"is an adapter, and {getattr(other, 'path', 'another expert')} is a whole model"
        raise LuthierError(what, where=str(adapters[0].path), do="name the base: base: MODEL")
    first = adapters[0]
    for expert in adapters[1:]:
        _check_alike(first, expert)
    whole = next((n for n, (_, part) in first.parts.items() if part == "full"), None)
    if wanted and whole:
        what = f"holds {whole!r} whole, which changes nothing that is known"
        raise LuthierError(what, where=str(first.path), do="name the base: base: MODEL")
    return Nothing(first) if wanted else None


def factorwise(experts: Sequence[Any], are: str) -> tuple[str, ...]:
    """What to know of a merge of adapters by a method for models. are: what the method's experts are."""
    if are == "adapters" or not any(isinstance(e, Adapter) for e in experts):
        return ()
    return ("the adapters' factors were merged A with A and B with B, not their products; name the base for those",)


def _check_alike(first: Adapter, other: Adapter) -> None:
    for key in _SAME:
        mine, theirs = first.config.get(key) or None, other.config.get(key) or None
        if mine != theirs:
            what = f"{key} is {said(theirs)}, that of {first.path} {said(mine)}: their factors cannot be merged"
            raise LuthierError(what, where=str(other.path / CONFIG), do="merge onto the base, then luthier extract")
    bases = [str(a.config.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2] for a in (first, other)]
    if all(bases) and bases[0] != bases[1]:
        what = f"belongs to {bases[1]!r}, {first.path} to {bases[0]!r}"
        raise LuthierError(what, where=str(other.path / CONFIG), do="merge adapters of one base")


def check_factors(experts: Sequence[Any], method: str) -> None:
    """LuthierError unless every expert is an adapter, with both factors of each weight."""
    for expert in experts:
        path = str(getattr(expert, "path", "expert"))
        factors = {name: found for name in expert.tensors if (found := lora.factor_of(name))}
        if not factors:
            do = f"{method} merges adapters: luthier extract makes one of a tuned model"
            raise LuthierError("is no LoRA adapter", where=path, do=do)
        for name, (which, other) in factors.items():
            mine, theirs = expert.tensors[name].shape, getattr(expert.tensors.get(other), "shape", ())
            a, b = (mine, theirs) if which == "A" else (theirs, mine)
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                what = "lora_A and lora_B are missing or do not match"
                raise LuthierError(what, where=f"{path}: tensor {name!r}")


def put_names(folder: Path) -> None:
    """Give the files of a written checkpoint the names an adapter's have."""
    if not (folder / "model.safetensors").is_file():
        raise LuthierError("the adapter takes more than one file", where=str(folder))
    os.rename(folder / "config.json", folder / CONFIG)
    os.rename(folder / "model.safetensors", folder / WEIGHTS)
