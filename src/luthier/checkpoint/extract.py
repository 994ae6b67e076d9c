"""A LoRA adapter from the difference of two checkpoints: the best one of its rank, and what it leaves behind, by name.

Each matrix of attention and MLP gets two factors (Eckart and Young). Embeddings, head and norms have no
place in them: they are left at the base's, or go along whole (PEFT's modules_to_save). What neither can
hold stays behind in any case: biases, experts that PEFT finds fused, and rows for tokens the base does not
have. Everything left behind is listed with its share of the whole change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.checkpoint.anatomy import FAMILIES
from luthier.checkpoint.delta import Delta
from luthier.checkpoint.lora import LowRank
from luthier.checkpoint.reader import Checkpoint, TensorInfo, check_finite
from luthier.errors import LuthierError
from luthier.kit.factors import factors

Rest = Literal["leave", "full"]


@dataclass(frozen=True)
class Extracted:
    """An adapter. kept: by tensor, the share of its squared change that is in it.  left: by tensor of which nothing
    is, its share of the whole squared change, or None where its rows do not match the base's.  total: how much of the
    whole squared change is in the adapter, of the tensors that match."""

    delta: Delta
    kept: dict[str, float]
    left: dict[str, float | None]
    total: float


def extract(
    fine: Any, base: Checkpoint, rank: int | None = 16, energy: float | None = None, rest: Rest = "leave",
    base_name: str | None = None, watch: Callable[[int, int], None] | None = None,
) -> Extracted:  # fmt: skip
    """The adapter that takes `base` towards `fine`, a checkpoint or what `open_expert` gives; one tensor at a time.

    rank: of each matrix, at most; None: no limit.  energy: the smallest rank that keeps this share of a
    matrix's squared change.  rest: embeddings, head and norms that changed are left out, or saved whole.
    base_name: what the adapter says of its base.  LuthierError for models of different shapes.
    """
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1) or rank is energy is None:
        raise LuthierError(f"rank {rank} and energy {energy}", do="give a rank from 1, or an energy in (0, 1]")
    _check_alike(fine, base)
    changes: dict[str, LowRank] = {}
    kept: dict[str, float] = {}
    sizes: dict[str, float | None] = {}
    for done, (name, info) in enumerate(base.tensors.items()):
        if name in fine.tensors and fine.tensors[name].shape != info.shape:
            sizes[name] = None
        elif name in fine.tensors and info.dtype.is_floating_point:
            new, old = _read(fine, fine.tensors[name]), _read(base, info)
            sizes[name] = float((new - old).double().square().sum())
            if sizes[name]:
                kept |= _put(changes, info, base.family, old, new, rank, energy, rest)
        if watch:
            watch(done + 1, len(base.tensors))
    if not changes:
        raise LuthierError("nothing that an adapter holds has changed", where=str(getattr(fine, "path", "model")))
    whole = sum(size for size in sizes.values() if size)
    left = {n: size and size / whole for n, size in sizes.items() if n not in kept and size != 0}
    total = sum(share * (sizes[n] or 0) for n, share in kept.items()) / whole
    notes = {"base_model": base_name or str(base.path), "tied": bool(base.config.get("tie_word_embeddings"))}
    return Extracted(Delta(changes, notes=notes), kept, left, total)


def _put(
    changes: dict[str, LowRank], info: TensorInfo, family: str, old: Tensor, new: Tensor, rank: int | None,
    energy: float | None, rest: Rest,
) -> dict[str, float]:  # fmt: skip
    """Enter a tensor's change where an adapter can hold it; the share that is kept, by name."""
    if re.fullmatch(r"(attn|mlp)\.\w+", info.role) and len(info.shape) == 2:
        turned = family in FAMILIES and info.role in FAMILIES[family].transposed
        b, a, share = factors((new - old).T if turned else new - old, rank, energy)
        changes[info.name] = LowRank(a.contiguous(), b.contiguous(), 1.0, transposed=turned)
        return {info.name: share}
    whole = info.role in ("embed", "head", "norm") or info.role.endswith("_norm")
    if rest == "full" and whole and info.name.endswith(".weight"):
        none = torch.empty(0, 0)
        changes[info.name] = LowRank(none, none, 1.0, full=new.to(info.dtype))
        return {info.name: 1.0}
    return {}


def _read(source: Any, info: TensorInfo) -> Tensor:
    values = source.read_flat(info.name, 0, info.numel).float().view(info.shape)
    check_finite(info.name, values, info.file)
    return values


def _check_alike(fine: Any, base: Checkpoint) -> None:
    """The same tensors, in the same shapes but for rows of the vocabulary."""
    for name, info in base.tensors.items():
        other = fine.tensors.get(name)
        tied = info.role == "head" and fine.config.get("tie_word_embeddings", False)
        rows = info.role in ("embed", "head") and other is not None and other.shape[1:] == info.shape[1:]
        if (other is None and not tied) or (other is not None and other.shape != info.shape and not rows):
            what = f"is {list(info.shape)} in the base and {list(other.shape) if other else 'missing'} in the other"
            raise LuthierError(what, where=f"{info.file}: tensor {name!r}", do="give a model tuned from the base")
