"""The rows of parity.py that hold Luthier to fusion-bench: the same merge of the same folders through both.

Four Llamas in fp32 that went different ways from one base. fusion-bench computes in double precision, Luthier as it
always does. Methods that look at data get the same rows of tokens on both sides, DARE the same draws.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier import load
from luthier.kit.context import Context
from luthier.kit.encode import encode
from luthier.kit.noise import below, bound
from luthier.testing import tiny

PREFIX = "fusion-bench, "
EXPERTS = 3
DROP = 0.75
"""Share of each change that DARE drops."""
CLOSE = 1e-6
"""Largest difference that counts as none, relative to the largest of the tensor."""


@dataclass(frozen=True)
class Case:
    """use, fields: ours.  call, theirs: a key of `parity_peers.CALLS` and its fields.  experts: how many of them."""

    use: str
    fields: dict[str, Any]
    call: str
    theirs: dict[str, Any] = field(default_factory=dict)
    experts: int = EXPERTS
    base: bool = True


def cases(entries: int) -> dict[str, Case]:
    """By name. entries: of a model; fusion-bench's trim keeps one entry more than the share it is given."""
    density = 0.3
    trim = {"threshold": (round(density * entries) - 0.5) / entries, "remove_keys": []}
    ties, dare, unit = {"density": density}, {"density": 1 - DROP}, {"minimal_fisher_weight": 1e-30}
    return {
        "average": Case("merge.linear", {}, "average", base=False),
        "weighted average": Case("merge.linear", {"weights": (0.5, 0.2, 0.6)}, "weighted",
                                 {"weights": [0.5, 0.2, 0.6], "normalize": True}, base=False),
        "slerp": Case("merge.slerp", {"t": 0.3, "threshold": 0.999}, "slerp",
                      {"t": 0.3, "DOT_THRESHOLD": 0.999}, experts=1),
        "task arithmetic": Case("merge.task_arithmetic", {"scale": 0.4}, "task_arithmetic", {"scaling_factor": 0.4}),
        "ties, mean": Case("merge.ties", ties | {"scale": 0.8}, "ties",
                           trim | {"scaling_factor": 0.8, "merge_func": "mean"}),
        "ties, sum": Case("merge.ties", ties | {"scale": 0.5, "normalize": False}, "ties",
                          trim | {"scaling_factor": 0.5, "merge_func": "sum"}),
        "dare, the same draws": Case("merge.dare", dare | {"scale": 0.3}, "dare",
                                     {"scaling_factor": 0.3, "sparsity_ratio": DROP, "only_on_linear_weights": False}),
        "model stock": Case("merge.model_stock", {"average": "angle"}, "model_stock"),
        "model stock, two models": Case("merge.model_stock", {}, "model_stock", experts=2),
        "tsv": Case("merge.tsv", {"scale": 0.9}, "tsv", {"alpha": 0.9}),
        "iso-c": Case("merge.iso_c", {"scale": 1.2}, "iso", {"scaling_factor": 1.2}),
        "iso-cts": Case("merge.iso_c", {"scale": 1.2, "common": 0.8}, "iso",
                        {"scaling_factor": 1.2, "common_space_fraction": 0.8}),
        "regmean": Case("merge.regmean", {"per": "token", "ridge": 0.0}, "regmean",
                        {"reduce_non_diagonal_ratio": 0.9}, base=False),
        "fisher of given labels": Case("merge.fisher", {"labels": "gold", "floor": 1e-30}, "fisher",
                                       unit | {"normalize_fisher_weight": True}, base=False),
        "fisher, not balanced": Case("merge.fisher", {"labels": "gold", "floor": 1e-30, "balance": False}, "fisher",
                                     unit | {"normalize_fisher_weight": False}, base=False),
    }  # fmt: skip


def rows(python: Path, work: Path) -> Iterator[tuple[dict[str, object], dict[str, Tensor]]]:
    """The row of each case, and what fusion-bench gives.

    python: of an environment that has fusion-bench.  work: folder for models and merges.
    """
    folders, data = models(work), sources()
    for name, case in cases(entries(folders[0])).items():
        theirs = _theirs(case, folders, data, work, python)
        yield {"case": PREFIX + name, **apart(ours(case, folders, data, work / "ours"), theirs)}, theirs


def models(work: Path) -> list[Path]:
    """The folders of a base and of its experts."""
    work.mkdir(parents=True, exist_ok=True)
    base = tiny.llama(0, num_hidden_layers=3)
    folders = [work / "base", *(work / f"expert{i}" for i in range(EXPERTS))]
    for seed, folder in enumerate(folders):
        shutil.rmtree(folder, ignore_errors=True)
        (tiny.moved(base, seed, scale=0.1) if seed else base).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return folders


