"""The size of a model before it is loaded: from the headers of its files, or from sizes in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Size:
    """What is known of a model before it is loaded."""

    params: int
    nbytes: int
    vocab: int
    width: int
    layers: int
    matrices: tuple[tuple[int, int], ...]
    """shapes of the matrices inside the blocks"""
    inside: int = 0
    """numbers in the layers, vectors among them"""

    def cut(self, layers: int) -> Size:
        """With so many layers, each taken for an average one."""
        if not self.layers or layers == self.layers:
            return self
        inside = self.inside * layers // self.layers
        params = self.params - self.inside + inside
        kept = self.matrices[: len(self.matrices) * layers // self.layers]
        nbytes = self.nbytes * params // max(1, self.params)
        return replace(self, params=params, nbytes=nbytes, layers=layers, matrices=kept, inside=inside)


def size_of(model: Any) -> Size:
    """From a Checkpoint: headers only."""
    every = [i for i in model.tensors.values() if i.layer is not None]
    inside = [i for i in every if len(i.shape) == 2]
    config = model.config.get("text_config", model.config)
    layers = 1 + max((i.layer for i in inside), default=0)
    width = config.get("hidden_size") or config.get("n_embd") or (inside[0].shape[1] if inside else 1)
    return Size(model.n_params, model.nbytes, config.get("vocab_size", 0), width, layers,
                tuple((i.shape[0], i.shape[1]) for i in inside), sum(i.numel for i in every))  # fmt: skip


def size_of_output(base: Size, plan: Any) -> Size:
    """Of what a Transform will write on a model of this size."""
    inside = [i for i in plan.tensors if i.layer is not None]
    return replace(
        base, params=sum(i.numel for i in plan.tensors), nbytes=plan.write_bytes,
        layers=1 + max((i.layer for i in inside), default=0),
        matrices=tuple((i.shape[0], i.shape[1]) for i in inside if len(i.shape) == 2),
        inside=sum(i.numel for i in inside),
    )  # fmt: skip


def size_of_new(value: Mapping[str, Any]) -> Size:
    """From the sizes of a model that is yet to be made: built without memory for its weights."""
    import torch

    from luthier.model.config import config_from
    from luthier.model.decoder import LuthierForCausalLM

    tokenizer = value["tokenizer"]
    config = config_from({"vocab_size": tokenizer["size"] if isinstance(tokenizer, Mapping) else 32000, **value["new"]})
    with torch.device("meta"):
        model = LuthierForCausalLM(config)
    every = [p for n, p in model.named_parameters() if ".layers." in f".{n}"]
    inside = [p.shape for p in every if p.dim() == 2]
    params = sum(p.numel() for p in model.parameters())
    return Size(params, 4 * params, config.vocab_size, config.hidden_size, config.num_hidden_layers,
                tuple((s[0], s[1]) for s in inside), sum(p.numel() for p in every))  # fmt: skip


def trainable(method: Any, size: Size) -> int:
    """Numbers that will train: a budget of the blocks' matrices where the method has one, else all."""
    if not hasattr(method, "lora_rank"):
        return size.params
    from luthier.kit.sparse import budget

    return sum(budget(shape, method.share, method.lora_rank) for shape in size.matrices)
