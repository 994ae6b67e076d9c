"""Merging three fine-tunes of a 135M model: Luthier against mergekit, in CPU-seconds and peak memory.

    python benchmarks/ties.py --mergekit OTHER_VENV/bin/mergekit-yaml --work FOLDER

mergekit (LGPL-3.0) is never imported here: give the command of an environment of its own, made with
`pip install torch==2.13.0 mergekit==0.1.5`. Each run is a fresh process with one torch thread, so start-up
counts; processes alternate, and ratios are of medians within this run. The checkpoints are SmolLM2-135M and
three seeded changes of it: rank 8 at 0.02 of each matrix's spread, and 2 % of the entries at 0.05.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
DENSITY, RUNS = 0.5, 3
THREE = {"weights": [1.0, 1.0, 1.0]}
FORMS = {
    "ties, mergekit's form": ("merge.ties", {"density": DENSITY, "scope": "tensor", "on_tie": "plus", **THREE}),
    "ties, the paper's form": ("merge.ties", {"density": DENSITY}),
    "task_arithmetic": ("merge.task_arithmetic", {}),
    "linear": ("merge.linear", {}),
}
PEER = {"ties": "ties, mergekit's form", "task_arithmetic": "task_arithmetic", "linear": "linear"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="the mergekit-yaml command")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and merges (4 GB)")
    parser.add_argument("--runs", type=int, default=RUNS)
    args = parser.parse_args()
    models = build(args.work)
    table = {**measure(args, models), **imports(args.mergekit)}
    show(table)
    results = HERE / "results" / "ties.json"
    results.parent.mkdir(exist_ok=True)
    about = {
        "benchmark": "ties", "command": "python benchmarks/ties.py --mergekit ... --work ...",
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(args.mergekit),
        "goal": "TIES over three 135M checkpoints: >= 5 times less CPU than mergekit 0.1.5, like for like in its form, "
        "memory independent of the number of experts",
    }  # fmt: skip
    rows = [{"what": name, **row} for name, row in table.items()]
    results.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def build(work: Path) -> list[Path]:
    """The base and three synthetic fine-tunes, as plain folders."""
    from luthier.checkpoint.resolve import resolve
    from luthier.checkpoint.writer import ShardWriter, copy_sidecars, write_folder

    base = resolve("smollm2")
    folders = []
    for seed in range(4):
        folder = work / (f"ft{seed}" if seed else "base")
        folders.append(folder)
        if folder.exists():
            continue
        with write_folder(folder) as made, ShardWriter(made, base.tensors.values()) as writer:
            copy_sidecars(base, made)
            for number, (name, tensor) in enumerate(base.items()):
                writer.write(name, 0, changed(tensor, 1000 * seed + number) if seed else tensor)
    return folders


def changed(tensor, seed: int):
    """A fine-tune's stand-in: low rank plus sparse, for matrices only."""
    import torch

    if tensor.dim() < 2:
        return tensor
    gen = torch.Generator().manual_seed(seed)
    rows, columns = tensor.shape
    x = tensor.float()
    low = torch.randn(rows, 8, generator=gen) @ torch.randn(8, columns, generator=gen) / 8**0.5
    sparse = torch.randn(x.shape, generator=gen) * (torch.rand(x.shape, generator=gen) < 0.02)
    return (x + x.std() * (0.02 * low + 0.05 * sparse)).to(tensor.dtype)


