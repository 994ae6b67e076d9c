"""How long the command line takes to answer: CPU seconds of whole processes, against a bare Python and against imports.

    python benchmarks/cli.py [--runs 7]

Each round starts every command once; a figure is the median over the rounds. Goal: `list` and `show`
within 0.4 s of CPU time, and without torch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

COMMANDS = {
    "bare python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "luthier list": ["-m", "luthier.cli", "list"],
    "luthier list --json": ["-m", "luthier.cli", "list", "--json"],
    "luthier show tune.lift": ["-m", "luthier.cli", "show", "tune.lift"],
    "luthier plan --help": ["-m", "luthier.cli", "plan", "--help"],
}


def cpu_seconds(words: list[str]) -> float:
    """User and system time of one process and what it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    seen: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, words in COMMANDS.items():
            seen[name].append(cpu_seconds(words))
    rows = [
        {
            "command": name,
            "cpu_seconds": round(statistics.median(s), 3),
            "least": round(min(s), 3),
            "most": round(max(s), 3),
        }
        for name, s in seen.items()
    ]
    for row in rows:
        print("{command:24} {cpu_seconds:7.3f} s  [{least:.3f}, {most:.3f}]".format(**row))
    result = {
        "benchmark": "cli", "command": f"python benchmarks/cli.py --runs {runs}", "date": str(datetime.date.today()),
        "versions": {"python": platform.python_version(), "torch": version("torch"), "luthier": version("luthier")},
        "machine": platform.machine(), "rows": rows, "goal": "luthier list <= 0.4 s of CPU time",
    }  # fmt: skip
    path = Path(__file__).parent / "results" / "cli.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
