"""`luthier certify`: a proof that a polynomial is nowhere negative, a file of such problems, proofs checked again."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError

FILES = (".txt", ".jsonl", ".json")


def options_certify(parser: argparse.ArgumentParser) -> None:
    taken = "a polynomial such as 'x^4 - 2*x^2*y + y^2 + 1/3', or a file: one on each line, or JSON lines with"
    parser.add_argument("problem", nargs="?", help=f"{taken} polynomial, nonneg, zero and name")
    for name, what in (("nonneg", "is >= 0"), ("zero", "is 0")):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="POLYNOMIAL",
                            help=f"the claim is made only where this {what}; as often as wanted")  # fmt: skip
    parser.add_argument("--where", action="append", default=[], metavar="RELATION",
                        help="the same as a relation, such as '1 - x^2 >= 0', 'x = y' or '0 <= x <= 1'")  # fmt: skip
    parser.add_argument("--bound", action="store_true", help="find and prove the largest lower bound instead")
    parser.add_argument("--use", default="sos.certify", help="the method (sos.certify); luthier show says its fields")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="one of its fields")
    parser.add_argument("--timeout", metavar="TIME", help="for each problem, such as 30s or 5m; then it is unknown")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the certificate as JSON")
    form.add_argument("--latex", action="store_true", help="print the proof as LaTeX")
    form.add_argument("--lean", action="store_true", help="print the proof as a theorem for Lean 4 with Mathlib")
    form.add_argument("--verify", type=Path, metavar="FILE", help="check the certificates in a file again, and no more")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="of a file: where results are added")
    parser.add_argument("--jobs", type=int, help="of a file: processes at once (all processors)")
    parser.add_argument("--again", action="store_true", help="of a file: repeat what ran out of time or died")
    parser.epilog = (
        "Exit code 0: every problem is proven (exact), with --verify: no proof is refused. 1: some is not. "
        "A word that begins with a minus goes after --, or as in --nonneg=-x."
    )


def do_certify(args: argparse.Namespace) -> int:
    if args.verify:
        if args.problem or args.out:
            raise LuthierError("takes no problem and no --out", where="--verify")
        return _verify(args.verify)
    if args.problem is None:
        raise LuthierError("name a polynomial, a file of them, or --verify a file", do="see luthier certify --help")
    fields = _fields(args)
    seconds = _seconds(args.timeout)
    if args.out or Path(args.problem).suffix in FILES:
        return _many(args, fields, seconds)
    for name in ("jobs", "again"):
        if getattr(args, name):
            raise LuthierError("is for a file of problems", where=f"--{name}")
    return _one(args, fields, seconds)


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """The method's fields as given, once it is known to take them."""
    from luthier.catalogue import load
    from luthier.recipe_set import value_of
    from luthier.shapes import Certify

    fields = {"ask": "bound"} if args.bound else {}
    for assignment in args.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise LuthierError("expected FIELD=VALUE", where=f"--set {assignment}")
        fields[name] = value_of(text, f"--set {assignment}")
    made = load(args.use, **fields)
    if not isinstance(made, Certify):
        raise LuthierError(f"{args.use} is no Certify", where="--use", do="luthier list --shape Certify shows them")
    return fields


def _seconds(text: str | None) -> float | None:
    """30, 30s, 5m or 1h in seconds."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smh]?)", text.strip(), re.ASCII)
    if not found or not float(found[1]):
        raise LuthierError(f"{text!r} is no time", where="--timeout", do="write 30s, 5m or 1h")
    return float(found[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[found[2]]


def _one(args: argparse.Namespace, fields: dict[str, Any], seconds: float | None) -> int:
    asked = _asked(args)
    made = _apart(asked if asked.constrained else args.problem, asked, args.use, fields, seconds)
    if args.latex or args.lean:
        print(made.to_latex() if args.latex else made.to_lean())
    else:
        print(made.to_json() if args.json else made)
    return 0 if made.status == "exact" else 1


def _asked(args: argparse.Namespace) -> Any:
    """The problem with its constraints."""
    from luthier.kit.polynomial import relations
    from luthier.kit.problem import problem

    sides: dict[str, list[Any]] = {">=": list(args.nonneg), "=": list(args.zero)}
    for text in args.where:
        try:
            sign, found = relations(text)
        except LuthierError as fault:
            raise fault.at(f"--where {text}") from None
        sides[sign] += found
    return problem(args.problem, sides[">="], sides["="])


def _apart(given: Any, asked: Any, use: str, fields: dict[str, Any], seconds: float | None) -> Any:
    """In a process of its own, which is ended when its time is over, and which a solver without memory takes down."""
    from luthier.engine.certify_file import attempt, warm
    from luthier.engine.certify_pool import Lost, answers
    from luthier.engine.certify_scale import undecided
    from luthier.flows import Certificate

    ((_, answer),) = answers([{"problem": given, "use": use, "fields": fields}], attempt, warm, 1, seconds)
    if isinstance(answer, Lost):
        return undecided(asked, str(answer))
    if "error" in answer:
        raise LuthierError(answer["error"])
    return Certificate.from_json(json.dumps(answer["certificate"]))


def _many(args: argparse.Namespace, fields: dict[str, Any], seconds: float | None) -> int:
    from collections import Counter

    from luthier.cli_models import bar
    from luthier.engine.certify_file import rows, run

    _check_many(args)
    jobs = args.jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    said = time.monotonic()
    with bar("certify") as watch:

        def tell(row: Any, done: int, total: int) -> None:
            nonlocal said
            watch({"kind": "progress", "done": done, "total": total, "what": "certify"})
            if time.monotonic() - said > 20:  # a log gets a line now and then
                said = time.monotonic()
                watch({"kind": "log", "text": f"{done} of {total}"})

        done = run(Path(args.problem), args.out, args.use, fields, jobs, seconds, args.again, tell)
    last = {row["key"]: row for _, row in rows(args.out)}
    count = Counter(row["certificate"]["status"] if "certificate" in row else "error" for row in last.values())
    if done["cut"]:
        print(f"the last line of {args.out} was torn; it was cut off and done again")
    print(f"{done['todo']} done, {done['kept']} kept from before")
    print(f"{args.out}: {', '.join(f'{count[w]} {w}' for w in sorted(count)) or 'no problems'}")
    return 0 if set(count) <= {"exact"} else 1


def _check_many(args: argparse.Namespace) -> None:
    path = Path(args.problem)
    if not path.is_file():
        raise LuthierError("no such file", where=args.problem)
    for name in ("nonneg", "zero", "where", "json", "latex", "lean"):
        if getattr(args, name):
            raise LuthierError("is for one polynomial; a file's lines hold their own", where=f"--{name}")
    if args.out is None:
        raise LuthierError("name a file for the results", do="add --out results.jsonl")
    if args.out.exists() and args.out.samefile(path):
        raise LuthierError("the results would go into the problems", where=str(path), do="name another --out")
    if args.jobs is not None and args.jobs < 1:
        raise LuthierError("expected a whole number from 1", where="--jobs")


def _verify(path: Path) -> int:
    from collections import Counter

    from luthier.engine.certify_file import recheck, rows

    count: Counter = Counter()
    for number, row in rows(path):
        word, why = recheck(row)
        count[word] += 1
        if word == "refused":
            print(f"{path}:{number}: refused: {why}")
    print(f"{path}: {', '.join(f'{count[word]} {word}' for word in sorted(count)) or 'nothing to check'}")
    return 1 if count["refused"] or not count["proven"] else 0
