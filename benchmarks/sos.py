"""Certifying sums of squares: a learned basis, rules and exact reduction side by side; all monomials and peers last.

    python benchmarks/sos.py [--only coercive reducible published] [--ways neural rules ...] [--runs 3]
        [--triples PY] [--sumofsquares PY] [--sospy PY]
    python benchmarks/sos.py --random 10000

The peers (GPL, or needing such) are never imported here: give the python of an environment of its own for each, made
with `pip install triples==0.3.0`, `pip install SumOfSquares==1.3.1 scipy`, `pip install SOSPy==0.2.9 cvxopt mosek
ipython` (SOSPy imports the last two without declaring them; no licence is needed).

Every measurement is a process of its own, one thread, with a limit of CPU-seconds and of memory. Ours are forked when
everything is imported and answer something small first, which makes the pages theirs; so seconds are those of the call
alone, proof and its check in fractions included; of the peers, too, what they take after their imports. Polynomials
are drawn from seeds that depend on the class and the run alone, so that everybody gets the same ones. Rows of earlier
runs stay for what is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sos_ways import LARGEST, WAYS, Way, ways

from luthier.kit.planted import STRUCTURES, Planted, Planting, generator, plant

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sos.json"
SECONDS, BYTES = 60, 6 * 2**30
"""limits of one measurement"""
PEERS = ("triples", "SumOfSquares", "SOSPy")
LABELS = {"hidden": "hidden basis given", "newton": "Newton polytope", "full": "all monomials"}
AGAINST = ("consistency", "rules", "newton", "full")
SIZES = (
    ((4, 6, 20), 2), ((6, 12, 30), 1), ((8, 20, 30), 1), ((6, 20, 60), 1), ((6, 40, 40), 1), ((100, 10, 20), 1),
)  # fmt: skip
"""of the published grid: variables, degree, monomials; and how many runs of what takes long"""
REDUCIBLE = (
    ((4, 6, 10, "dense"), 3), ((8, 4, 10, "dense"), 3), ((5, 6, 10, "block"), 2), ((4, 8, 12, "sparse"), 1),
    ((6, 6, 12, "dense"), 1),
)  # fmt: skip
SMALL = plant(Planting(n=2, half=2, size=4), generator(0))
GOALS = [
    "coercive: the learned basis takes >= 20 times less CPU than all monomials at 56, >= 100 times at 84, and the "
    "verdicts are the same",
    "reducible: >= 100 times less than all monomials",
    "every row has a verified certificate or says why not",
]
NOTES = [
    "a cell says monomials (median), CPU-seconds of the call (median), proofs in fractions that the verifier accepts / "
    "runs, and what came instead. 'x less' is the median over polynomials that both prove; >= means the other did not "
    "finish. What takes long was run on fewer of the same polynomials.",
    "coercive: 1 and every x^half occur, so diagonal consistency and Newton's polytope, which is not run there, remove "
    "nothing. published: the sizes and samplers of arXiv 2510.13444, table 1, and its two largest.",
    "all monomials: one Gram matrix, as is usual elsewhere; our other ways split theirs into blocks where the support "
    "allows it, which random supports seldom do. Where monomials could be left out a proof needs facial reduction, "
    "which counts. sdsos and dsos: sums of binomial squares, tried once.",
    "SumOfSquares and SOSPy give floats: what is counted there are answers of a solver that calls itself optimal, no "
    "proof. A peer is given dense and sparse polynomials, of the largest sizes sparse ones alone, one of a row where "
    "they are published, and no other of a row where it did not finish the first.",
    "What falls short. Against the rules the learned basis gains nothing on most classes; on block and the smallest "
    "sparse coercive ones it does. Where diagonal consistency leaves little, the network costs up to half as much more "
    "as it alone. Reducible: 31 and 58 times at 35 and 36 monomials, where all of them take 0.6 s and a call begins "
    "at some 5 ms; 100 times and more from 56 up. All monomials and what consistency leaves of coercive sparse and "
    "low-rank polynomials may lie on a boundary of their own, numeric, where the learned basis does not: verdicts are "
    "then not the same, but better.",
    "the network, the rules, consistency and the hidden basis in one go, all monomials of the coercive and reducible "
    "ones with them; the other ways and the peers beside other work, so that their seconds may be off by a third.",
]


def cells() -> dict[str, tuple[str, Planting, int]]:
    """{name: (class, what is planted, most runs of what takes long)}."""
    made: dict[str, tuple[str, Planting, int]] = {}

    def add(kind: str, n: int, degree: int, size: int, matrix: Any, most: int = 3) -> None:
        coercive = kind == "coercive"
        name = f"{kind} {matrix}, n={n} d={degree} m={size}"
        made[name] = (kind, Planting(n=n, half=degree // 2, size=size, matrix=matrix, coercive=coercive), most)

    for matrix in STRUCTURES:
        for sizes in ((4, 6, 14), (5, 6, 16), (6, 6, 20)):
            add("coercive", *sizes, matrix)
    add("coercive", 5, 8, 24, "dense", 1)
    for sizes, most in REDUCIBLE:
        add("reducible", *sizes, most)
    for sizes, most in SIZES:
        for matrix in STRUCTURES:
            add("published", *sizes, matrix, most)
    return made


def instance(name: str, what: Planting, run: int) -> Planted:
    return plant(what, generator(1000 * zlib.crc32(name.encode()) + run))


def measured(work: Callable[[], dict[str, Any]], first: Callable[[], Any]) -> dict[str, Any]:
    """What a forked process says, or how it ended. first: what it does before time counts."""
    here, there = os.pipe()
    child = os.fork()
    if not child:
        os.close(here)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 2))
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        try:
            first()
            began = time.thread_time()  # of a process with a limit the clock moves in steps of 4 ms
            said = work()
            said["cpu_s"] = time.thread_time() - began
        except MemoryError:
            said = {"verdict": f"more than {BYTES / 2**30:.0f} GiB"}
        except Exception as fault:
            said = {"verdict": f"fails: {type(fault).__name__}: {' '.join(str(fault).split())[:60]}"}
        os.write(there, json.dumps(said).encode())
        os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        raw = pipe.read()
    _, _, usage = os.wait4(child, 0)
    said = json.loads(raw) if raw else {"verdict": f"not finished in {SECONDS} s"}
    return said | {"mib": round(usage.ru_maxrss / 1024)}


def ours(way: Way, planted: Planted) -> dict[str, Any]:
    p = planted.polynomial

    def work() -> dict[str, Any]:
        made = way(p, planted)
        verdict = made.status if made.status in ("exact", "numeric", "not_sos") else f"{made.status}: {made.reason}"
        proven = made.status == "exact" and made.verify()
        return {"verdict": verdict, "proven": proven, "basis": made.numbers.get("basis")}

    return measured(work, lambda: way(SMALL.polynomial, SMALL)) | {"of": mark(planted)}


def mark(planted: Planted) -> int:
    """Tells whether two measurements are of the same polynomial."""
    return zlib.crc32(str(planted.polynomial).encode())


def theirs(name: str, python: str, planted: Planted) -> dict[str, Any]:
    p = planted.polynomial
    asked = {"variables": len(p.variables), "terms": [[list(e), str(c)] for e, c in p.terms]}

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 5, SECONDS + 7))
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))

    command = [python, str(HERE / "sos_peers.py"), name.lower(), str(SECONDS)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, preexec_fn=limits
    )
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(asked).encode())
    process.stdin.close()
    raw = process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    said = json.loads(raw) if raw.strip() else {"verdict": f"not finished in {SECONDS} s"}
    whole = {"mib": round(usage.ru_maxrss / 1024), "whole_s": round(usage.ru_utime + usage.ru_stime, 2)}
    return said | whole | {"proven": said["verdict"].startswith(("exact", "numeric")), "of": mark(planted)}


def cell(several: list[dict[str, Any]]) -> str:
    """56, 0.0123 s, 2/3; numeric 1."""
    sizes = [one["basis"] for one in several if one.get("basis")]
    times = [one["cpu_s"] for one in several if "cpu_s" in one]
    won = sum(bool(one.get("proven")) for one in several)
    parts = [f"{statistics.median(sizes):.0f}"] if sizes else []
    parts += [f"{statistics.median(times):.3g} s"] if times else []
    said = [brief(one["verdict"]) for one in several if not one.get("proven")]
    why = "; ".join(f"{said.count(v)}: {v}" for v in dict.fromkeys(said))
    return ", ".join([*parts, f"{won}/{len(several)}"]) + (f" ({why})" if why else "")


def brief(verdict: str) -> str:
    return "unknown" if "no proof by" in verdict else verdict.removeprefix("unknown: ")


def less(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """How many times less CPU (median), where both prove it; >= where the other did not finish."""
    ratios = [o["cpu_s"] / m["cpu_s"] for m, o in zip(mine, other, strict=False) if m.get("proven") and o.get("proven")]
    if ratios:
        return f"{statistics.median(ratios):.3g}" + (f" ({len(ratios)}/{len(mine)})" if len(ratios) < len(mine) else "")
    ends = [SECONDS / m["cpu_s"] for m, o in zip(mine, other, strict=False) if m.get("proven") and "cpu_s" not in o]
    return f">= {statistics.median(ends):.3g}" if ends else "no proof to compare"


def row(name: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The comparison with exact reduction and the rules first, all monomials and the peers last."""
    mine = "neural" if "neural" in found else "consistency"
    made: dict[str, Any] = {"polynomials": name, mine: cell(found[mine])}
    for other in AGAINST:
        if other != mine and found.get(other):
            made[f"x less than {LABELS.get(other, other)}"] = less(found[mine], found[other])
    if mine == "neural":
        made["consistency x less than all monomials"] = less(found.get("consistency", []), found.get("full", []))
    for way in (*WAYS, *PEERS):
        if way in found and way != mine:
            made[LABELS.get(way, way)] = cell(found[way])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["coercive", "reducible", "published"], help="classes")
    parser.add_argument("--ways", nargs="*", default=[*WAYS, *PEERS], choices=[*WAYS, *PEERS])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--random", type=int, help="instead: so many random polynomials, every verdict checked")
    for peer in PEERS:
        parser.add_argument(f"--{peer.lower()}", help=f"the python of {peer}'s environment")
    args = parser.parse_args()
    if args.random:
        from sos_random import many

        save(random=many(args.random), args=args)
        return
    have = {name: way for name, way in ways().items() if name in args.ways}
    for name in ("flint", "scipy.linalg", "scipy.optimize"):  # what is imported late is imported now
        importlib.import_module(name)
    for way in have.values():
        way(SMALL.polynomial, SMALL)
    gc.freeze()  # no child collects what stands here
    for name, (kind, what, most) in cells().items():
        if kind in args.only:
            planted = [instance(name, what, run) for run in range(args.runs)]
            found = {}
            for way, do in have.items():
                long = way in ("full", "newton") or (kind, way) == ("coercive", "consistency")
                if (kind, way) != ("coercive", "newton"):
                    found[way] = [ours(do, one) for one in planted[: most if long else None]]
            for peer in PEERS:
                python = getattr(args, peer.lower())
                if python and peer in args.ways and for_peers(kind, what):
                    found[peer] = until_it_fails(peer, python, planted[: 1 if kind == "published" else most])
            save(measurements={name: found}, args=args)
            print(json.dumps({name: {w: cell(f) for w, f in found.items()}}), file=sys.stderr, flush=True)


