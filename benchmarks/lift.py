"""LIFT on the 135M model: its mask against one SVD a matrix, its state and its step against AdamW on everything.

    OMP_NUM_THREADS=1 python benchmarks/lift.py

Masks: every matrix of the blocks (210), at the default rank and a share of 5 %, as the method picks them.
For the refresh the selected entries have moved by noise of 0.1 of the matrix's spread, more than a run's
learning rate moves them; the warm mask is judged against the exact mask of the moved matrix. Steps: fp32,
8 x 96 tokens, alternating, after one untimed step each; ratios are of medians within this run. Imports
are outside every time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from luthier.catalogue import load
from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.resolve import resolve
from luthier.kit.context import Context
from luthier.kit.sparse import budget
from luthier.kit.top import jaccard

HERE = Path(__file__).parent
SHARE = 0.05


GOALS = [
    "exact mask >= 2 times faster than SVD at Jaccard >= 0.999, warm refresh >= 6 times at >= 0.98",
    "optimizer bytes ratio <= 0.1 of AdamW's, step ratio <= 1",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="how many layers' matrices to measure")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each kind")
    args = parser.parse_args()
    base = resolve("smollm2")
    found, run = masks(base, args.layers), training(base, args.steps)
    shown = ("matrices", "exact_speedup", "exact_jaccard_mean", "warm_speedup", "warm_jaccard_mean", "warm_jaccard_min")
    rows = [{"what": f"mask, {role}", **{key: row[key] for key in shown}} for role, row in found.items()]
    rows += [{"what": f"training, {key.replace('_', ' ')}", "value": value} for key, value in run.items()]
    result = {"rows": rows, "masks": found, "training": run}
    about = {
        "benchmark": "lift", "goal": GOALS, "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "threads": torch.get_num_threads()},
        "versions": {n: version(n) for n in ("luthier", "torch", "transformers", "numpy")},
        "notes": ["the weights are dequantised Q4_1; speedups are against one SVD a matrix"],
    }  # fmt: skip
    path = HERE / "results" / "lift.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**about, **result}, indent=1) + "\n")


def masks(base: Checkpoint, layers: int) -> dict[str, dict[str, float]]:
    """Per role and in all: seconds of the three ways, and how well the masks agree."""
    rows: dict[str, list[dict[str, float]]] = {}
    for info in base.tensors.values():
        if info.layer is not None and info.layer < layers and len(info.shape) == 2:
            rows.setdefault(info.role, []).append(one_matrix(base.read(info.name).float(), info.start))
    table = {role: summed(found) for role, found in rows.items()}
    table["all"] = summed([row for found in rows.values() for row in found])
    print(f"{'role':10s} {'SVD s':>8s} {'exact s':>8s} {'x':>6s} {'J min':>7s} {'warm s':>7s} {'x':>6s} {'J min':>7s}")
    for role, r in table.items():
        exact = f"{r['exact_s']:8.2f} {r['exact_speedup']:6.1f} {r['exact_jaccard_min']:7.4f}"
        warm = f"{r['warm_s']:7.2f} {r['warm_speedup']:6.1f} {r['warm_jaccard_min']:7.4f}"
        print(f"{role:10s} {r['svd_s']:8.2f} {exact} {warm}")
    return table


def one_matrix(W_MN: torch.Tensor, seed: int) -> dict[str, float]:
    method = load("tune.lift", share=SHARE)
    svd_s, by_svd = clock(lambda: svd_mask(W_MN))
    exact_s, (exact, vectors) = clock(lambda: method.mask(W_MN))
    moved_MN, gen = W_MN.clone(), torch.Generator().manual_seed(seed)
    moved_MN.view(-1)[exact] += 0.1 * W_MN.std() * torch.randn(exact.numel(), generator=gen)
    warm_s, (warm, _) = clock(lambda: method.mask(moved_MN, vectors))
    truth = method.mask(moved_MN)[0]
    return {
        "svd_s": svd_s, "exact_s": exact_s, "warm_s": warm_s, "exact_jaccard": jaccard(by_svd.int(), exact),
        "warm_jaccard": jaccard(warm, truth), "stale_jaccard": jaccard(exact, truth),
    }  # fmt: skip


def svd_mask(W_MN: torch.Tensor) -> torch.Tensor:
    """The paper's way: one SVD, the approximation written out, topk."""
    rank = max(1, round(min(W_MN.shape) / 32))
    U, S, Vh = torch.linalg.svd(W_MN, full_matrices=False)
    low = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return low.abs().view(-1).topk(budget(W_MN.shape, SHARE, None)).indices


