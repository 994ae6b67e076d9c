"""Whether a merge reads while it computes: its time from a cold page cache against reading alone and computing alone.

    python benchmarks/overlap.py --work FOLDER [--size 0.5B]

Inputs of `merge_inputs.py`. Before each cold run the kernel is asked to forget their pages (posix_fadvise), which
needs no rights; where it does not obey, as on some file systems, "read alone" shows it by its speed. Wall seconds of
whole processes, the import of torch included, medians. hidden: of the shorter of reading and computing the share that
the cold merge did not wait for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from merge import build
from plan import keep, written

NOTES = [
    "The virtual disk gives 0.5 to 3 GB/s from one minute to the next, so that shares are rough: much of reading is "
    "hidden where it takes seconds (0.3 to 1.2), hardly any where the disk is as quick as memory (up to 0.1).",
]
METHODS = ["merge.linear", "merge.ties", "merge.breadcrumbs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and merges")
    parser.add_argument("--size", default="0.5B")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    files = [folder / "model.safetensors" for folder in build(args.work, args.size)]
    out, recipe = args.work / "overlapped", args.work / "overlap.yaml"
    start = statistics.median(timed([sys.executable, "-c", "import os, torch; os._exit(0)"]) for _ in range(3))
    rows = []
    for method in METHODS:
        for threads in (1, 2):
            recipe.write_text(json.dumps(written(method, [file.parent for file in files], threads, args.work / "key")))
            merge = [sys.executable, "-m", "luthier", "merge", str(recipe), str(out)]
            found: dict[str, list[float]] = {"read alone": [], "warm": [], "cold": []}
            for _ in range(args.runs):
                forget(files)
                found["read alone"].append(timed(["cat", *map(str, files)]))
                found["warm"].append(timed(merge, out))
                forget(files)
                found["cold"].append(timed(merge, out))
            seconds = {name: statistics.median(several) for name, several in found.items()}
            shorter = min(seconds["read alone"], seconds["warm"] - start)
            hidden = (seconds["read alone"] + seconds["warm"] - seconds["cold"]) / shorter
            taken = {f"{name} s": round(s, 1) for name, s in seconds.items()}
            size = round(sum(file.stat().st_size for file in files) / 1e9, 1)
            row = {"models": args.size, "gb": size, "what": method, "threads": threads}
            rows.append(row | taken | {"hidden": round(hidden, 2)})
            print(rows[-1], found, file=sys.stderr, flush=True)
    goal = "reading, computing and writing overlap: a cold merge takes little more than the longer of them"
    keep("overlap", goal, NOTES, rows)


def forget(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], made: Path | None = None) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    took = time.perf_counter() - begun
    if made is not None:
        shutil.rmtree(made)
    return took


if __name__ == "__main__":
    main()
