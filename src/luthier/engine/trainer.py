"""Trains what a Tune frees: a plain loop that owns accumulation, reduction, clipping, stepping and saving.

The loop sees nothing but the leaves of a Tuned. A step sums the gradient of (mean loss x count) over
micro-batches and processes and divides by the global count, so that it is the step of one big batch;
clips the norm over the leaves; steps; brings the model up to date; moves optimizer state where
entries have moved; and clears the gradients. Randomness is keyed by (seed, step, place), so a
resumed run needs no generator's state. Resuming is exact to the byte on one machine and thread count.

What has been run: one process and two gloo processes, on CPUs. Not run, for want of the hardware:
CUDA, MPS, FSDP2, DeepSpeed. See `engine.ddp` for what would have to be put in its place.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from luthier.engine import saved
from luthier.engine.ddp import Ranks
from luthier.engine.feed import Feed, Stream
from luthier.engine.flops import training_flops
from luthier.engine.moments import load_optimizer, optimizer_state, remap
from luthier.engine.process import ctrl_c, peak_rss
from luthier.engine.ready import ready, recompute
from luthier.engine.settings import described, must_match, settings
from luthier.engine.spec import TrainSpec
from luthier.errors import LuthierError
from luthier.flows import Data
from luthier.kit.context import Context
from luthier.kit.precision import cast_
from luthier.shapes import Objective, Optim, Tune, Tuned

__all__ = ["Interrupted", "TrainResult", "TrainSpec", "train"]


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    model: plain, without hooks or wrappers.  delta: what has changed (`checkpoint.delta.Delta`).
    history: one dict every `log_every` steps: step, loss (mean over the step's global batch), terms,
    lr, grad_norm (before clipping), tokens (so far, padding apart), seconds (so far).
    stats: steps, tokens, seconds, optimizer_state_bytes, trainable (numbers), trainable_share (of the
    model's), peak_rss (bytes, of the process).
    """

    model: nn.Module
    delta: Any
    history: list[dict[str, Any]]
    stats: dict[str, Any]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the step was finished and saved; its text says where."""


def train(
    model: nn.Module,
    tokenizer: Any,
    data: Data | Sequence[Data],
    tune: Tune,
    objective: Objective,
    optim: Optim,
    spec: TrainSpec,
    ctx: Context,
    folder: Path,
) -> TrainResult:
    """Train `model`, which must hold its base weights, from the newest good save in `folder` on.

    folder: holds nothing but saves (`engine.saved`); `saved.clear(folder)` once the result is written.
    Events: "progress" (what, done, total; total is None when tokens decide), "metrics" (an entry of
    the history under `train`), "log" (a text).
    Raises LuthierError for a loss or gradient that is not finite (naming step and last save), data
    without training items or labels, saves of other settings, and a save the disk refuses; and
    Interrupted on Ctrl-C. A second Ctrl-C stops at once, and loses what was not saved.
    """
    gc.collect()  # a model trained before this one hangs in cycles of its hooks
    sources: list[Any] = list(data) if isinstance(data, Sequence) else [data]

    def feed(ranks: Ranks) -> Feed:
        return Feed(sources, tokenizer, spec, ctx.with_(device=ranks.device), ranks.rank, ranks.world)

    return train_on(model, feed, described(sources), tune, objective, optim, spec, ctx, folder)


def train_on(
    model: nn.Module, make: Callable[[Ranks], Stream], data: Any, tune: Tune, objective: Objective, optim: Optim,
    spec: TrainSpec, ctx: Context, folder: Path,
) -> TrainResult:  # fmt: skip
    """`train` on whatever a stream gives. make: the stream of one process.  data: plain values that tell it from
    others, so that a save is not resumed by another. The model need not be a language model."""
    ranks = Ranks(ctx.device)
    ctx = ctx.with_(device=ranks.device)
    feed = make(ranks)
    was_training, stored = model.training, next(model.parameters()).dtype
    ready(model, spec, ranks)
    decided = settings(model, data, {"tune": tune, "objective": objective, "optim": optim}, spec, ctx, ranks.world)
    run = _Run(model, feed, objective, spec, ctx, Path(folder), ranks, decided)
    run.begin(tune, optim)
    with torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []), ctrl_c() as asked:
        run.go(asked)
    model.train(was_training)
    if spec.dtype == "auto":
        cast_(model, stored)  # it may have been trained in fp32 where the stored dtype is only emulated
    return run.result()


class _Run:
    """A training in progress: what a save must hold, and the step that moves it."""

    def __init__(
        self, model: nn.Module, feed: Stream, objective: Objective, spec: TrainSpec, ctx: Context, folder: Path,
        ranks: Ranks, decided: dict[str, Any],
    ):  # fmt: skip
        self.model, self.feed, self.objective, self.spec = model, feed, objective, spec
        self.ctx, self.folder, self.ranks, self.settings = ctx, folder, ranks, decided
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.last_save: Path | None = None
        self.total = spec.planned(feed.items, ranks.world)
        self.weights = sum(p.numel() for p in model.parameters())
        self.flops = training_flops(model, spec.max_length) if hasattr(model, "config") else None

    def begin(self, tune: Tune, optim: Optim) -> None:
        """Bind, load the newest save, make the optimizer."""
        found = self._find()
        self.tuned: Tuned = tune.bind(self.model, self.ctx)
        if found:
            self.tuned.load_state(found["tuned"])
        self.leaves = self.tuned.leaves()
        groups = [{**group, "lr": self.spec.lr} for group in self.tuned.groups()]
        self.optimizer: Optimizer = optim.make(self.leaves, groups)
        if found:
            load_optimizer(self.optimizer, found["optimizer"])
            buffers = dict(self.model.named_buffers())
            for name, value in found["buffers"].items():
                buffers[name].copy_(value)
            self.step, self.tokens, self.seconds = found["step"], found["tokens"], found["seconds"]
            self.history = found["history"]
        self.ranks.must_agree(self.tuned.state(), f"step {self.ctx.step}")
        self.updates: list[Any] = [m.after_step for m in self.model.modules() if hasattr(m, "after_step")]

    def _find(self) -> dict[str, Any] | None:
        place, broken = saved.newest(self.folder) if self.ranks.rank == 0 else (None, [])
        for bad in broken:
            self.ctx.emit("log", text=f"{bad} is damaged and was passed over")
        step = self.ranks.first(int(place.name.removeprefix("step-")) if place else -1)
        if step < 0:
            return None
        self.last_save = self.folder / f"step-{step:08d}"
        tree = saved.read(self.last_save, self.ranks.device)
        must_match(tree["settings"], self.settings, self.last_save)
        self.ctx.emit("log", text=f"goes on after step {step}, from {self.last_save}")
        return tree

    @property
    def complete(self) -> float:
        """The share of the training that is done."""
        return self.tokens / self.spec.tokens if self.spec.tokens else self.step / self.total  # type: ignore[operator]

    def go(self, asked: list[int]) -> None:
        """Step until done, or until Ctrl-C has been asked for on any process."""
        self.model.train()
        with closing(self.feed.stream(self.step)) as stream:
            while self.complete < 1.0:
                began = time.perf_counter()
                stop = self.advance(next(stream), bool(asked), began)
                due = self.spec.save_every and self.step % self.spec.save_every == 0
                if due or stop:
                    self.save()
                self.ctx.emit("progress", what="train", done=self.step, total=self.total)
                if stop:
                    raise Interrupted(f"stopped after step {self.step}, saved in {self.last_save}; run again to go on")

    def advance(self, batches: Sequence[Mapping[str, Tensor]], asked: bool, began: float) -> bool:
        """One step. Returns whether any process was asked to stop."""
        sums, stop = self._backward(batches, asked)
        count = sums["count"]
        if not count:
            raise LuthierError(
                f"step {self.step + 1} has no label", where=f"step {self.ctx.step}", do="raise max_length or the batch"
            )
        loss = sums.pop("loss") / count
        norm = self._scale(count)
        self._must_be_finite(loss, norm)
        done, self.step, self.tokens = self.complete, self.step + 1, self.tokens + int(sums["tokens"])
        lr = self.spec.rate(self.step, done, self.complete)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        remap(self.optimizer, self.tuned.after_step(self.step))
        for update in self.updates:
            update()
        for leaf in self.leaves:
            leaf.grad = None
        self.seconds += time.perf_counter() - began
        terms = {name.removeprefix("term/"): v / count for name, v in sums.items() if name.startswith("term/")}
        self._log({"step": self.step, "loss": loss, "terms": terms, "lr": lr, "grad_norm": norm,
                   "tokens": self.tokens, "seconds": self.seconds})  # fmt: skip
        return stop

    def _backward(self, batches: Sequence[Mapping[str, Tensor]], asked: bool) -> tuple[dict[str, float], bool]:
        """Forward and backward over the micro-batches; sums over these and all processes, on which an
        objective has to name the same terms."""
        device, mixed = self.ranks.device, self.spec.dtype == "bf16-mixed"
        sums: dict[str, Any] = {"loss": 0.0, "count": 0, "tokens": 0}
        for place, batch in enumerate(batches):
            key = self.ctx.key("forward", self.step, self.ranks.rank, place)
            torch.manual_seed(key)  # for dropout; the global generators are put back after the run
            sums["tokens"] += int(batch["attention_mask"].sum())
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                loss = self.objective.loss(self.model, batch, self.ctx.with_(seed=key))
            (loss.total * loss.count).backward()
            sums["count"] += loss.count
            for name, value in {"loss": loss.total, **{f"term/{k}": v for k, v in loss.terms.items()}}.items():
                sums[name] = sums.get(name, 0.0) + value.detach() * loss.count
        present = [leaf.grad is not None for leaf in self.leaves]
        *totals, stop = self.ranks.totals([*map(float, sums.values()), *map(float, present), float(asked)])
        self._reduce(totals[len(sums) :])
        return dict(zip(sums, totals, strict=False)), stop > 0

    def _reduce(self, present: Sequence[float]) -> None:
        """Sum the leaves' gradients over the processes; one that stands anywhere stands everywhere."""
        if self.ranks.world == 1:
            return
        here = [leaf for leaf, times in zip(self.leaves, present, strict=True) if times]
        for leaf in here:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        self.ranks.sum_([leaf.grad for leaf in here if leaf.grad is not None])

    def _scale(self, count: float) -> float:
        """Divide the gradients by the global count and clip them. Returns the norm before clipping."""
        grads = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32).to(self.ranks.device) for g in grads]
        norm = float(torch.linalg.vector_norm(torch.stack(norms))) / count if norms else 0.0
        clip = self.spec.clip
        factor = clip / norm if clip is not None and norm > clip else 1.0
        for grad in grads:
            grad.mul_(factor / count)
        return norm

    def _must_be_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        kept = f"the last good save is {self.last_save}" if self.last_save else "nothing was saved before"
        raise LuthierError(
            f"{what} at training step {self.step + 1}", where=f"step {self.ctx.step}", do=f"lower lr or clip; {kept}"
        )

    def _log(self, entry: dict[str, Any]) -> None:
        if entry["step"] % self.spec.log_every == 0 or self.complete >= 1.0:
            self.history.append(entry)
            self.ctx.emit("metrics", train=entry)

    def save(self) -> None:
        """Save the run as it stands after `self.step`; the first process writes, the others wait."""
        state = self.tuned.state()
        self.ranks.must_agree(state, f"step {self.ctx.step}")
        if self.ranks.rank == 0:
            persistent = self.model.state_dict(keep_vars=True).keys()
            tree = {
                "settings": self.settings, "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
                "history": self.history, "tuned": state, "optimizer": optimizer_state(self.optimizer),
                "buffers": {name: b for name, b in self.model.named_buffers() if name in persistent},
            }  # fmt: skip
            saved.save(self.folder, self.step, tree, self.spec.keep)
        self.ranks.wait()
        self.last_save = self.folder / f"step-{self.step:08d}"

    def result(self) -> TrainResult:
        trainable = sum(leaf.numel() for leaf in self.leaves)
        stats = {
            "steps": self.step, "tokens": self.tokens, "seconds": self.seconds,
            "optimizer_state_bytes": sum(t.nbytes for t in saved.tensors_in(list(self.optimizer.state.values()))),
            "trainable": trainable, "trainable_share": trainable / self.weights, "peak_rss": peak_rss(),
            "flops_per_token": self.flops,
        }  # fmt: skip
        delta = self.tuned.delta()
        if self.spec.checkpointing:
            recompute(self.model, False)
        return TrainResult(self.tuned.bake(), delta, self.history, stats)
