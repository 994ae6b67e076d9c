"""What a plan says of each merge, and what it takes: wall seconds and peak memory of whole processes.

    python benchmarks/plan.py --work FOLDER [--size 135M] [--only merge.ties ...]

`luthier plan` is asked first, which reads headers only, then `luthier merge` does it: a base and three experts of
`merge_inputs.py`, one expert where a method takes one, with one thread and with two. Methods with data look at
eight items of each expert's. Rows of earlier runs stay for what is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from merge import HERE, build

RESULTS = HERE / "results" / "plan.json"
METHODS = {
    **{f"merge.{name}": {} for name in (
        "linear", "task_arithmetic", "interpolate", "slerp", "ties", "dare", "della", "breadcrumbs", "cabs", "pcb",
        "widen", "model_stock", "iso_c", "tsv")},
    "merge.iso_c, common 0.8": {"common": 0.8},
    **{f"merge.{name}": {"examples": 8} for name in ("fisher", "regmean", "sens")},
    "protect.mergelock": {}, "protect.restore": {},
}  # fmt: skip
ONE, DATA = ("merge.interpolate", "merge.slerp", "protect.restore"), ("merge.fisher", "merge.regmean", "merge.sens")
SUMS = {"source": "gym:chain_sum", "split": {"by": "hash", "train": 64, "test": 8}}


NOTES = [
    "What Fisher, RegMean, Sens and Iso-CTS (common 0.8) took was measured before whole tensors went by twos, hours "
    "earlier; their plans are of today's code.",
    "Fisher's and Sens' scratch files count as memory where they are mapped.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and merges")
    parser.add_argument("--size", default="135M")
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--replan", action="store_true", help="ask for plans alone; what merges took stays")
    args = parser.parse_args()
    models = build(args.work, args.size)
    (args.work / "key").write_text("a key of the benchmark, which protects nothing\n")
    rows = []
    for method in args.only:
        for threads in (1, 2):
            recipe = args.work / "plan.yaml"
            recipe.write_text(json.dumps(written(method, models, threads, args.work / "key")))  # is YAML
            row = {"models": args.size, "what": method, "threads": threads}
            before = next((r for r in earlier() if all(r[k] == v for k, v in row.items())), {}) if args.replan else {}
            rows.append(row | before | planned(recipe) | ({} if before else taken(recipe, args.work / "planned")))
            print(rows[-1], file=sys.stderr, flush=True)
    save(rows)


def written(method: str, models: list[Path], threads: int, key: Path) -> dict:
    use, (base, *experts) = method.partition(",")[0], [str(model) for model in models]
    step: dict = {"use": use, "set": METHODS[method]}
    made: dict = {"luthier": 1, "hardware": {"threads": threads}, "steps": {"merged": step}}
    if use == "protect.mergelock":
        step |= {"model": experts[0], "key": str(key)}
        return made
    step |= {"base": base, "experts": experts[:1] if use in ONE else experts}
    if use in DATA:
        made["data"] = {"sums": SUMS}
        step["data"] = ["sums"] * len(experts)
    return made


def planned(recipe: Path) -> dict:
    """Seconds and MiB as `luthier plan` says them, and how long it took to say so."""
    begun = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "luthier",
        "plan",
        str(recipe),
        "--folder",
        str(recipe.parent / "no-run"),
        "--json",
    ]
    step = json.loads(subprocess.check_output(command))["steps"][0]
    return {
        "planned_s": round(step["seconds"], 1), "planned_mib": step["memory"] >> 20,
        "plan_took_s": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def taken(recipe: Path, out: Path) -> dict:
    """Seconds on the clock and of all cores, and the peak MiB, of the merge."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "luthier", "merge", str(recipe), str(out)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    if status:
        raise SystemExit(f"{recipe}: the merge failed")
    shutil.rmtree(out)
    return {"s": round(wall, 1), "cpu_s": round(usage.ru_utime + usage.ru_stime, 1), "mib": usage.ru_maxrss >> 10}


def earlier() -> list[dict]:
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []


def save(rows: list[dict]) -> None:
    new = {(row["models"], row["what"], row["threads"]) for row in rows}
    rows = [row for row in earlier() if (row["models"], row["what"], row["threads"]) not in new] + rows
    keep("plan", "the plan is done in seconds; what it says is within a factor of three of what it takes", NOTES, rows)


def keep(name: str, goal: str, notes: list[str], rows: list[dict]) -> None:
    """Write a benchmark's results: its rows, and what they were measured with."""
    about = {
        "benchmark": name, "command": f"python benchmarks/{name}.py --work ...",
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "versions": {n: version(n) for n in ("luthier", "torch", "numba")} | {"python": platform.python_version()},
        "goal": goal, "notes": notes, "rows": rows,
    }  # fmt: skip
    (HERE / "results" / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
