"""Polynomials that stand in the literature: how many get an exact certificate, and why the others do not.

    OMP_NUM_THREADS=1 python benchmarks/published.py [--seconds 60] [NAME ...]

`published.json` holds them with their sources, how each text was checked, and the truth: `sos` (a sum of squares
of rational polynomials), `sos_real` (of real ones, not of rational ones), `nonnegative` (nonnegative, but no sum of
squares), `negative` (negative somewhere), `constrained` (to be bounded where its constraints hold).

Two questions are asked at the defaults (`luthier.certify`, `luthier.lower_bound`), each in a process of its own
with a time limit: is the polynomial nonnegative (those without constraints), and how low does it get (those whose
minimum is known). A proof counts as one of the truth if it is exact, its verifier accepts it, it is about this
polynomial, and

    nonnegative?   sos: squares.  nonnegative, sos_real: squares after a multiplier.  negative: a point below 0.
    minimum?       a bound within 1e-4 of the minimum (relative to it, if it is large).

A proof against the truth ends the program with an error. For Scheiderer's polynomials no sum of rational squares
exists: they stand in a row of their own, outside the share. Names given on the command line run alone, unsaved.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from fractions import Fraction
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import luthier
from luthier.catalogue import load
from luthier.flows import Certificate
from luthier.kit.problem import Problem, problem

HERE = Path(__file__).parent
TRUTHS = ("sos", "nonnegative", "negative", "constrained", "sos_real")
QUESTIONS = {"nonnegative?": luthier.certify, "minimum?": luthier.lower_bound}
CLOSE, SLACK = 1e-4, 1e-6
"""how near the minimum a bound has to be; how far a minimum that is stated in decimals may be off"""
Row = dict[str, Any]


def entries() -> list[Row]:
    return json.loads((HERE / "published.json").read_text(encoding="utf-8"))["polynomials"]


def asked(entry: Row) -> Problem:
    return problem(entry["polynomial"], entry.get("nonneg", ()), entry.get("zero", ()))


def questions(entry: Row) -> list[str]:
    return ["nonnegative?"] * (entry["truth"] != "constrained") + ["minimum?"] * ("minimum" in entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="only these polynomials, without saving")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each question")
    args = parser.parse_args()
    load("sos.certify")  # imported here, not in each child
    chosen = [e for e in entries() if not args.name or e["name"] in args.name]
    every = []
    for entry in chosen:
        for question in questions(entry):
            every.append(row := {"what": entry["name"], "truth": entry["truth"], "question": question})
            row |= answered(entry, question, args.seconds)
            print(f"{row['verdict']:8s} {row['status']:8s} {row['cpu_s']:7.2f} s  {question:13s} {entry['truth']:12s} "
                  f"{entry['name']}: {row['reason']}", flush=True)  # fmt: skip
    table = summary(every)
    for line in table:
        print("  ".join(f"{key} {value}" for key, value in line.items()))
    if not args.name:
        save(table, every, len(chosen), args.seconds)
    wrong = [row["what"] for row in every if row["verdict"] == "wrong"]
    if wrong:
        sys.exit(f"proofs against the truth: {', '.join(wrong)}")


def answered(entry: Row, question: str, seconds: float) -> Row:
    """What came of one question, asked in a child process that is ended when its time is up."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=ask, args=(theirs, entry, question))
    child.start()
    theirs.close()
    try:
        told = ours.recv() if ours.poll(seconds) else {"status": "no answer", "reason": f"{seconds:g} seconds are up"}
    except EOFError:
        told = {"status": "no answer", "reason": "the process ended without one"}
    child.kill()
    child.join()
    row = {"cpu_s": seconds, "basis": None, "functional": False, **told}
    made = row.pop("certificate", None)
    row["verdict"] = "none" if made is None else judged(entry, question, Certificate.from_json(made))
    row["met"] = question == "minimum?" and row["verdict"] == "proof" and row["bound"] == entry["minimum"]
    return row