def measure(args: argparse.Namespace, models: list[Path]) -> dict[str, dict[str, float]]:
    """Every form and every peer, alternating; then ours with one and six experts, for memory."""
    out = args.work / "out"
    ours = {f"luthier {name}": mine(*form, args.work, models) for name, form in FORMS.items()}
    theirs = {f"mergekit {m}": peer(args.mergekit, m, models, args.work, out) for m in PEER}
    runs: dict[str, list] = {name: [] for name in [*ours, *theirs]}
    for turn in range(args.runs):
        for name, command in (ours | theirs).items():
            runs[name].append(run(command))
            print(f"run {turn + 1}: {name}: {runs[name][-1]}", file=sys.stderr)
    for experts in (1, 6):
        form = FORMS["ties, the paper's form"]
        command = mine(*form, args.work, [models[0], *(models[1:] * 2)[:experts]])
        runs[f"luthier ties, the paper's form, {experts} experts"] = [run(command)]
    rows = {name: summary(found) for name, found in runs.items()}
    for method, form in PEER.items():
        mine_, other = rows[f"luthier {form}"], rows[f"mergekit {method}"]
        other["cpu_ratio_to_luthier"] = round(other["cpu_s"] / mine_["cpu_s"], 2)
    paper = rows["luthier ties, the paper's form"]["cpu_s"]
    rows["mergekit ties"]["cpu_ratio_to_luthier_paper_form"] = round(rows["mergekit ties"]["cpu_s"] / paper, 2)
    return rows


def mine(method: str, fields: dict, work: Path, models: list[Path]) -> list[str]:
    """`luthier merge` of a recipe, from the command line like mergekit's."""
    base, *experts = map(str, models)
    step = {"use": method, "base": base, "experts": experts, "set": fields}
    path = work / f"{method}-{len(experts)}-{len(fields)}.yaml"
    path.write_text(json.dumps({"luthier": 1, "steps": {"merged": step}}))
    return [sys.executable, "-m", "luthier", "merge", str(path), str(work / "out" / "luthier")]


def peer(command: Path, method: str, models: list[Path], work: Path, out: Path) -> list[str]:
    """mergekit's command for the same merge: bfloat16 in and out, its own default arithmetic."""
    density = {"density": DENSITY} if method == "ties" else {}
    listed = [{"model": str(m), "parameters": {"weight": 1.0, **density}} for m in models[1:]]
    config = {"merge_method": method, "models": listed, "dtype": "bfloat16"}
    if method != "linear":
        config["base_model"] = str(models[0])
    path = work / f"{method}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return [str(command), str(path), str(out / f"mergekit-{method}"), "--quiet", "-j", "1"]


def run(command: list[str]) -> dict[str, float]:
    """CPU-seconds, wall and peak resident memory of a process that has to end well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed: {process.stderr.read().decode()[-2000:] if process.stderr else ''}")
    return {
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_s": round(time.perf_counter() - began, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    each = {key: [r[key] for r in runs] for key in runs[0]}
    return {
        "cpu_s": statistics.median(each["cpu_s"]), "cpu_s_min": min(each["cpu_s"]),
        "wall_s": statistics.median(each["wall_s"]), "peak_mib": max(each["peak_mib"]), "runs": len(runs),
    }  # fmt: skip


def imports(command: Path) -> dict[str, dict[str, float]]:
    """Start-up alone."""
    python = str(command.parent / "python")
    return {
        "import torch": run([sys.executable, "-c", "import torch"]),
        "import luthier.engine.runner": run([sys.executable, "-c", "import luthier.engine.runner"]),
        "import mergekit": run([python, "-c", "import mergekit.scripts.run_yaml"]),
    }


def show(table: dict[str, dict[str, float]]) -> None:
    print(f"{'process':46s} {'CPU s':>7s} {'wall s':>7s} {'MiB':>6s}  ratio of CPU to Luthier's")
    for name, row in table.items():
        ratio = row.get("cpu_ratio_to_luthier", "")
        print(f"{name:46s} {row['cpu_s']:7.2f} {row['wall_s']:7.2f} {row['peak_mib']:6.0f}  {ratio}")


def versions(command: Path) -> dict[str, str]:
    ask = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'), v('safetensors'))"
    other = subprocess.check_output([str(command.parent / "python"), "-c", ask], text=True).split()
    return {
        "luthier": version("luthier"), "torch": version("torch"), "python": platform.python_version(),
        "mergekit": other[0], "mergekit's torch": other[1], "mergekit's safetensors": other[2],
    }  # fmt: skip


def machine() -> dict[str, str | int | None]:
    return {
        "cpus": os.cpu_count(), "platform": platform.platform(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
