"""Checks of Transforms: streamed is the same as in memory, and nothing but the inputs decides the bytes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from luthier.catalogue import Card, find
from luthier.checkpoint.expert import open_expert
from luthier.checkpoint.reader import Checkpoint
from luthier.engine.calibration import asks
from luthier.engine.stream import run_transform, transform_tensors
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.secret import Secret
from luthier.testing import Check, adapters, must, tiny
from luthier.testing.experts import MANY, SIZES, Weights, inputs, live, models, sources
from luthier.testing.reduction import distance, same
from luthier.testing.variants import default_of, variants

CPU_SECONDS = 5.0


def checks(entry: Card) -> list[Check]:
    every = [
        runs, same_bytes, inputs_untouched, fields_matter, streamed_is_in_memory, bytes_of_nothing_else, keeps_dtype,
    ]  # fmt: skip
    if any(role.startswith("experts") for role in entry.takes):
        every += [one_expert, expert_order, refuses_other_shapes]
    if entry.experts_are == "adapters":
        every += [adapters.refuses_whole_models, adapters.onto_a_base]
    if entry.stage == "merge":
        every.append(equal_experts)
    return [Check(f.__name__.replace("_", " "), partial(f, entry)) for f in every]


def count(method: Any) -> int:
    """How many experts it is given."""
    return MANY if method.takes is None else method.takes


def outcome(method: Any, given: Mapping[str, Any]) -> Weights:
    """The merged tiny model, or adapter.

    given: {"experts": how many}, by default as many as it takes, or three; {"adapters": True}: they are adapters;
    {"rank": N}: of each matrix they change no more than that.
    """
    return _given(method, *_inputs(method, given))


def _inputs(method: Any, given: Mapping[str, Any]) -> tuple[Weights, list[Weights]]:
    are = "adapters" if given.get("adapters") else method.experts_are
    base, experts = inputs(given.get("experts", count(method)), _stage(method), are)
    return base, [_of_rank(base, expert, given["rank"]) for expert in experts] if "rank" in given else experts


def _of_rank(base: Weights, expert: Weights, rank: int) -> Weights:
    """The expert with the strongest directions of its change alone; only its matrices differ from the base."""
    made = dict(base)
    for name, matrix in base.items():
        if matrix.dim() == 2 and matrix.is_floating_point():
            u_MR, sigma_R, v_RN = torch.linalg.svd((expert[name] - matrix).double(), full_matrices=False)
            made[name] = (matrix + (u_MR[:, :rank] * sigma_R[:rank]) @ v_RN[:rank]).to(matrix)
    return made


PEERS: dict[str, Any] = {
    "base": lambda method, given: _inputs(method, given)[0],
    "identity": lambda method, given: _inputs(method, {**given, "experts": 1})[1][0],
    "mean": lambda method, given: _mean(_inputs(method, given)[1]),
}


def _stage(method: Any) -> str:
    return method.id.partition(".")[0]


def _key(method: Any) -> dict[str, Any]:
    return {"key": Secret(b"the contract's own key")} if "key" in type(method).roles else {}


def _given(method: Any, base: Weights, experts: list[Weights], back: bool = False) -> Weights:
    """What the method makes of named tensors, with its experts and their data at hand if it asks for them.

    back: the experts and their data the other way round.
    """
    roles: dict[str, Any] = {}
    if asks(method):
        roles["subjects"] = [tiny.subject(f"expert{i}", live(e)) for i, e in enumerate(experts)]
        roles["data"] = sources(len(experts))
    if back:
        experts, roles = experts[::-1], {name: several[::-1] for name, several in roles.items()}
    ctx = Context(step="contract", roles=roles | _key(method))
    under = None if method.experts_are == "adapters" else base
    return transform_tensors(method, under, experts, ctx, tiny.llama(0, **SIZES).config.to_dict())


def _mean(experts: list[Weights]) -> Weights:
    return {n: torch.stack([e[n].double() for e in experts]).mean(0).float() for n in experts[0]}


def runnable(entry: Card) -> list[tuple[Any, Weights]]:
    """Variants that take as many experts, each with its outcome. The default has to be among them."""
    found = [(method, first(method)[0]) for method in variants(find(entry.id))]
    must(found[0][1] is not None, f"{found[0][0]} refuses the tiny experts")
    return [(method, merged) for method, merged in found if merged is not None]


@cache
def first(method: Any) -> tuple[Weights | None, float]:
    """The outcome, None if the method refuses, and the CPU seconds it took: once for all checks that ask."""
    began = time.process_time()
    try:
        return outcome(method, {}), time.process_time() - began
    except LuthierError:
        return None, 0.0


def runs(entry: Card) -> None:
    """Finite, complete and quick, whatever the fields."""
    base, _ = inputs(are=entry.experts_are)
    for method, merged in runnable(entry):
        must(set(merged) == set(base), f"{method}: tensors {set(merged) ^ set(base)} came or went")
        for name, tensor in merged.items():
            must(tensor.shape == base[name].shape, f"{method}: {name} has shape {tuple(tensor.shape)}")
            must(tensor.isfinite().all(), f"{method}: {name} is not finite")
        must(first(method)[1] < CPU_SECONDS, f"{method} takes {first(method)[1]:.1f} s of CPU time at tiny size")


def same_bytes(entry: Card) -> None:
    """Same seed, same bytes."""
    for method, merged in runnable(entry):
        same(outcome(method, {}), merged, 0.0, f"{method} run twice")


def inputs_untouched(entry: Card) -> None:
    method = default_of(entry.id)
    base, experts = _inputs(method, {})
    _given(method, base, experts)
    again_base, again = _inputs(method, {})
    for mine, fresh in zip([base, *experts], [again_base, *again], strict=True):
        same(mine, fresh, 0.0, f"inputs of {entry.id}")


def one_expert(entry: Card) -> None:
    merged = outcome(default_of(entry.id), {"experts": 1})
    must(all(t.isfinite().all() for t in merged.values()), "a single expert gives what is not finite")


def expert_order(entry: Card) -> None:
    """At the defaults experts are equals: their order changes nothing but rounding; or it is said to matter."""
    method = default_of(entry.id)
    base, experts = _inputs(method, {})
    forth, back = (_given(method, base, experts, back) for back in (False, True))
    if method.ordered:
        must(any(distance(forth[n], back[n]) > 0 for n in forth), f"{entry.id} is said to be ordered, and is not")
    else:
        same(forth, back, 1e-5, f"{entry.id} with its experts in another order")


def equal_experts(entry: Card) -> None:
    """Experts that did not move give the base back, whatever the fields."""
    base, _ = inputs(are=entry.experts_are)
    tried = 0
    for method, _ in runnable(entry):
        if getattr(method, "normalize", True):  # a sum that is not normalised multiplies the model
            same(_given(method, base, [base] * (count(method))), base, 1e-6, f"{method} of equal models")
            tried += 1
    must(tried, "no variant was tried")


def fields_matter(entry: Card) -> None:
    """Each field, moved on its own from the defaults, changes the result for one of its values at least."""
    (default, plain), *others = runnable(entry)
    for name in default.to_dict()["set"]:
        moved = [merged for method, merged in others if getattr(method, name) != getattr(default, name)]
        must(moved, f"no other value of {name!r} runs on the tiny experts")
        changed = any(distance(merged[n], plain[n]) > 0 for merged in moved for n in plain)
        must(changed, f"no value of {name!r} changes anything")


def streamed_is_in_memory(entry: Card) -> None:
    """Through files and in memory: the same bytes, for every variant."""
    with tempfile.TemporaryDirectory() as temp:
        folders = _folders(Path(temp), entry)
        for i, (method, merged) in enumerate(runnable(entry)):
            same(_stream(method, folders, Path(temp) / f"out{i}"), merged, 0.0, f"{method} streamed")


def bytes_of_nothing_else(entry: Card) -> None:
    """Threads, shards and memory do not change a byte."""
    method = default_of(entry.id)
    with tempfile.TemporaryDirectory() as temp:
        whole, parts = _folders(Path(temp) / "whole", entry), _folders(Path(temp) / "parts", entry, shard="20KB")
        sharded = len(list(parts[0].glob("*.safetensors"))) > 3
        must(sharded or entry.experts_are == "adapters", "the sharded input is not sharded")  # an adapter is one file
        plain = _stream(method, whole, Path(temp) / "plain", threads=1)
        for i, (folders, options) in enumerate([
            (parts, {"threads": 1}), (whole, {"threads": 3}), (parts, {"threads": 4, "memory": 1 << 20}),
        ]):  # fmt: skip
            same(_stream(method, folders, Path(temp) / f"o{i}", **options), plain, 0.0, f"{entry.id} with {options}")


def keeps_dtype(entry: Card) -> None:
    """Models in bfloat16 give a model in bfloat16: the fp32 result, rounded once."""
    with tempfile.TemporaryDirectory() as temp:
        folders = _folders(Path(temp), entry, dtype=torch.bfloat16)
        method = default_of(entry.id)
        base, *experts = ({n: t.float() for n, t in _read(f).items()} for f in folders)
        exact = _given(method, base, experts)
        rounded = {n: t.bfloat16() for n, t in exact.items()}
        same(_stream(method, folders, Path(temp) / "out"), rounded, 0.0, f"{entry.id} in bfloat16")


def refuses_other_shapes(entry: Card) -> None:
    """An expert of another vocabulary: one line that names a tensor, and nothing is written."""
    with tempfile.TemporaryDirectory() as temp:
        folders = _folders(Path(temp), entry)
        other = Path(temp) / "other"
        if entry.experts_are == "adapters":
            folders[-1] = adapters.save(adapters.drawn(1, 2200)[0], other)
        else:
            folders[-1] = tiny.checkpoint(other, 9, vocab_size=2200)
        free = "experts*?" in entry.takes  # then it need not look at all of every expert
        for i, method in enumerate(variants(find(entry.id)) if free else [default_of(entry.id)]):
            out = Path(temp) / f"out{i}"
            try:
                _stream(method, folders, out)
            except LuthierError as fault:
                must("2200" in str(fault) and "2300" in str(fault), f"{fault} does not name both shapes")
                must(not out.exists(), "a refused merge leaves files")
                return
    raise AssertionError("experts of another shape are merged")


def _folders(where: Path, entry: Card, shard: str = "5GB", dtype: torch.dtype = torch.float32) -> list[Path]:
    """The inputs on disk: the base, then the experts."""
    if entry.experts_are == "adapters":
        return adapters.folders(where, count(find(entry.id)), shard, dtype)
    made = models(count(find(entry.id)), entry.stage)
    return [tiny.save(tiny.cast_(m, dtype), where / f"in{i}", shard) for i, m in enumerate(made)]


def _stream(method: Any, folders: list[Path], out: Path, **options: Any) -> Weights:
    base = Checkpoint.open(folders[0]) if method.experts_are == "models" else None
    experts = [open_expert(f, base) for f in folders[1:]]
    ctx = Context(step="contract", roles=({"data": sources(len(experts))} if asks(method) else {}) | _key(method))
    return _read(run_transform(method, base, experts, out, ctx, **options))


def _read(folder: Path) -> Weights:
    """All tensors of a folder in the order of the tiny model, by safetensors itself."""
    from safetensors.torch import load_file

    every = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    order = [n for n, _ in tiny.llama(0, **SIZES).named_parameters()]
    if (folder / "adapter_config.json").is_file():
        order = list(inputs(1, are="adapters")[0])
    must(set(every) == set(order), f"{folder.name} holds {set(every) ^ set(order)} too much or too little")
    return {n: every[n] for n in order}