def ask(pipe: Connection, entry: Row, question: str) -> None:
    """In the child: the certificate, and what it cost."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    began = time.process_time()
    try:
        made = QUESTIONS[question](asked(entry))
    except Exception as fault:  # a crash is a row of the table
        pipe.send(
            {"status": "crash", "reason": f"{type(fault).__name__}: {fault}", "cpu_s": time.process_time() - began}
        )
        return
    pipe.send({
        "status": made.status, "reason": made.reason, "cpu_s": round(time.process_time() - began, 3),
        "basis": int(made.numbers.get("basis", 0)), "bound": made.bound, "functional": bool(made.functional),
        "certificate": made.to_json(),
    })  # fmt: skip


def judged(entry: Row, question: str, made: Certificate) -> str:
    """`proof` of the truth, `wrong`: a proof against it, `none`."""
    if made.status not in ("exact", "not_sos"):
        return "none"
    if made.refusal() is not None or not about(asked(entry), made):
        return "wrong"
    return judged_bound(entry, made) if question == "minimum?" else judged_sign(entry["truth"], made)


def about(given: Problem, made: Certificate) -> bool:
    """Whether the certificate speaks of this problem: its polynomial, and no constraints but its own."""

    def plain(q: Any) -> tuple:
        return tuple((exponents, str(c)) for exponents, c in q.terms)

    own = {"nonneg": set(map(plain, given.nonneg)), "zero": set(map(plain, given.zero))}
    return (
        made.variables == given.variables and set(made.polynomial) == set(plain(given.polynomial))
        and set(made.nonneg) <= own["nonneg"] and set(made.zero) <= own["zero"]
    )  # fmt: skip


def judged_sign(truth: str, made: Certificate) -> str:
    """A proof that p >= 0, or of a point below 0; that p is no sum of squares is no answer, but may be false."""
    if made.functional and truth in ("sos", "sos_real"):
        return "wrong"
    if made.status == "not_sos":
        return "none" if not made.point else "proof" if truth == "negative" else "wrong"
    if Fraction(made.bound) < 0:
        return "none"
    multiplied = any(any(exponents) for _, terms in made.multiplier for exponents, _ in terms)
    return "proof" if truth == "sos" or (multiplied and truth != "negative") else "wrong"


def judged_bound(entry: Row, made: Certificate) -> str:
    """A bound above the minimum is wrong, one far below it says little."""
    bound, least = Fraction(made.bound), Fraction(entry["minimum"])
    unit = 1 + abs(least)
    if made.status == "not_sos":
        return "wrong" if made.point and bound <= least else "none"
    above = bound - least > (0 if isinstance(entry["minimum"], str) else SLACK * unit)
    return "wrong" if above else "proof" if least - bound <= CLOSE * unit else "none"


def summary(every: list[Row]) -> list[Row]:
    """Where a proof can exist: of each polynomial's own question, and of all; each question and truth; what lacks one.

    A polynomial's own question is whether it is nonnegative, under constraints how low it gets.
    """
    whole = [r for r in every if r["truth"] != "sos_real"]
    own = [r for r in whole if r["question"] == "nonnegative?" or r["truth"] == "constrained"]
    lines = [counted("all but sos_real", "its own", own), counted("all but sos_real", "both", whole)]
    for question in QUESTIONS:
        for truth in TRUTHS:
            rows = [r for r in every if r["question"] == question and r["truth"] == truth]
            lines += [counted(truth, question, rows)] if rows else []
    for r in every:
        if r["verdict"] != "proof":
            lines.append({"truth": r["truth"], "question": r["question"], "without a proof": r["what"],
                          "why": f"{r['status']}: {r['reason']}"})  # fmt: skip
    return lines


def counted(truth: str, question: str, rows: list[Row]) -> Row:
    proven = sum(r["verdict"] == "proof" for r in rows)
    statuses = {s: sum(r["status"] == s for r in rows) for s in ("exact", "not_sos", "numeric", "unknown")}
    return {
        "truth": truth, "question": question, "asked": len(rows), "proven": proven,
        "share": f"{proven / max(len(rows), 1):.1%}", **statuses,
        "bound is the minimum": sum(r["met"] for r in rows),
        "shown to be no sum of squares": sum(r["functional"] for r in rows),
        "no answer": sum(r["status"] in ("no answer", "crash") for r in rows),
        "wrong": sum(r["verdict"] == "wrong" for r in rows),
        "median_cpu_s": round(statistics.median([r["cpu_s"] for r in rows] or [0.0]), 3),
    }  # fmt: skip


def save(table: list[Row], every: list[Row], count: int, seconds: float) -> None:
    result = {
        "benchmark": "published", "command": " ".join(["python", *sys.argv]),
        "goal": "an exact certificate wherever one can exist, and no proof against the truth",
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "versions": {n: version(n) for n in ("luthier", "clarabel", "numpy")},
        "notes": [f"{count} polynomials from benchmarks/published.json, {seconds:g} seconds for each question; "
                  "the columns exact to no answer count what the method said, proven what of it answers the question"],
        "rows": table, "each": every,
    }  # fmt: skip
    path = HERE / "results" / "published.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