def summed(rows: list[dict[str, float]]) -> dict[str, float]:
    total = {key: sum(r[key] for r in rows) for key in ("svd_s", "exact_s", "warm_s")}
    found = {key: round(value, 3) for key, value in total.items()} | {"matrices": len(rows)}
    for way in ("exact", "warm"):
        found[f"{way}_speedup"] = round(total["svd_s"] / total[f"{way}_s"], 2)
    for way in ("exact", "warm", "stale"):
        each = [r[f"{way}_jaccard"] for r in rows]
        found |= {f"{way}_jaccard_min": round(min(each), 5), f"{way}_jaccard_mean": round(statistics.mean(each), 5)}
    return found


class Trainer:
    """A model under a Tune and AdamW, one step at a time."""

    def __init__(self, base: Checkpoint, tune: str, **fields: object):
        self.model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).train()
        self.tuned = load(tune, **fields).bind(self.model, Context(step="benchmark"))
        groups = [{**group, "lr": 1e-4} for group in self.tuned.groups()]
        self.optimizer = load("optim.adamw").make(self.tuned.leaves(), groups)
        self.objective, self.done = load("objective.next_token"), 0

    def step(self, ids_BT: torch.Tensor) -> float:
        began = time.perf_counter()
        batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT}
        self.objective.loss(self.model, batch, Context()).total.backward()
        self.done += 1
        self.optimizer.step()
        self.tuned.after_step(self.done)
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def bytes(self) -> int:
        """All the optimizer holds, and what a Tune keeps for it besides the model: leaves and indices."""
        kept = [v for state in self.optimizer.state.values() for v in state.values()]
        own = {id(p) for p in self.model.parameters()}
        kept += [leaf for leaf in self.tuned.leaves() if id(leaf) not in own]
        kept += list(self.tuned.indices().values()) if hasattr(self.tuned, "indices") else []
        return sum(t.nbytes for t in kept)


def training(base: Checkpoint, steps: int) -> dict[str, float]:
    """Seconds a step and bytes of state: LIFT at 5 % of all block matrices, AdamW on every parameter."""
    ids_BT = torch.randint(0, 49152, (8, 96), generator=torch.Generator().manual_seed(0))
    sides = {"full": Trainer(base, "tune.full"), "lift": Trainer(base, "tune.lift", share=SHARE)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(steps + 1):
        for name, side in sides.items():
            spent = side.step(ids_BT)
            times[name] += [spent] if turn else []
    moments = {n: sum(v.nbytes for s in t.optimizer.state.values() for v in s.values()) for n, t in sides.items()}
    found = {f"{name}_step_s": round(statistics.median(each), 3) for name, each in times.items()}
    found |= {f"{name}_optimizer_bytes": moments[name] for name in sides}
    found |= {f"{name}_state_bytes": side.bytes() for name, side in sides.items()}
    found["step_ratio"] = round(found["lift_step_s"] / found["full_step_s"], 3)
    found["optimizer_bytes_ratio"] = round(moments["lift"] / moments["full"], 4)
    found["state_bytes_ratio"] = round(found["lift_state_bytes"] / found["full_state_bytes"], 4)
    for key, value in found.items():
        print(f"{key:22s} {value}")
    return found


def clock(action):
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()
