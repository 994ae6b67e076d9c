"""Merging through `luthier merge` and through mergekit: CPU-seconds and peak memory of whole processes.

    python benchmarks/merge.py --mergekit OTHER_VENV/bin/mergekit-yaml --work FOLDER [--sizes 135M 1.5B] [--only ties]

mergekit (LGPL-3.0) is never imported here: give the command of an environment of its own, made with
`pip install torch==2.13.0 mergekit==0.1.5`. Both read the same YAML; runs alternate, each a fresh process with one
torch thread, so start-up counts, and ratios are of medians within one run. Luthier runs with its extra `fast`
(Numba), whose kernels have been compiled before. Rows of earlier runs stay for what is
not measured again. `merge_inputs.py` makes the models, in the work folder, where they stay (1.5B: 12 GB).

limit: torch imported, all files read, summed tensor by tensor in place, one written.  cp: one model's bytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "merge.json"
SIZES = {"135M": 3, "135M, 8 experts": 8, "0.5B": 3, "1.5B": 3, "18,000 tensors": 3, "the same in 18": 3}
METHODS = {
    "linear": {}, "slerp": {}, "task_arithmetic": {}, "model_stock": {}, "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5}, "dare_ties": {"density": 0.5}, "breadcrumbs": {"density": 0.5, "gamma": 0.01},
    "della": {"density": 0.5, "epsilon": 0.15},
}  # fmt: skip
PAPER = {
    "ties, the paper's form": ("merge.ties", {"density": 0.5}),
    "dare_ties, the paper's form": ("merge.dare", {"density": 0.5, "vote": "majority", "normalize": True}),
    "breadcrumbs, the paper's form": ("merge.breadcrumbs", {}),
}
FOUR = ["linear", "ties", "dare_ties", "breadcrumbs"]
GOALS = [
    "1.5B: linear >= 3 times less CPU than mergekit 0.1.5 and within 1.5 of the limit; ties, dare_ties and breadcrumbs "
    ">= 10 times less and within 3 of the limit",
    "135M, where start-up counts: >= 2 times and >= 6 times less CPU",
    "memory >= 3 times less everywhere",
    "CPU grows with bytes alone; 18,000 small tensors cost < 2 s more than the same bytes in 18",
]
NOTES = [
    "mib is the peak of resident memory, ours and theirs. mergekit maps its inputs, and mapped pages that are in "
    "memory count; Luthier reads them into buffers.",
    "ns an entry is CPU without `import torch`, over the entries of one model: of the limit with what Python takes to "
    "end, of Luthier without, as it leaves at once.",
    "Every aim is met in these runs, on an idle machine. At 1.5B much of the time is the kernel's, for pages that the "
    "machine has to find first: where mergekit's merge had just driven the inputs out of the page cache, linear took "
    "10.2 s and dare_ties 23.2, 2.9 and 6.7 times less than mergekit. So the inputs are read before each run since; "
    "ties and breadcrumbs at 1.5B are of a run without that.",
    "Luthier loads its kernels (0.5 s, 120 MiB, timed aside) for merges of more than 2**29 entries of all models "
    "together or of more than 8,192 tensors; linear at 135M runs without. The first merge on a machine takes 1.2 s "
    "more, once.",
]
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
    parser.add_argument("--work", type=Path, required=True, help="folder for models and merges")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--only", nargs="*", default=FOUR, choices=[*METHODS, *PAPER])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without mergekit")
    args = parser.parse_args()
    out = args.work / "out"
    out.mkdir(parents=True, exist_ok=True)
    for size in args.sizes:
        models = build(args.work, size)
        found = measure(commands(args, size, models), args.runs, out, models)
        save(rows(size, args.only, found, models), args.mergekit)
    shutil.rmtree(out)


def build(work: Path, size: str) -> list[Path]:
    """In a process of its own: what this one holds would count in the peaks of those it starts."""
    command = [sys.executable, str(HERE / "merge_inputs.py"), str(work), size, str(SIZES[size])]
    return [Path(line) for line in subprocess.check_output(command, text=True).splitlines()]


def commands(args: argparse.Namespace, size: str, models: list[Path]) -> dict[str, list[str]]:
    """What is run, by name: `luthier ties`, `mergekit ties`, `limit`, ..."""
    out, made = args.work / "out", {}
    for method in args.only:
        path = args.work / f"{method.replace(' ', '_')}.yaml"
        path.write_text(json.dumps(recipe(method, models) if method in PAPER else config(method, models)))  # is YAML
        made[f"luthier {method}"] = [sys.executable, "-m", "luthier", "merge", str(path), str(out / "luthier")]
        if method in METHODS and not args.alone:
            made[f"mergekit {method}"] = [str(args.mergekit), str(path), str(out / "mergekit"), "--quiet", "-j", "1"]
    python = [sys.executable, "-c"]
    made["limit"] = [*python, LIMIT, str(out / "limit"), *map(str, models)]
    made["limit without base"] = [*python, LIMIT, str(out / "limit"), *map(str, models[1:])]
    made["cp"] = ["cp", str(models[0] / "model.safetensors"), str(out / "copy")]
    made["import torch"] = [*python, "import torch, safetensors.torch"]
    made["import torch, leave at once"] = [*python, "import os, torch; os._exit(0)"]
    return made


def config(method: str, models: list[Path]) -> dict:
    """mergekit's: the experts in bfloat16; of slerp the base and one."""
    base, *experts = map(str, models)
    made: dict = {"merge_method": method, "dtype": "bfloat16"}
    if method != "linear":
        made["base_model"] = base
    if method == "slerp":
        return made | {"models": [{"model": base}, {"model": experts[0]}], "parameters": {"t": 0.5}}
    if method == "model_stock":
        return made | {"models": [{"model": m} for m in experts]}
    return made | {"models": [{"model": m, "parameters": {"weight": 1.0, **METHODS[method]}} for m in experts]}


