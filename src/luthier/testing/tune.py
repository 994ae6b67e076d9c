"""Checks of Tunes: only what was chosen moves, nothing dense stays, and a resumed run is the same run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.catalogue import Card, find, load
from luthier.engine.moments import remap
from luthier.flows import Remap
from luthier.kit.context import Context
from luthier.kit.sparse import budget
from luthier.testing import Check, must, tiny
from luthier.testing.reduction import same
from luthier.testing.variants import variants

STEPS = 5
CPU_SECONDS = 5.0
Weights = dict[str, Tensor]


def checks(entry: Card) -> list[Check]:
    return [Check(name, partial(f, entry)) for name, f in CHECKS.items()]


def batches(count: int) -> list[Tensor]:
    """`count` fixed batches of token ids, (4, 12) each."""
    gen = torch.Generator().manual_seed(7)
    return [torch.randint(4, tiny.VOCAB, (4, 12), generator=gen) for _ in range(count)]


def quick(cls: Any) -> list[Any]:
    """The variants, with masks that are chosen anew within the few steps of a check."""
    made = [m.replace(every=2) if getattr(m, "every", None) == 200 else m for m in variants(cls)]
    return list(dict.fromkeys(made))


class Run:
    """A tiny model under a Tune, trained step by step."""

    def __init__(self, method: Any, model: nn.Module | None = None, seed: int = 0, lr: float = 1e-2):
        self.model = (tiny.llama() if model is None else model).train()
        self.tuned = method.bind(self.model, Context(seed=seed, step="contract"))
        groups = [{**group, "lr": lr} for group in self.tuned.groups()]
        self.optimizer = load("optim.adamw", fused=False).make(self.tuned.leaves(), groups)
        self.done, self.losses, self.moves = 0, [], []

    def backward(self, ids_BT: Tensor, weight: float = 1.0) -> float:
        loss = self.model(ids_BT, labels=ids_BT).loss * weight
        loss.backward()
        return loss.item()

    def steps(self, count: int) -> Run:
        for ids_BT in batches(self.done + count)[self.done :]:
            self.losses.append(self.backward(ids_BT))
            self.step()
        return self

    def step(self) -> None:
        self.done += 1
        self.optimizer.step()
        moves = self.tuned.after_step(self.done)
        remap(self.optimizer, moves)
        self.moves += moves
        self.optimizer.zero_grad()

    def weights(self) -> Weights:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def outcome(method: Any, given: Mapping[str, Any]) -> Weights:
    """The tiny model after five steps of AdamW. given: {"targets": word} for both sides; {"dtype": name}."""
    return Run(_given(method, given), _model(given)).steps(STEPS).weights()


def _given(method: Any, given: Mapping[str, Any]) -> Any:
    return method.replace(targets=(given["targets"],)) if "targets" in given else method


def _model(given: Mapping[str, Any]) -> nn.Module:
    return tiny.llama(dtype=getattr(torch, given.get("dtype", "float32")))


def _plain(method: Any, given: Mapping[str, Any]) -> Weights:
    """A bare loop over all parameters with torch's AdamW."""
    model = _model(given).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    for ids_BT in batches(STEPS):
        optimizer.zero_grad()
        model(ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


PEERS: dict[str, Callable[..., Weights]] = {"plain training": _plain}


def descends(entry: Card) -> None:
    """Loss on one batch goes down, quickly, whatever the fields."""
    began = time.process_time()
    tried = quick(find(entry.id))
    for method in tried:
        run = Run(method)
        losses = []
        for _ in range(8):
            losses.append(run.backward(batches(1)[0]))
            run.step()
        must(losses[-1] < losses[0] - 1e-3, f"{method}: the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    must((time.process_time() - began) / len(tried) < CPU_SECONDS, "over 5 s of CPU time at tiny size")


def untouched_by_bind(entry: Card) -> None:
    """Binding changes no weight, and neither does a backward pass."""
    for method in quick(find(entry.id)):
        run = Run(method)
        run.backward(batches(1)[0])
        same(run.weights(), dict(tiny.llama().named_parameters()), 0.0, f"{method} before the first step")


def budget_honoured(entry: Card) -> None:
    """As many entries train as the fields say, and while the mask stands no other entry moves."""
    for method in quick(find(entry.id)):
        fixed = method.replace(every=None) if hasattr(method, "every") else method
        run = Run(fixed).steps(3)
        allowed = sum(leaf.numel() for leaf in run.tuned.leaves())
        base = tiny.llama().state_dict()
        moved = sum(int((p != base[name]).sum()) for name, p in run.weights().items())
        must(0 < moved <= allowed, f"{fixed}: {moved} entries moved, {allowed} may")
        if hasattr(method, "lora_rank"):
            indices = run.tuned.indices()
            for name, index in indices.items():
                k, size = budget(base[name].shape, method.share, method.lora_rank), method.block**2
                k = max(1, round(k / size)) * size
                must(index.numel() == k, f"{method}: {index.numel()} entries of {name}, {k} asked for")
                must(bool((index[1:] > index[:-1]).all()), f"{method}: indices of {name} do not ascend")


def frozen_stay(entry: Card) -> None:
    """What is not a target keeps its bytes."""
    method = find(entry.id)()
    method = method.replace(targets=("*.mlp.down_proj.weight",)) if hasattr(method, "targets") else method
    run, base = Run(method).steps(3), tiny.llama().state_dict()
    moved = {name for name, p in run.weights().items() if not torch.equal(p, base[name])}
    must(moved and (not hasattr(method, "targets") or all("down_proj" in n for n in moved)), f"{sorted(moved)} moved")


def same_seed(entry: Card) -> None:
    """Same seed, same bytes, whatever the global generator has been through."""
    for method in quick(find(entry.id)):
        first = Run(method).steps(3).weights()
        torch.rand(3)
        same(Run(method).steps(3).weights(), first, 0.0, f"{method} run twice")


def nothing_dense_stays(entry: Card) -> None:
    """After backward only leaves hold a gradient, and what does not train asks for none."""
    run = Run(find(entry.id)())
    run.backward(batches(1)[0])
    leaves = {id(leaf) for leaf in run.tuned.leaves()}
    left = [n for n, p in run.model.named_parameters() if p.grad is not None and id(p) not in leaves]
    must(not left, f"dense gradients stay: {left[:3]}")
    must(all(leaf.grad is not None for leaf in run.tuned.leaves()), "a leaf got no gradient")


def accumulates(entry: Card) -> None:
    """Two halves of a batch give the gradient of the whole, to rounding."""
    whole, halves = Run(find(entry.id)()), Run(find(entry.id)())
    ids_BT = batches(1)[0]
    whole.backward(ids_BT)
    for half in ids_BT.split(2):
        halves.backward(half, 0.5)
    for a, b in zip(whole.tuned.leaves(), halves.tuned.leaves(), strict=True):
        must((a.grad - b.grad).abs().max() <= 1e-6 + 1e-4 * a.grad.abs().max(), "halves do not add up")  # type: ignore[operator]


def resumes(entry: Card) -> None:
    """Saved as plain tensors between any two steps and resumed on the base: the same bytes as without a break."""
    from safetensors.torch import load as read
    from safetensors.torch import save as write

    for method in quick(find(entry.id)):
        through = Run(method).steps(STEPS).weights()
        first = Run(method).steps(3)
        saved, moments = write(first.tuned.state()), copy.deepcopy(first.optimizer.state_dict())
        again = Run(method)
        again.tuned.load_state(read(saved))
        again.optimizer.load_state_dict(moments)
        again.done = 3
        same(again.weights(), first.weights(), 0.0, f"{method} just resumed")
        same(again.steps(STEPS - 3).weights(), through, 0.0, f"{method} resumed")
        changed, straight = tiny.llama(), Run(method).steps(STEPS)
        again.tuned.delta().apply_(changed)
        same(dict(changed.named_parameters()), straight.weights(), 0.0, f"delta of {method}, resumed")


def moves_are_sound(entry: Card) -> None:
    """Remaps name each old entry at most once and none that is not there; methods without them give none."""
    for method in quick(find(entry.id)):
        run = Run(method).steps(STEPS)
        for move in run.moves:
            kept = move.source[move.source >= 0]
            must(
                isinstance(move, Remap) and move.source.shape == move.leaf.shape, f"{method}: a remap of another shape"
            )
            must(kept.unique().numel() == kept.numel(), f"{method}: an old entry goes to two places")
            must(int(move.source.max()) < move.leaf.numel(), f"{method}: a source that is not there")
        due = getattr(method, "every", None)
        must(bool(run.moves) == bool(due and due <= STEPS), f"{method}: {len(run.moves)} remaps")


def delta_reverts(entry: Card) -> None:
    """The delta turns the base into the result and back, to the byte, also after a save."""
    import tempfile

    from luthier.checkpoint.delta import Delta

    for method in quick(find(entry.id)):
        run = Run(method).steps(STEPS)
        with tempfile.TemporaryDirectory() as folder:
            delta = Delta.open(run.tuned.delta().save(f"{folder}/delta"))
            model = tiny.llama()
            delta.apply_(model)
            same(dict(model.named_parameters()), run.weights(), 0.0, f"delta of {method} applied")
            delta.revert_(model)
            same(dict(model.named_parameters()), tiny.llama().state_dict(), 0.0, f"delta of {method} reverted")


def bakes_plain(entry: Card) -> None:
    """What is handed back has no hooks, parametrizations or gradients, and asks for gradients as before."""
    model = tiny.llama()
    list(model.parameters())[1].requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    run = Run(find(entry.id)(), model).steps(2)
    run.backward(batches(1)[0])
    baked = run.tuned.bake()
    must(baked is model, "another model comes back")
    must({n: p.requires_grad for n, p in baked.named_parameters()} == before, "requires_grad is not as it was")
    must(list(baked.state_dict()) == list(tiny.llama().state_dict()), "names have changed")
    must(all(p.grad is None for p in baked.parameters()), "gradients stay")
    must(not any(p._post_accumulate_grad_hooks for p in baked.parameters()), "hooks stay")  # type: ignore[attr-defined]


def half_precision(entry: Card) -> None:
    """A model in bfloat16 stays in bfloat16 and finite."""
    run = Run(find(entry.id)(), tiny.llama(dtype=torch.bfloat16)).steps(3)
    for name, p in run.weights().items():
        must(p.dtype == torch.bfloat16 and bool(p.isfinite().all()), f"{name} is {p.dtype} or not finite")


CHECKS: dict[str, Callable[[Card], None]] = {
    f.__name__.replace("_", " "): f
    for f in (
        descends, untouched_by_bind, budget_honoured, frozen_stay, same_seed, nothing_dense_stays, accumulates,
        resumes, moves_are_sound, delta_reverts, bakes_plain, half_precision,
    )
}  # fmt: skip
"""Each check by name, a callable of the method's card."""
