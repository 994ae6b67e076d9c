"""`luthier plan`, `luthier run` and `luthier report`: a recipe from plan to report, watched on the terminal."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.recipe_planned import Plan


def _recipe(parser: argparse.ArgumentParser, more: str = "", folder: str = "") -> None:
    taken = f"a file, a run folder, or the name of a shipped recipe such as quickstart{more}"
    parser.add_argument("recipe", help=taken)
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.KEY=VALUE", help="change one value, as often as wanted"
    )
    parser.add_argument("--folder", type=Path, help=f"the run folder (runs/NAME){folder}")


def options_plan(parser: argparse.ArgumentParser) -> None:
    _recipe(parser, ", or a mergekit YAML", "; for luthier merge the folder it is to write, whose disk then counts")
    parser.add_argument("--json", action="store_true", help="the plan as JSON")


def do_plan(args: argparse.Namespace) -> int:
    from luthier.cli_models import merge_recipe
    from luthier.recipe import find
    from luthier.recipe_inputs import Inputs
    from luthier.recipe_plan import plan
    from luthier.recipe_text import read

    recipe = merge_recipe(args.recipe, args.set)
    inputs = Inputs(recipe, args.folder or Path("runs") / recipe.name, lambda event: None)
    inputs.open()
    made = plan(recipe, inputs)
    text = read(find(args.recipe)).value
    if args.folder and isinstance(text, dict) and "merge_method" in text:  # such a file is for luthier merge alone
        made = replace(made, problems=(*made.problems, *_in_the_way(recipe, inputs, args.folder)))
    if args.json:
        print(json.dumps(made.as_dict(), indent=1))
    else:
        show_plan(console(), made)
    return 2 if made.problems else 0


def _in_the_way(recipe: Any, inputs: Any, out: Path) -> list[str]:
    """Why a merge could not put its folder there."""
    from luthier.checkpoint.atomic import check_apart, check_replaceable
    from luthier.errors import LuthierError

    given = [inputs.model(name, step) for step in recipe.steps.values() for name in step.names("model")]
    try:
        check_apart(out, (s.path for s in given if isinstance(getattr(s, "path", None), Path)))
        check_replaceable(out)
    except LuthierError as fault:
        return [str(fault)]
    return []


def options_run(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--fresh", action="store_true", help="do every step anew")
    parser.add_argument("--no-report", action="store_true", help="build no report at the end")


def do_run(args: argparse.Namespace) -> None:
    from luthier.recipe_grid import MODELLING
    from luthier.recipe_run import run

    quiet()
    screen = console()
    with Watcher(screen) as watch:
        done = run(args.recipe, folder=args.folder, fresh=args.fresh, sets=args.set, watch=watch)
    show_results(screen, done.folder)
    if not args.no_report:
        from luthier import report

        screen.print(f"\nReport: {report.build(done.folder)}", soft_wrap=True)
    last = next((s.name for s in reversed(list(done.recipe.steps.values())) if s.shape in MODELLING), None)
    _next(screen, done.folder, last, args.recipe)


def options_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run folder, or its name under runs/")
    parser.add_argument("--markdown", action="store_true", help="print the table and verdicts for a README instead")


def do_report(args: argparse.Namespace) -> None:
    from luthier import report

    folder = run_folder(args.run)
    print(report.markdown(folder) if args.markdown else report.build(folder))


def run_folder(name: Path) -> Path:
    """The run folder a user means; LuthierError with the nearest one there is."""
    from luthier.errors import unknown
    from luthier.kit.paths import there

    for folder in (name, Path("runs") / name):
        if there(folder / "ledger.sqlite"):
            return folder
    raise unknown("run", str(name), [p.parent.name for p in Path("runs").glob("*/ledger.sqlite")])


def quiet() -> None:
    """Silence the bars and advice of the libraries underneath: our own say what is going on."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def show_plan(console: Console, made: Plan) -> None:
    """The plan as a table, with what it adds up to and what cannot work."""
    from rich.table import Table as Grid

    grid = Grid(title="Plan", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("step", "method", "takes", "gives"):
        grid.add_column(name, overflow="fold")
    for name in ("numbers", "training", "memory", "disk", "time"):
        grid.add_column(name, justify="right")
    for s in made.steps:
        share = f"{count(s.trainable)} ({100 * s.trainable / s.params:.1f}%)" if s.trainable and s.params else ""
        time_ = "done" if s.done else span(s.seconds)
        grid.add_row(s.name, s.use, ", ".join(s.takes), s.gives, count(s.params), share, size(s.memory), size(s.disk),
                     time_)  # fmt: skip
    console.print(grid)
    for d in made.data:
        text = f"data {d.name}: {d.source}, {d.train} train, {d.test} test, leaked test items {d.leaked}"
        console.print(text, markup=False, soft_wrap=True)
    free = f" of {size(made.free_memory)} free" if made.free_memory else ""
    console.print(
        f"about {span(60 * made.minutes)} on {made.device}, {size(made.memory)} of memory{free}, "
        f"{size(made.disk)} of disk of {size(made.free_disk)} free, leaked test items {made.leaked}"
    )
    if made.free_memory and made.memory > made.free_memory:
        console.print("may not fit: more memory is needed than is free", style="yellow")
    for note in dict.fromkeys(note for s in made.steps for note in s.notes):
        console.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)
    for problem in made.problems:
        console.print(f"cannot work: {problem}", style="red", soft_wrap=True, markup=False)