def for_peers(kind: str, what: Planting) -> bool:
    """What peers are given: the reducible, half of the others, and of the largest only two sparse ones."""
    large = what.half > 6 or what.n == 100
    return (
        kind == "reducible" or (what.matrix == "sparse" and what.half <= 10) or (what.matrix == "dense" and not large)
    )


def until_it_fails(peer: str, python: str, planted: list[Planted]) -> list[dict[str, Any]]:
    """A peer that did not finish one polynomial is not given the others of its class."""
    found: list[dict[str, Any]] = []
    for one in planted:
        found.append(theirs(peer, python, one))
        if "cpu_s" not in found[-1]:
            break
    return found


def save(args: argparse.Namespace, measurements: dict[str, Any] | None = None, random: Any = None) -> None:
    """What was measured in place of the same, and the table made of all of it."""
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = old.get("measurements", {})
    for name, found in (measurements or {}).items():
        kept[name] = {**kept.get(name, {}), **found}
    random = random or old.get("random")
    peers = {p: asked(getattr(args, p.lower()), p) for p in PEERS if getattr(args, p.lower())}
    rows = [row(name, kept[name]) for name in cells() if "consistency" in kept.get(name, {})]
    about = {
        "benchmark": "sos", "command": "python benchmarks/sos.py --triples ... --sumofsquares ... --sospy ...",
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "threads": 1},
        "versions": {**old.get("versions", {}), **{p: version(p) for p in ("luthier", "clarabel", "numpy", "scipy")},
                     "python": platform.python_version(), **peers},
        "goal": GOALS, "notes": NOTES + ([random["said"]] if random else []), "rows": rows,
        "limits": {"seconds": SECONDS, "bytes": BYTES, "largest": LARGEST}, "random": random, "measurements": kept,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")


def asked(python: str, name: str) -> str:
    ask = f"from importlib.metadata import version as v; print(v({name!r}))"
    return subprocess.check_output([python, "-c", ask], text=True).strip()


if __name__ == "__main__":
    main()