def sources() -> list[tiny.TinyData]:
    """What each expert is looked at with: items that differ in number and kind."""
    every = [tiny.task_data(train=40, name=f"sums{i}") for i in range(EXPERTS)]
    return [tiny.TinyData(d.name, d.train[7 * i :], d.test, scored=True) for i, d in enumerate(every)]


def entries(folder: Path) -> int:
    """Of a model's tensors."""
    return sum(t.numel() for t in read(folder).values())


def ours(case: Case, models: list[Path], data: list[tiny.TinyData], out: Path) -> dict[str, Tensor]:
    """The merge by `apply`."""
    shutil.rmtree(out, ignore_errors=True)
    given: dict[str, Any] = {"experts": models[1 : 1 + case.experts], "dtype": "fp32"}
    given |= {"base": models[0]} if case.base else {}
    given |= {"data": data} if case.call in ("regmean", "fisher") else {}
    load(case.use, **case.fields).apply(**given).save(out)
    return read(out)


def _theirs(case: Case, models: list[Path], data: list[tiny.TinyData], work: Path, python: Path):  # noqa: ANN202
    out, masks = work / "theirs.safetensors", work / "masks.safetensors"
    words = tiny.tokenizer()
    seen = [[encode(item, words) for item in source.train] for source in data]
    if case.call == "dare":
        save_file(_draws(models), masks)
    asked = {
        "base": str(models[0]), "experts": [str(f) for f in models[1 : 1 + case.experts]], "out": str(out),
        "call": case.call, "fields": case.theirs, "masks": str(masks),
        "rows": [[{"ids": row.input_ids, "labels": row.labels} for row in one] for one in seen],
    }  # fmt: skip
    peer = Path(__file__).with_name("parity_peers.py")
    done = subprocess.run([python, str(peer), "fusion-bench"], input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case.call}: {done.stderr.strip().splitlines()[-1]}")
    return load_file(out)


def _draws(models: list[Path]) -> dict[str, Tensor]:
    """What stays of every expert's change in a merge by `apply`, by expert and tensor."""
    ctx, base = Context(seed=0, step="apply"), load_file(models[0] / "model.safetensors")
    return {
        f"{i}|{name}": torch.from_numpy(below(ctx.key(name, i), 0, tensor.numel(), bound(1 - DROP))).float()
        for i in range(EXPERTS) for name, tensor in base.items()
    }  # fmt: skip


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def apart(mine: Mapping[str, Tensor], peer: Mapping[str, Tensor]) -> dict[str, object]:
    """The largest difference of any entry, relative to the largest of its tensor."""
    if set(mine) != set(peer):
        return {"largest_difference": None, "note": f"tensors {sorted(set(mine) ^ set(peer))[:4]}"}
    if shapes := [n for n in mine if mine[n].shape != peer[n].shape]:
        note = f"{shapes[0]}: {tuple(mine[shapes[0]].shape)} and {tuple(peer[shapes[0]].shape)}"
        return {"largest_difference": None, "note": note}
    far = {n: (mine[n].double() - peer[n].double()).abs() / peer[n].abs().max() for n in mine}
    worst = max(float(f.max()) for f in far.values())
    row: dict[str, object] = {"tensors": len(mine), "largest_difference": float(f"{worst:.2g}")}
    if worst > CLOSE:
        count = sum(int((f > CLOSE).sum()) for f in far.values())
        row["note"] = f"{100 * count / sum(f.numel() for f in far.values()):.1f}% of the entries"
    return row


def short(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """By tensor: how many entries, the largest magnitude, and what its entries have in common with three waves."""
    return {name: [tensor.numel(), float(tensor.abs().max()), *_waves(tensor)] for name, tensor in tensors.items()}


def differs(mine: Mapping[str, Tensor], kept: Mapping[str, list[float]]) -> str | None:
    """The first tensor that is not what was kept `short`, in words; None where all are.

    An entry that is off by d moves at least one wave by d/2 or more; rounding moves them by the root of the count.
    """
    if set(mine) != set(kept):
        return f"tensors {sorted(set(mine) ^ set(kept))[:4]}"
    for name, (count, largest, *waves) in kept.items():
        if mine[name].numel() != count:
            return f"{name} has {mine[name].numel()} entries, not {count:.0f}"
        off = max(abs(a - b) for a, b in zip(_waves(mine[name]), waves, strict=True))
        if off > CLOSE * largest * count**0.5:
            return f"{name} is off by {off / largest:.1e} of its largest entry"
    return None


def _waves(tensor: Tensor) -> list[float]:
    values_N = tensor.detach().double().flatten()
    at_N = torch.arange(values_N.numel(), dtype=torch.float64)
    return [float(values_N @ torch.cos(at_N + phase)) for phase in (0.0, 2.0, 4.0)]
