"""One mergekit YAML a method, through mergekit and through `luthier merge`: CPU-seconds and peak memory.

    python benchmarks/merges.py --mergekit OTHER_VENV/bin/mergekit-yaml --work FOLDER

SmolLM2-135M and three seeded changes of it in bfloat16, as in `ties.py`. Every run is a fresh process with one
torch thread, start-up counts, the two alternate, and ratios are of medians within this run. `limit` is the
least that could be: torch imported, four files read, summed in place tensor by tensor, one written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
from pathlib import Path

from ties import build, machine, run, summary, versions

HERE = Path(__file__).parent
RUNS = 3
METHODS = {
    "linear": {}, "slerp": {}, "task_arithmetic": {}, "model_stock": {}, "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5}, "dare_ties": {"density": 0.5}, "breadcrumbs": {"density": 0.5, "gamma": 0.01},
    "della": {"density": 0.5, "epsilon": 0.15},
}  # fmt: skip
LIMIT = """
import sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
files = [safe_open(p + "/model.safetensors", "pt") for p in sys.argv[2:]]
made = {}
for name in files[0].keys():
    total = files[0].get_tensor(name).clone()
    for file in files[1:]:
        total.add_(file.get_tensor(name))
    made[name] = total
save_file(made, sys.argv[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="the mergekit-yaml command")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and merges (4 GB)")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--only", nargs="*", default=list(METHODS), help="of the methods")
    args = parser.parse_args()
    models = build(args.work)
    commands = {}
    for method in args.only:
        path = args.work / f"{method}.yaml"
        path.write_text(json.dumps(config(method, models)))  # JSON is YAML
        out = args.work / "out" / method
        commands[f"luthier {method}"] = [sys.executable, "-m", "luthier", "merge", str(path), f"{out}-luthier"]
        commands[f"mergekit {method}"] = [str(args.mergekit), str(path), f"{out}-mergekit", "--quiet", "-j", "1"]
    (args.work / "out").mkdir(exist_ok=True)
    commands["limit"] = [sys.executable, "-c", LIMIT, str(args.work / "out" / "limit"), *map(str, models)]
    runs: dict[str, list] = {name: [] for name in commands}
    for turn in range(args.runs):
        for name, command in commands.items():
            runs[name].append(run(command))
            print(f"run {turn + 1}: {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    shutil.rmtree(args.work / "out")
    rows = {name: summary(found) for name, found in runs.items()}
    table = []
    for method in args.only:
        ours, theirs = rows[f"luthier {method}"], rows[f"mergekit {method}"]
        table.append({
            "method": method, "luthier_cpu_s": ours["cpu_s"], "mergekit_cpu_s": theirs["cpu_s"],
            "less_cpu": round(theirs["cpu_s"] / ours["cpu_s"], 2),
            "less_wall": round(theirs["wall_s"] / ours["wall_s"], 2),
            "over_limit": round(ours["cpu_s"] / rows["limit"]["cpu_s"], 2),
            "luthier_peak_mib": ours["peak_mib"], "mergekit_peak_mib": theirs["peak_mib"], "runs": args.runs,
        })  # fmt: skip
        print(table[-1])
    table.append(
        {"method": "limit", "luthier_cpu_s": rows["limit"]["cpu_s"], "luthier_peak_mib": rows["limit"]["peak_mib"]}
    )
    about = {
        "benchmark": "merges", "command": "python benchmarks/merges.py --mergekit ... --work ...",
        "goal": "less CPU and memory than mergekit 0.1.5 for the same YAML, for every method both have",
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(args.mergekit),
        "rows": table,
    }  # fmt: skip
    (HERE / "results" / "merges.json").write_text(json.dumps(about, indent=1) + "\n")


def config(method: str, models: list[Path]) -> dict:
    """Three experts in bfloat16; of slerp the base and one."""
    base, *experts = map(str, models)
    made: dict = {"merge_method": method, "dtype": "bfloat16"}
    if method != "linear":
        made["base_model"] = base
    if method == "slerp":
        return made | {"models": [{"model": base}, {"model": experts[0]}], "parameters": {"t": 0.5}}
    if method == "model_stock":
        return made | {"models": [{"model": m} for m in experts]}
    return made | {"models": [{"model": m, "parameters": {"weight": 1.0, **METHODS[method]}} for m in experts]}


if __name__ == "__main__":
    main()
