"""A Transform carried out in memory, as a model that is ready to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.checkpoint.writer import no_progress_bar
from luthier.engine import calibration
from luthier.engine.pieces import Memory
from luthier.engine.process import one_thread_each
from luthier.engine.spec import MEMORY
from luthier.engine.stream import _prepare, _transformed
from luthier.engine.subject import placed
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.shapes import Transform


def held(source: Any, dtype: torch.dtype) -> Memory:
    """A model's weights in memory, floating point ones in `dtype`."""
    found = {}
    for name, info in source.tensors.items():
        tensor = source.read_flat(name, 0, info.numel).view(info.shape)
        found[name] = tensor.to(dtype) if info.dtype.is_floating_point else tensor.clone()
    return Memory(found, getattr(source, "config", {}))


def composed(
    method: Transform, base: Memory, experts: Sequence[Memory], ctx: Context, threads: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, config.json) of what the method makes of models in memory, in the base's dtype.

    A tensor that is another one unchanged (`Inputs.same`) is that one, not a copy of it.
    """
    if calibration.asks(method):
        raise LuthierError("looks at models with data", where=method.id, do="search over methods that do not")
    inputs = _prepare(method, base, experts, ctx.device, MEMORY, threads)
    whole = [(name, base, info) for name, info in base.tensors.items() if not info.dtype.is_floating_point]
    whole += [(name, *inputs.made_from(name)[0]) for name in inputs.same]
    made = {name: source.read_flat(i.name, 0, i.numel).view(i.shape) for name, source, i in whole}
    rest = inputs.only(*(name for name in inputs.tensors if name not in inputs.same))
    made |= {name: torch.empty(info.shape, dtype=info.dtype) for name, info in rest.tensors.items()}

    def put(given: Any) -> None:
        for piece, result in _transformed(method, given, seen):
            flat = made[piece.name].view(-1)
            flat[piece.start : piece.start + result.numel()] = result.reshape(-1).to(flat.dtype)

    with one_thread_each():
        seen = ctx.with_(survey=method.survey(inputs, ctx))
        for _ in rest.each(put):
            pass
    return made, dict(inputs.config)


def model_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The stock model with these weights, which it shares, in eval mode."""
    import transformers

    import luthier.model  # noqa: F401  registers our own architecture with the Auto classes

    with placed(Path("memory"), "transformers cannot build the model"):
        made = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "dtype"})
        kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]
        dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
        with no_progress_bar():
            model, info = kind.from_pretrained(
                None, config=made, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
            )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise LuthierError(f"lacks {len(missing)} tensors that its config calls for, such as {missing[0]!r}")
    return model.to(device).eval()