class Watcher:
    """Turns the events of a run into a plan, a bar for each step and a line when it is done."""

    def __init__(self, console: Console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        columns = (*columns, TextColumn("{task.fields[note]}"))
        self.console = console
        self.bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task: Any = None
        self.said = 0.0

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        getattr(self, f"_{event['kind']}", lambda event: None)(event)

    def _plan(self, event: Mapping[str, Any]) -> None:
        show_plan(self.console, event["plan"])
        self.console.print()
        self.bars.start()

    def _step(self, event: Mapping[str, Any]) -> None:
        self.task = self.bars.add_task(f"{event['step']}  {event['use']}", total=None, note="")
        if not self.console.is_terminal:
            self.console.print(f"{event['step']}: {event['use']} ...")

    def _progress(self, event: Mapping[str, Any]) -> None:
        if self.task is None:
            return
        self.bars.update(self.task, completed=event["done"], total=event["total"])
        if event.get("what") not in (None, "train"):
            self.bars.update(self.task, note=str(event["what"])[:40])
        if not self.console.is_terminal and time.monotonic() - self.said > 20:  # a log gets a line now and then
            self.said = time.monotonic()
            of = f" of {event['total']}" if event["total"] else ""
            self.console.print(f"{event.get('step')}: {event.get('what')} {event['done']}{of}")

    def _metrics(self, event: Mapping[str, Any]) -> None:
        if self.task is not None and "train" in event:
            self.bars.update(self.task, note=f"loss {event['train']['loss']:.3f}")

    def _log(self, event: Mapping[str, Any]) -> None:
        self.console.print(f"{event.get('step', '')}: {event['text']}", soft_wrap=True, markup=False)

    def _kept(self, event: Mapping[str, Any]) -> None:
        self.console.print(f"[green]✓[/] {event['step']}  done before, kept")

    def _done(self, event: Mapping[str, Any]) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None
        record = event["record"]
        loss = f", loss {record.metrics['loss']:.3f}" if "loss" in record.metrics else ""
        self.console.print(f"[green]✓[/] {event['step']}  {span(record.seconds)}{loss}")


def show_results(console: Console, folder: Path) -> None:
    """The table of a run and its verdicts, from the same summary as the report."""
    from rich.markup import escape
    from rich.table import Table as Grid

    from luthier import report

    found = report.summary(folder)
    if any(len(row) > 2 for row in found.rows):
        grid = Grid(title="Results", title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in found.columns:
            grid.add_column(column, overflow="fold")
        for row in found.rows:
            grid.add_row(*(escape(row.get(column, "")) for column in found.columns))
        console.print()
        console.print(grid)
    for verdict in found.verdicts:
        console.print(f"{escape(verdict.question)} [bold]{verdict.word}[/]: {escape(verdict.why)}", soft_wrap=True)
    for note in found.notes:
        console.print(note, style="dim", soft_wrap=True, markup=False)


def _next(console: Console, folder: Path, model: str | None, recipe: str) -> None:
    console.print("\nNext:")
    if model:
        path = folder / "steps" / model
        chats = (path / "chat_template.jinja").exists() or "chat_template" in _text(path / "tokenizer_config.json")
        ask = f"luthier chat {path}" if chats else f'luthier generate {path} "Once"'
        console.print(f"  {ask}", soft_wrap=True)
    console.print(f"  luthier run {recipe} --set seed=1 --folder {folder}-seed1", soft_wrap=True)
    if not model:
        console.print(f"  luthier report {folder}", soft_wrap=True)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def console() -> Console:
    """The terminal; wide enough for a table where the output goes to a file."""
    from rich.console import Console

    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=max(made.width, 140))


def count(number: float | None) -> str:
    """134.5M, 12.3k"""
    if number is None:
        return ""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f}{unit}"
    return f"{number:.0f}"


def size(nbytes: float) -> str:
    """1.2 GiB, 34 MiB"""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"


def span(seconds: float) -> str:
    """12 s, 3.4 min, 2.1 h"""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
