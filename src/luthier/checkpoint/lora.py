"""PEFT LoRA adapter folders, read and written: `adapter_config.json` and `adapter_model.safetensors`.

A matrix W (out, in) becomes W + s·B·A with A (r, in), B (out, r) and s = alpha/r, or alpha/√r with
rsLoRA. What would need more than the adapter's two matrices (DoRA, biases, ...) is refused by name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from luthier.checkpoint.atomic import write_folder
from luthier.checkpoint.header import CODES, Entry, fault, read_header, read_json
from luthier.checkpoint.patterns import Patterns, positive
from luthier.checkpoint.reader import inside
from luthier.errors import LuthierError

_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.lora_(?:(embedding)_)?([AB])(?:\.weight)?")
_FACTOR = re.compile(r"(.+\.lora_(?:embedding_)?)([AB])((?:\.weight)?)")
_BEYOND = (
    "use_dora", "lora_bias", "use_qalora", "target_parameters", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "velora_config",
)  # fmt: skip


_EMBED, _HEAD = ("embed_tokens", "wte", "embed_in"), "lm_head"


@dataclass(frozen=True)
class LowRank:
    """A change s·B·A of one matrix. a: (r, in).  b: (out, r).  transposed: the weight on disk is (in, out).

    full: the weight to start from instead of the base's: PEFT's modules_to_save (then a and b are empty),
    or the copy of an embedding it keeps with its adapter.
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False
    full: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.full is not None and not self.a.numel():
            return tuple(self.full.shape)
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.full is None else self.full.nbytes)

    def delta(self) -> Tensor:
        """The product alone, fp32, in the weight's own orientation."""
        product = (self.b.float() @ self.a.float()) * self.scale
        return product.T if self.transposed else product

    def onto(self, weight: Tensor) -> Tensor:
        """The weight with the change added in fp32, in the weight's dtype."""
        start = weight if self.full is None else self.full.to(weight.device)
        return (start.float() + self.delta().to(weight.device)).to(weight.dtype) if self.a.numel() else start.to(weight)

    def norm(self) -> float:
        """Euclidean length of the change, from the small Gram matrices; nan where a tensor is replaced whole."""
        if self.full is not None:
            return math.nan
        a, b = self.a.double(), self.b.double()
        return abs(self.scale) * float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def open_adapter(folder: Path) -> tuple[dict[str, LowRank], str, dict[str, Any]]:
    """Changes by tensor name, base hash (unknown: ""), notes, of a PEFT LoRA adapter folder."""
    config = read_json(inside(folder, "adapter_config.json"), limit=8_000_000)
    refuse_beyond(config, folder)
    file = weights_of(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in _load(file):
        weight, key = part_of(entry, file)
        parts.setdefault(weight, {})[key] = tensor
    if not parts:
        raise LuthierError("holds not one tensor", where=str(file))
    alphas = Patterns("alpha_pattern", config.get("alpha_pattern"), str(folder / "adapter_config.json"))
    changes = {name: _low_rank(name, found, config, alphas, file) for name, found in parts.items()}
    head = changes.get(f"{_HEAD}.weight")
    if config.get("ensure_weight_tying") and head is not None and head.full is not None:
        _drop_tied(changes, head.full, file)
    return changes, "", {"base_model": config.get("base_model_name_or_path")}


def weights_of(folder: Path) -> Path:
    """The file of an adapter's tensors; LuthierError where there is none that can be trusted."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        what = "adapter_model.bin is a pickle, which can run any program when it is read: refused"
        raise LuthierError(what if pickled else "holds no adapter_model.safetensors", where=str(folder))
    return inside(folder, file.name)


def part_of(entry: Entry, file: Path) -> tuple[str, str]:
    """(the weight a tensor belongs to, what it is of it: A, B, Ae or Be of an embedding, or full)."""
    if not entry.name.startswith(_PREFIX):
        raise fault(file, f"the name does not begin with {_PREFIX}", entry.name)
    if not entry.dtype.is_floating_point:
        raise fault(file, f"is of {CODES[entry.dtype]}, a change is of floating-point numbers", entry.name)
    found = _PART.fullmatch(entry.name.removeprefix(_PREFIX))
    if found:
        return found[1] + ".weight", found[3] + ("e" if found[2] else "")
    return entry.name.removeprefix(_PREFIX).replace(".base_layer.", "."), "full"


def factor_of(name: str) -> tuple[str, str] | None:
    """A or B, and the name of the weight's other factor; None for a tensor that is no factor."""
    found = _FACTOR.fullmatch(name)
    return (found[2], found[1] + "BA"["AB".index(found[2])] + found[3]) if found else None


def _drop_tied(changes: dict[str, LowRank], head: Tensor, file: Path) -> None:
    """A tied head is the embedding, once."""
    embeds = [c.full for n, c in changes.items() if n.removesuffix(".weight").endswith(_EMBED)]
    if not any(full is not None and torch.equal(full, head) for full in embeds):
        raise fault(file, "is tied to the embedding, and differs from it", f"{_HEAD}.weight")
    del changes[f"{_HEAD}.weight"]


def refuse_beyond(config: Mapping[str, Any], folder: Path) -> None:
    where = str(folder / "adapter_config.json")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LuthierError(
            f"an adapter of type {kind!r}; only LORA is read", where=where, do="merge it with PEFT first"
        )
    odd = next((key for key in _BEYOND if config.get(key)), None)
    if odd is None and config.get("bias", "none") != "none":
        odd = "bias"
    if odd:
        raise LuthierError(
            f"the adapter uses {odd}, which two matrices cannot express", where=where, do="merge it with PEFT first"
        )
    if not (positive(config.get("r")) and positive(config.get("lora_alpha"))):
        raise LuthierError("r and lora_alpha should be numbers above 0", where=where)
    Patterns("rank_pattern", config.get("rank_pattern"), where)


def _load(file: Path) -> Iterator[tuple[Entry, Tensor]]:
    raw = file.read_bytes()
    for e in read_header(file)[0]:
        if e.nbytes:
            yield e, torch.frombuffer(bytearray(raw[e.start : e.start + e.nbytes]), dtype=e.dtype).view(e.shape)


def _low_rank(
    name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], alphas: Patterns, file: Path
) -> LowRank:  # fmt: skip
    if set(parts) == {"full"}:
        none = torch.empty(0, 0)
        return LowRank(none, none, 1.0, full=parts["full"])
    embedding = "Ae" in parts
    a, b = (parts.get(key + "e" * embedding) for key in "AB")
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise fault(file, "lora_A and lora_B are missing or do not match", name)
    rank, module = a.shape[0], name.removesuffix(".weight")
    alpha = alphas.value(module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(a, b, scale, embedding or bool(config.get("fan_in_fan_out")), parts.get("full"))


def save_adapter(
    folder: str | os.PathLike[str], changes: Mapping[str, LowRank], base_model: str | None = None, tied: bool = False
) -> Path:  # fmt: skip
    """Write an adapter folder that PEFT loads: pairs of factors of one orientation, and whole tensors beside them.

    tied: a whole embedding is the head's, too, and written as both, which PEFT wants.
    LuthierError for a change that is both whole and factors.
    """
    pairs = {n.removesuffix(".weight"): c for n, c in changes.items() if c.full is None}
    whole = {n.removesuffix(".weight"): c.full for n, c in changes.items() if c.full is not None}
    embed = next((full for module, full in whole.items() if module.endswith(_EMBED)), None)
    if tied and embed is not None:
        whole[_HEAD] = embed.clone()
    ways = {change.transposed for change in pairs.values()}
    if len(ways) != 1 or any(c.a.numel() for c in changes.values() if c.full is not None):
        raise LuthierError("an adapter holds matrices of one orientation only", where=str(folder))
    ranks = {module: change.a.shape[0] for module, change in pairs.items()}
    alphas = {module: change.scale * ranks[module] for module, change in pairs.items()}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": max(ranks.values()), "lora_alpha": max(alphas.values()), "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": ways.pop(), "use_rslora": False, "target_modules": sorted(pairs),
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items()},
        "alpha_pattern": {re.escape(module): alpha for module, alpha in alphas.items()},
        "modules_to_save": sorted(whole) or None, "ensure_weight_tying": tied and embed is not None,
    }  # fmt: skip
    tensors = {f"{_PREFIX}{m}.lora_{part}.weight": getattr(c, part.lower()) for m, c in pairs.items() for part in "AB"}
    tensors |= {f"{_PREFIX}{module}.weight": full for module, full in whole.items() if full is not None}
    with write_folder(folder) as temp:
        (temp / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(
            {n: t.cpu().contiguous() for n, t in tensors.items()}, temp / "adapter_model.safetensors", {"format": "pt"}
        )
    return Path(folder)
