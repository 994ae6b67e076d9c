"""`luthier demo`, `test` and `reproduce`: is a method what it says, and does it do what its paper says."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import catalogue
from luthier.errors import LuthierError


def options_test(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="+", help="one method or more, such as merge.ties")
    parser.add_argument("--mutants", action="store_true", help="also plant faults and count those the tests catch")


def do_test(args: argparse.Namespace) -> int:
    for id_ in args.id:
        catalogue.card(id_)  # before the slow imports
    from luthier.cli_run import quiet
    from luthier.testing import run_method

    quiet()
    good = True
    for id_ in args.id:
        report = run_method(id_, mutants=args.mutants)
        failed = [o for o in report.outcomes if not o.passed]
        good = good and report.ok
        for outcome in report.outcomes:
            fault = f"  {outcome.fault}" if outcome.fault else ""
            print(f"{'ok    ' if outcome.passed else 'FAILED'} {id_}  {outcome.check}  {outcome.seconds:.1f} s{fault}")
        for note in report.notes:
            print(f"note   {id_}  {note}")
        if report.mutants is not None:
            print("\n".join(report.mutants.lines()))
        print(f"{id_}: {len(report.outcomes) - len(failed)} of {len(report.outcomes)} checks pass")
    return 0 if good else 1


def options_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="a method, such as tune.lift")


def do_demo(args: argparse.Namespace) -> None:
    catalogue.card(args.id)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    from luthier.cli_run import quiet
    from luthier.testing.demo import demo

    quiet()
    shown = demo(args.id)
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    grid.add_column("")
    for head in shown.heads:
        grid.add_column(head, overflow="fold")
    for row in shown.rows:
        grid.add_row(*map(escape, row))
    Console().print(grid)
    print("a tiny model and seconds of it: it shows what the method does, not how well; luthier reproduce does")


def options_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="*", help="methods whose claims to run")
    parser.add_argument("--all", action="store_true", help="run every claim there is")
    parser.add_argument("--seeds", type=int, nargs="+", help="unseen seeds, beside the claims' own")
    parser.add_argument("--budget", help="run what has no current verdict as far as this time goes, such as 60m or 2h")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the verdicts are written (docs)")


def do_reproduce(args: argparse.Namespace) -> None:
    from luthier.claims import claim, claims, reproduce
    from luthier.cli_run import quiet

    if bool(args.id) == args.all:
        known = ", ".join(claims())
        raise LuthierError("name methods or give --all, not both" if args.id else "name a method, or --all", do=known)
    for id_ in args.id:
        claim(id_)
    budget = _seconds(args.budget)
    quiet()
    rows = reproduce(args.id or None, args.folder, args.seeds, watch=_say, budget=budget)
    for row in rows:
        shown, where = (row, "") if args.seeds is None else (row["unseen"], "on unseen seeds ")
        print(f"{row['id']}: {where}{shown['verdict']}{' (' + shown['short'] + ')' if shown['short'] else ''}")
    if budget is not None and not rows:
        print("nothing is due, or the next one takes longer than the budget")
    print(args.folder / "verdicts.md")


def _seconds(text: str | None) -> float | None:
    """90s, 60m or 2h in seconds; a bare number is minutes."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not found:
        raise LuthierError(f"{text!r} is no time", where="--budget", do="write 90s, 60m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "": 60, "h": 3600}[found[2]]


def _say(event: Mapping[str, Any]) -> None:
    if event["kind"] == "progress" and event.get("what") == "claims":
        print(f"{event['step']} ({event['done'] + 1} of {event['total']}) ...", flush=True)
    elif event["kind"] == "kept":
        print(f"{event['step']}: unseen seeds of earlier code are more; {len(event['seeds'])} new ones wait for others")
    elif event["kind"] == "left":
        print(f"no time for {', '.join(event['ids'])}; call again to go on")
