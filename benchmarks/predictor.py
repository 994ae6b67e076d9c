"""What the shipped network of `sos.neural_sos` proposes, beside the two rules of thumb and exact reduction.

    OMP_NUM_THREADS=1 python benchmarks/predictor.py [--seeds 3]

Planted polynomials that no training step draws (other keys), coercive and as the paper draws them, in the sizes of
`SIZES` and all four structures. Columns, sizes in units of the planted basis, means:

    complete   what iterated diagonal consistency leaves      first    candidates that score above 0.5
    holds      how often they hold the whole planted basis    top      how much of the ranking does
    corners, doubled    the two rules                         gain     how many times fewer operations than the
    complete basis, failed guesses included, an operation count being the cube of a basis's size (geometric mean)
    programs   semidefinite programs that were solved         proven   exact proofs

The rows are written into the network's card as well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier.kit import lattice, predictor, rules
from luthier.kit.context import Context
from luthier.kit.planted import STRUCTURES, Planting, generator, plant
from luthier.sos.heuristic import Heuristic
from luthier.sos.neural_sos import NeuralSos

HERE = Path(__file__).parent
CARD = HERE.parent / "src" / "luthier" / "sos" / "neural_sos.md"
SIZES = {
    "coercive": ((4, 3, 12), (5, 3, 16), (6, 3, 20), (4, 4, 16), (6, 4, 20)),
    "as the paper draws them": ((4, 3, 12), (6, 6, 30), (4, 6, 16), (8, 10, 30)),
}
"""variables, half the degree, monomials"""
KEY, FIRST = 9, 100
"""of the draws: the trainer's keys begin otherwise, and its checks with other numbers"""
Found = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="polynomials of each size and structure")
    args = parser.parse_args()
    rows = []
    for name, sizes in SIZES.items():
        every: list[Found] = []
        for structure in STRUCTURES:
            found = [
                look(Planting(n=n, half=half, size=size, matrix=structure, coercive=name == "coercive"), seed)
                for seed in range(FIRST, FIRST + args.seeds) for n, half, size in sizes
            ]  # fmt: skip
            rows.append(row(f"{name}, {structure}", found))
            print(rows[-1], flush=True)
            every += found
        rows.append(row(f"all {name}", every) | against_rules(every))
        print(rows[-1], flush=True)
    save(rows)
    put_into_card(rows)


def look(planting: Planting, seed: int) -> Found:
    """One polynomial, by the network, by the rules, and what it is made of."""
    planted = plant(planting, generator(KEY, seed, planting.n, planting.half))
    p, hidden, ctx = planted.polynomial, planted.hidden, Context(seed=seed, step="benchmark")
    learned, ruled = NeuralSos().certify(p, ctx), Heuristic().certify(p, ctx)
    complete = lattice.possible(p) or []
    network = predictor.shipped("neural_sos")
    began = time.process_time()
    value = dict(zip(complete, predictor.scores(network, p, complete), strict=True))
    seconds = time.process_time() - began
    likely = {a for a in complete if value[a] > 0.5}
    place = {a: n for n, a in enumerate(sorted(complete, key=lambda a: -value[a]), start=1)}
    size = len(hidden)
    return {
        "complete": len(complete) / size, "first": len(likely) / size, "holds": set(hidden) <= likely,
        "top": max(place[a] for a in hidden) / size, "corners": len(rules.corners(p, complete)) / size,
        "doubled": len(rules.doubled(p, complete)) / size,
        "gain, network": len(complete) ** 3 / learned.numbers["cubed"],
        "gain, rules": len(complete) ** 3 / ruled.numbers["cubed"], "programs, network": learned.numbers["programs"],
        "programs, rules": ruled.numbers["programs"], "proven, network": learned.status == "exact",
        "proven, rules": ruled.status == "exact", "ms": 1000 * seconds,
    }  # fmt: skip


def row(name: str, found: Sequence[Found]) -> dict[str, Any]:
    def mean(key: str) -> float:
        return statistics.fmean(one[key] for one in found)

    made: dict[str, Any] = {"polynomials": name, "number": len(found)}
    for key in ("complete", "first", "top", "corners", "doubled", "programs, network", "programs, rules"):
        made[key] = f"{mean(key):.2f}"
    for key in ("gain, network", "gain, rules"):
        made[key] = f"{geometric(found, lambda one, key=key: one[key]):.1f}"
    for key in ("holds", "proven, network", "proven, rules"):
        made[key] = f"{mean(key):.0%}"
    return made | {"ms a pass": f"{mean('ms'):.1f}"}


def geometric(found: Sequence[Found], value: Callable[[Found], float]) -> float:
    return math.exp(statistics.fmean(math.log(value(one)) for one in found))


def against_rules(found: Sequence[Found]) -> dict[str, Any]:
    """In how many cases the network asks for fewer operations than the rules, and for more; operations over theirs."""
    ratios = [one["gain, rules"] / one["gain, network"] for one in found]
    return {
        "fewer than rules": sum(r < 1 for r in ratios), "more than rules": sum(r > 1 for r in ratios),
        "operations over rules'": f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f}",
    }  # fmt: skip


def save(rows: list[dict[str, Any]]) -> None:
    about = {
        "benchmark": "predictor", "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "versions": {n: version(n) for n in ("luthier", "torch", "clarabel", "numpy")},
        "goal": ["the network asks for fewer operations than the rules of thumb"],
        "notes": ["a gain is how many times fewer operations than over the complete diagonal-consistent basis, an "
                  "operation count being the cube of a basis's size; sizes are in units of the planted basis"],
        "rows": rows,
    }  # fmt: skip
    (HERE / "results" / "predictor.json").write_text(json.dumps(about, indent=1) + "\n")


def put_into_card(rows: list[dict[str, Any]]) -> None:
    """The rows, without times, in place of the table of the card."""
    columns = [c for c in rows[0] if c != "ms a pass"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(r[c]) for c in columns) + " |" for r in rows]
    text = CARD.read_text(encoding="utf-8").split("\n")
    where = [n for n, line in enumerate(text) if line.startswith("|")]
    CARD.write_text("\n".join([*text[: where[0]], *lines, *text[where[-1] + 1 :]]), encoding="utf-8")


if __name__ == "__main__":
    main()
