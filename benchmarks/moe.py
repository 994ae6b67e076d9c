"""One layer of experts, forward and backward: luthier's function against transformers' and against the matmuls alone.

    OMP_NUM_THREADS=1 python benchmarks/moe.py

4096 tokens, SwiGLU experts of stock OLMoE classes, seeded choices that are uneven (the fullest expert's
load over the mean is printed). `limit` is the same work as six plain matrix products on one dense matrix,
two forward and four backward, with nothing between. All ways take turns within each round; a cell is the
median over rounds of
the ratio within a round, of wall time (CPU time beside it). The loss and all gradients of the three
implementations are compared before anything is timed. Imports are outside every time.
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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

import luthier.model  # registers luthier's experts

HERE = Path(__file__).parent
GOALS = ["fp32: at most 1.5 times the limit, at least 1.2 times faster than transformers' default (grouped_mm)"]
NOTES = [
    "fp32: what is left over the limit are gathers, elementwise passes and adding back, each near the speed of cache; "
    "the narrower the layer, the larger their share. The default's own ratio depends on what stands before it in "
    "memory: with fresh pages it is slower (up to 2.1 times the limit at width 256), with warm ones as in the table.",
    "bf16: a CPU without bf16 units emulates its products, at a fifth of fp32's speed here, so all three are one and "
    "the same product. Where there are such units, products shrink about fivefold and the passes between them would "
    "show: activation, gate and routing weight in one compiled pass, and gathers inside the product, would close that.",
    "few tokens: below some hundred the calls themselves cost more than the work; ours is then level with the default.",
]
LAYERS = [  # width, inner width, experts, experts a token
    (512, 256, 64, 8), (384, 512, 32, 4), (512, 512, 16, 4), (256, 256, 16, 4),
]  # fmt: skip
WAYS = ("limit", "grouped_mm", "luthier")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    assert luthier.model
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in LAYERS:
            rows.append(row(sizes, dtype, args.tokens, args.rounds))
            print({k: v for k, v in rows[-1].items() if not isinstance(v, dict)}, flush=True)
    rows += [row(LAYERS[0], torch.float32, few, args.rounds * 4) for few in (256, 64)]
    about = {
        "benchmark": "moe", "goal": GOALS, "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "threads": torch.get_num_threads(),
                    "bf16 units": "amx_bf16" in cpu_flags() or "avx512_bf16" in cpu_flags()},
        "versions": {n: version(n) for n in ("luthier", "torch", "transformers")},
        "notes": NOTES, "rows": rows,
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "moe.json").write_text(json.dumps(about, indent=1) + "\n")


def row(sizes: tuple[int, int, int, int], dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, object]:
    D, inner, E, K = sizes
    g = torch.Generator().manual_seed(0)
    experts = OlmoeExperts(OlmoeConfig(hidden_size=D, intermediate_size=inner, num_experts=E, num_experts_per_tok=K))
    for p in experts.parameters():
        p.data = (torch.randn(p.shape, generator=g) * 0.05).to(dtype)
    pull_E = torch.randn(E, generator=g)
    choice = (torch.randn(tokens, E, generator=g) + pull_E).softmax(-1).topk(K, dim=-1)
    x_ND = torch.randn(tokens, D, generator=g).to(dtype).requires_grad_()
    weight_NK, index_NK = choice.values.to(dtype).requires_grad_(), choice.indices
    dy_ND = torch.randn(tokens, D, generator=g).to(dtype)
    leaves = [x_ND, weight_NK, *experts.parameters()]

    def layer(way: str) -> list[Tensor]:
        experts.config._experts_implementation = way
        y_ND = experts(x_ND, index_NK, weight_NK)
        return [y_ND, *torch.autograd.grad(y_ND, leaves, dy_ND)]

    limit = six_products(tokens * K, D, inner, dtype, g)
    ways: dict[str, Callable[[], object]] = {w: (lambda w=w: layer(w)) for w in WAYS[1:]} | {"limit": limit}
    agreed(layer("grouped_mm"), layer("luthier"), dtype)
    limit()
    times = [{way: clock(ways[way]) for way in WAYS} for _ in range(rounds)]
    load_E = torch.bincount(index_NK.flatten(), minlength=E).float()

    def ratio(above: str, below: str, kind: int) -> float:
        return round(statistics.median(t[above][kind] / t[below][kind] for t in times), 3)

    return {
        "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "width": D, "inner": inner, "experts": E,
        "top_k": K, "fullest_over_mean": round((load_E.max() / load_E.mean()).item(), 2),
        "over_limit": ratio("luthier", "limit", 0), "default_over_limit": ratio("grouped_mm", "limit", 0),
        "faster_than_default": ratio("grouped_mm", "luthier", 0),
        "faster_than_default_cpu": ratio("grouped_mm", "luthier", 1),
        "limit_gflops": round(6 * 2 * tokens * K * D * inner * 1.5 / min(t["limit"][0] for t in times) / 1e9, 1),
    }  # fmt: skip


def six_products(rows: int, D: int, inner: int, dtype: torch.dtype, g: torch.Generator) -> Callable[[], None]:
    x_RD, wide_GD = (torch.randn(*s, generator=g).to(dtype) for s in ((rows, D), (2 * inner, D)))
    a_RF, down_DF = (torch.randn(*s, generator=g).to(dtype) for s in ((rows, inner), (D, inner)))
    h_RG, y_RD = torch.empty(rows, 2 * inner, dtype=dtype), torch.empty(rows, D, dtype=dtype)

    def run() -> None:
        torch.mm(x_RD, wide_GD.T, out=h_RG)
        torch.mm(a_RF, down_DF.T, out=y_RD)
        torch.mm(y_RD, down_DF, out=a_RF)
        torch.mm(y_RD.T, a_RF, out=torch.empty_like(down_DF))
        torch.mm(h_RG, wide_GD, out=y_RD)
        torch.mm(h_RG.T, x_RD, out=torch.empty_like(wide_GD))
        a_RF.clamp_(-1, 1)  # or the values grow from round to round; counted, and small

    return run


def agreed(peer: list[Tensor], ours: list[Tensor], dtype: torch.dtype) -> None:
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(peer, ours, strict=True):
        off = ((a.float() - b.float()).norm() / a.float().norm()).item()
        assert off < bound, f"the implementations differ by {off:.1e}"


def clock(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


if __name__ == "__main__":
    main()
