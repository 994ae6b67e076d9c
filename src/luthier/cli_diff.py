"""`luthier diff`: what changed between two checkpoints, as a table and a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.engine.changes import Change

PANELS: dict[str, Callable[[Any], float | None]] = {
    "‖change‖ / ‖weight‖": lambda c: c.relative, "share of entries moved": lambda c: c.moved,
    "rank at 90 %, of the most": lambda c: c.rank / c.short if c.rank else None,
    "share of signs turned": lambda c: 1 - c.signs,
}  # fmt: skip


def options_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="folder, bundled name or Hub id")
    parser.add_argument("second", help="the same, or a delta or adapter on the first")
    parser.add_argument("--layers", action="store_true", help="a row for each layer instead of each role")
    parser.add_argument("--no-rank", action="store_true", help="leave out the rank, which takes the longest")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="where the picture goes (diff.svg)")
    parser.add_argument(
        "--json", action="store_true", help="every tensor's change as JSON, and no picture unless named"
    )


def do_diff(args: argparse.Namespace) -> None:
    """Compares tensor by tensor; only what both have in one shape."""
    picture = args.picture or (None if args.json else Path("diff.svg"))
    if picture and not picture.parent.is_dir():
        raise LuthierError("no such folder", where=str(picture.parent), do="make it, or name another --picture")
    from luthier.checkpoint.bundled import NOTES
    from luthier.checkpoint.expert import open_expert
    from luthier.checkpoint.resolve import resolve
    from luthier.cli_models import bar
    from luthier.cli_run import quiet
    from luthier.engine import changes as engine
    from luthier.recipe_inputs import is_change

    quiet()
    old = resolve(args.first)
    new = open_expert(args.second, old) if is_change(Path(args.second)) else resolve(args.second)
    with bar("comparing") as watch:
        rows = engine.changes(old, new, not args.no_rank, lambda items: _counted(items, watch))
    if not rows:
        raise LuthierError("no tensor of one name and shape in both", where=f"{args.first} and {args.second}")
    left = engine.unmatched(old, new)
    if args.json:
        print(json.dumps({"changes": [asdict(c) for c in rows], "unmatched": left}, indent=1))
    else:
        _show(engine.summed(rows, _layer if args.layers else lambda c: c.role).dicts(), left)
        for note in dict.fromkeys(NOTES[name] for name in (args.first, args.second) if name in NOTES):
            print(note)
    if picture:
        _draw(rows, picture)
        print(*([] if args.json else [picture]), sep="\n", end="" if args.json else "\n")


def _counted(items: Sequence[Any], watch: Callable[[Mapping[str, Any]], None]) -> Any:
    for done, item in enumerate(items):
        watch({"kind": "progress", "what": "comparing", "done": done, "total": len(items)})
        yield item


def _layer(change: Change) -> str:
    return f"layer {change.layer}" if change.layer is not None else change.role


def _show(rows: Sequence[Mapping[str, Any]], left: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console()
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    grid.add_column("what")
    for name in ("tensors", "entries moved", "‖change‖", "of ‖weight‖", "mean rank at 90 %", "signs kept"):
        grid.add_column(name, justify="right")
    for row in rows:
        rank = f"{row['rank']:.0f} of {row['of']:.0f}" if row["rank"] is not None else ""
        grid.add_row(row["what"], f"{row['tensors']}", f"{row['moved']:.2%}", f"{row['norm']:.4g}",
                     f"{row['relative']:.3%}", rank, f"{row['signs']:.2%}")  # fmt: skip
    console.print(grid)
    for line in left[:10]:
        console.print(line, markup=False)
    if len(left) > 10:
        console.print(f"and {len(left) - 10} more that only one has; --json lists all", markup=False)


def _draw(rows: Sequence[Change], out: Path) -> None:
    from luthier.checkpoint.atomic import write_file
    from luthier.report_figures import grids

    panels: dict[str, dict[str, dict[int, float]]] = {}
    for title, value in PANELS.items():
        pooled: dict[str, dict[int, list[float]]] = {}
        for c in rows:
            number = value(c)
            if c.layer is not None and number is not None:
                pooled.setdefault(c.role, {}).setdefault(c.layer, []).append(number)
        if pooled:
            panels[title] = {r: {i: sum(v) / len(v) for i, v in ls.items()} for r, ls in pooled.items()}
    if not panels:
        raise LuthierError("no layer to draw", where=str(out), do="give --json for the numbers")
    text = grids(panels).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    write_file(out, text)