def recipe(form: str, models: list[Path]) -> dict:
    use, fields = PAPER[form]
    base, *experts = map(str, models)
    return {"luthier": 1, "steps": {"merged": {"use": use, "base": base, "experts": experts, "set": fields}}}


def measure(commands: dict[str, list[str]], runs: int, out: Path, models: list[Path]) -> dict[str, dict[str, float]]:
    """Every command `runs` times, in turn, after one that is not counted, in which Python compiles its modules.

    The inputs are read before each, so that all find them in the page cache: a merge that takes as much memory as
    mergekit's of 1.5B leaves little of it to the next one.
    """
    run(commands[next(iter(commands))])
    found: dict[str, list] = {name: [] for name in commands}
    for turn in range(runs):
        for name, command in commands.items():
            subprocess.run(["cat", *(str(model / "model.safetensors") for model in models)], stdout=subprocess.DEVNULL)
            found[name].append(run(command))
            print(f"run {turn + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
            for made in out.iterdir():
                shutil.rmtree(made) if made.is_dir() else made.unlink()
    return {name: summary(each) for name, each in found.items()}


def run(command: list[str]) -> dict[str, float]:
    """CPU-seconds, wall and peak resident memory of a process that has to end well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed: {process.stderr.read().decode()[-2000:] if process.stderr else ''}")
    return {
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_s": round(time.perf_counter() - began, 2),
        "mib": round(usage.ru_maxrss / 1024),
    }


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    each = {key: [r[key] for r in runs] for key in runs[0]}
    cpu, wall = (round(statistics.median(each[key]), 2) for key in ("cpu_s", "wall_s"))
    return {"cpu_s": cpu, "wall_s": wall, "mib": max(each["mib"]), "runs": len(runs)}


def rows(size: str, methods: list[str], found: dict[str, dict[str, float]], models: list[Path]) -> list[dict]:
    """One a method, and one for each yardstick."""
    entries = (models[0] / "model.safetensors").stat().st_size / 2
    whole, start = (found[what]["cpu_s"] for what in ("import torch", "import torch, leave at once"))
    made = []
    for method in methods:
        ours, theirs = found[f"luthier {method}"], found.get(f"mergekit {method}")
        limit = found["limit without base" if method == "linear" else "limit"]
        row = {
            "models": size, "what": method, "cpu_s": ours["cpu_s"], "mib": ours["mib"],
            "over_limit": round(ours["cpu_s"] / limit["cpu_s"], 2), "ns_an_entry": ns(ours, start, entries),
        }  # fmt: skip
        if theirs:
            row |= {
                "mergekit_cpu_s": theirs["cpu_s"], "less_cpu": round(theirs["cpu_s"] / ours["cpu_s"], 2),
                "mergekit_mib": theirs["mib"], "less_memory": round(theirs["mib"] / ours["mib"], 2),
            }  # fmt: skip
        made.append(row | {"runs": ours["runs"]})
        print(made[-1])
    for what in ("limit", "limit without base", "cp", "import torch", "import torch, leave at once"):
        row = {"models": size, "what": what, "cpu_s": found[what]["cpu_s"], "mib": found[what]["mib"]}
        if not what.startswith("import"):
            row["ns_an_entry"] = ns(found[what], 0.0 if what == "cp" else whole, entries)
        made.append(row | {"runs": found[what]["runs"]})
        print(made[-1])
    return made


def ns(found: dict[str, float], start: float, entries: float) -> float:
    return round((found["cpu_s"] - start) / entries * 1e9, 1)


def save(made: list[dict], mergekit: Path) -> None:
    """The rows in place of those that measured the same."""
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    new = {(row["models"], row["what"]) for row in made}
    every = [row for row in kept if (row["models"], row["what"]) not in new] + made
    sizes, methods = list(SIZES), [*METHODS, *PAPER]
    every.sort(key=lambda r: (sizes.index(r["models"]), [*methods, r["what"]].index(r["what"])))
    about = {
        "benchmark": "merge", "command": "python benchmarks/merge.py --mergekit ... --work ...",
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(mergekit),
        "goal": GOALS, "notes": NOTES, "rows": every,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")


def versions(command: Path) -> dict[str, str]:
    ask = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'), v('safetensors'))"
    other = subprocess.check_output([str(command.parent / "python"), "-c", ask], text=True).split()
    return {
        "luthier": version("luthier"), "torch": version("torch"), "numba": version("numba"),
        "python": platform.python_version(),
        "mergekit": other[0], "mergekit's torch": other[1], "mergekit's safetensors": other[2],
    }  # fmt: skip


def machine() -> dict[str, str | int | None]:
    return {"cpus": os.cpu_count(), "platform": platform.platform()}


if __name__ == "__main__":
    main()
