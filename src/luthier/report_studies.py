"""What a report shows of a search: how it got on, the trade-offs it found, and the best few candidates."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from luthier.errors import LuthierError
from luthier.flows import Table
from luthier.kit.front import front, hypervolume, regrets
from luthier.kit.metrics import HIGHER
from luthier.report_figures import BAD, COLOURS, NEUTRAL, STYLE, _svg

SHOWN, LETTERS, PANELS, MANY, DEEP, FEW = 8, 160, 6, 1500, 4, 2
"""Rows of the table, letters of a candidate, panels of a figure, points that are drawn one by one, objectives up to
which a hypervolume is worth its time, and trials that are worth a picture."""
PLACE = re.compile(r"(base|\d+)\.(\d+)")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """One search. pictures: (caption, svg).  rows: cells in the order of the columns; chosen: which row was carried
    out."""

    name: str
    text: str
    pictures: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    chosen: int


def sections(studies: Mapping[str, Table]) -> list[Section]:
    """One for each table of trials, in order."""
    return [_section(name, table) for name, table in studies.items() if {"items", "parameters"} <= set(table.columns)]


def _section(name: str, table: Table) -> Section:
    names = table.columns[table.columns.index("items") + 1 : table.columns.index("parameters")]
    base, *rows = table.dicts()
    whole = [r for r in rows if r["state"] == "whole"]
    stopped = len(rows) - len(whole)
    values = [_values(r, names) for r in whole]
    best = [whole[i] for i in front(values)]
    many = f"{len(whole)} candidates were" if len(whole) != 1 else "One candidate was"
    text = f"{many} judged on {base['items']} training items of each data"
    text += f", {stopped} more stopped early" if stopped else ""
    text += ". Everything is shown so that lower is better."
    caption = "Each candidate in the order tried, and the best so far; the dashed line is the base."
    caption += " Crosses were stopped early, after fewer items." if stopped else ""
    pictures = [(caption, progress(base, rows, names))] if len(rows) >= FEW else []
    moving = [n for n in names if len({r[n] for r in (base, *whole)}) > 1]
    if len(moving) > 1 and pictures:
        still = [f" {label(n)} is the same for all and left out." for n in names if n not in moving]
        said = _tradeoff(base, whole, best, moving, table.notes) + "".join(still)
        pictures.append((said, tradeoffs(base, whole, best, moving)))
    few = _few(whole, values, best)
    cells = [_cells(row, names) for row in (base, *few)]
    columns = ("trial", *map(label, names), "parameters", "seconds", "candidate")
    return Section(name, text, tuple(pictures), columns, tuple(cells), 1)


def _tradeoff(base: Row, whole: Sequence[Row], best: Sequence[Row], names: Sequence[str], notes: Sequence[str]) -> str:
    """notes: a method's own words on its front count, so that one front has one hypervolume."""
    said = f"{len(best)} of {len(whole)} candidates are beaten by no other one in every objective"
    own = next((n.partition(", ")[2] for n in notes if n.startswith("front: ") and "hypervolume" in n), "")
    if own:
        return f"{said}: the front, {own}."
    if len(names) > DEEP:
        return said + "."
    worst = [max(r[n] for r in (base, *whole)) for n in names]
    volume = hypervolume([_values(r, names) for r in best], worst)
    return f"{said}: the front. Its hypervolume is {volume:.4g}, before the worst value seen of each objective."


def _values(row: Row, names: Sequence[str]) -> tuple[float, ...]:
    return tuple(row[n] for n in names)


def _few(whole: Sequence[Row], values: Sequence[tuple[float, ...]], best: Sequence[Row]) -> list[Row]:
    """The chosen candidate, then those of the front, the fairest first, then the next fairest; each once."""
    optimal = {row["trial"] for row in best}
    behind = regrets(values)
    order = sorted(
        range(len(whole)), key=lambda i: (not whole[i]["chosen"], whole[i]["trial"] not in optimal, behind[i])
    )
    distinct: dict[str, Row] = {}
    for i in order:
        distinct.setdefault(whole[i]["candidate"], whole[i])
    return list(distinct.values())[:SHOWN]


def label(objective: str) -> str:
    """`sums accuracy` is judged by its mistakes: `sums wrong answers`."""
    data, _, metric = objective.rpartition(" ")
    return f"{data} wrong answers" if metric in HIGHER else objective


def _cells(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    cells = [f"{100 * row[n]:.1f}%" if n.rpartition(" ")[2] in HIGHER else f"{row[n]:.4f}" for n in names]
    count = f"{row['parameters']:,}".replace(",", " ")
    trial = str(row["trial"]) if row["candidate"] else "base"
    return (trial, *cells, count, f"{row['seconds']:.1f}", readable(row["candidate"]) if row["candidate"] else "")


def readable(candidate: str) -> str:
    """A candidate's method and the fields that are not as they come, briefly."""
    from luthier.shapes import Transform

    said = json.loads(candidate)
    fields: dict[str, Any] = said["set"]
    try:
        method = Transform.from_value(said)
        plain = {f.name: f.default for f in dataclasses.fields(method)}
        fields = {k: v for k, v in fields.items() if k not in plain or getattr(method, k) != plain[k]}
    except LuthierError:  # of a package that is not installed here
        pass
    text = "; ".join(f"{k} {_brief(v)}" for k, v in fields.items())
    text = f"{said['use']}: {text}" if text else said["use"]
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return "(" + _brief(value["use"]) + ")" if "use" in value else "(" + " + ".join(_terms(value)) + ")"
    if isinstance(value, list):
        return ", ".join(_runs(value))
    return str(value)


def _terms(mix: Mapping[str, Any]) -> Iterator[str]:
    return (f"{_brief(factor)} × {name}" for name, factor in mix.items())


def _runs(values: Sequence[Any]) -> Iterator[str]:
    """Neighbouring layers of one model as a range: `base.0-7`."""
    places = [PLACE.fullmatch(v) if isinstance(v, str) else None for v in values]
    start = 0
    while start < len(values):
        end, first = start + 1, places[start]
        while first and end < len(values) and (place := places[end]) and place[1] == first[1]:
            if int(place[2]) != int(first[2]) + end - start:
                break
            end += 1
        tail = f"-{places[end - 1][2]}" if end - start > 1 else ""  # type: ignore[index]
        yield _brief(values[start]) + tail
        start = end


def progress(base: Row, rows: Sequence[Row], names: Sequence[str]) -> str:
    """A panel for each objective: what every trial was worth, and the best so far."""
    names = names[:PANELS]
    columns = 2 if len(names) > 1 else 1
    lines = -(-len(names) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(lines, columns, figsize=(9.2, 2.7 * lines), squeeze=False, layout="constrained")
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(grid.flat, names, strict=False):
            _course(axes, base, rows, name)
            axes.set_title(label(name))
            axes.set_xlabel("trial", fontsize=9)
            _percent(axes.yaxis, name)
            axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, grid.flat[0])
        return _svg(figure)


def _course(axes: Any, base: Row, rows: Sequence[Row], name: str) -> None:
    whole = [r for r in rows if r["state"] == "whole"]
    stopped = [r for r in rows if r["state"] != "whole"]
    top = _top([base[name], *(r[name] for r in whole)])
    under = lambda some: [min(r[name], top) for r in some]  # noqa: E731
    places = lambda some: [r["trial"] for r in some]  # noqa: E731
    many: Any = {"rasterized": len(rows) > MANY, "linewidths": 0.8}
    axes.axhline(min(base[name], top), color="#8a94a0", linewidth=1, linestyle=(0, (3, 3)), label="base")
    if stopped:
        axes.scatter(places(stopped), under(stopped), marker="x", s=14, color=BAD, alpha=0.6, label="stopped", **many)
    axes.scatter(places(whole), under(whole), marker="o", s=12, color=NEUTRAL, alpha=0.5, label="judged whole", **many)
    running = list(itertools.accumulate((r[name] for r in whole), min))
    last = [rows[-1]["trial"]]
    axes.plot(
        places(whole) + last, [*running, running[-1]], color=COLOURS[0], linewidth=2, drawstyle="steps-post",
        label="best so far",
    )  # fmt: skip
    taken = [r for r in whole if r["chosen"]]
    axes.plot(places(taken), under(taken), **CHOSEN)
    beyond = sum(r[name] > top for r in rows)
    if beyond:
        said = f"{beyond} higher than {top:.3g}, drawn there"
        axes.text(1, 0.99, said, transform=axes.transAxes, fontsize=8, color=NEUTRAL, ha="right", va="bottom")


CHOSEN: Any = {
    "marker": "D", "color": COLOURS[1], "markersize": 7, "linestyle": "none", "label": "chosen",
    "markeredgecolor": "white", "zorder": 5,
}  # fmt: skip


def _top(values: Sequence[float]) -> float:
    """Where a scale ends that a few values would flatten."""
    ordered = sorted(values)
    low, usual = ordered[0], ordered[int(0.9 * (len(ordered) - 1))]
    end = low + 1.5 * (usual - low)
    return end if usual > low and ordered[-1] > low + 3 * (usual - low) else ordered[-1]


def tradeoffs(base: Row, whole: Sequence[Row], best: Sequence[Row], names: Sequence[str]) -> str:
    """A panel for each pair of objectives; of two alone the front is a line."""
    pairs = list(itertools.combinations(names, 2))[:PANELS]
    columns = min(3, len(pairs))
    lines = -(-len(pairs) // columns)
    size = (9.2, 4.2 if columns == 1 else 3.4 * lines)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axes in grid.flat[len(pairs) :]:
            axes.set_visible(False)
        for axes, (x, y) in zip(grid.flat, pairs, strict=False):
            _scatter(axes, base, whole, best, x, y, line=len(names) == 2)
        _legend(figure, grid.flat[0])
        return _svg(figure)


def _scatter(
    axes: Any, base: Row, whole: Sequence[Row], best: Sequence[Row], x: str, y: str, line: bool
) -> None:  # fmt: skip
    tops = [_top([r[n] for r in (base, *whole)]) for n in (x, y)]
    shown = lambda some: [[min(r[n], top) for r in some] for n, top in zip((x, y), tops, strict=True)]  # noqa: E731
    optimal = {r["trial"] for r in best}
    others = [r for r in whole if r["trial"] not in optimal]
    axes.scatter(
        *shown(others), marker="o", s=12, color=NEUTRAL, alpha=0.45, label="candidate", rasterized=len(whole) > MANY
    )
    ordered = sorted(best, key=lambda r: (r[x], -r[y]))
    axes.plot(
        *shown(ordered), "o", color=COLOURS[0], markersize=5, linewidth=1.6, label="front",
        linestyle="-" if line else "none", drawstyle="steps-post",
    )  # fmt: skip
    axes.plot(*shown([base]), "s", color="#1d2530", markersize=7, fillstyle="none", label="base", linestyle="none")
    axes.plot(*shown([r for r in whole if r["chosen"]]), **CHOSEN)
    axes.set_xlabel(label(x), fontsize=9)
    axes.set_ylabel(label(y), fontsize=9)
    axes.locator_params(axis="x", nbins=6)
    _percent(axes.xaxis, x)
    _percent(axes.yaxis, y)


def _percent(axis: Any, name: str) -> None:
    if name.rpartition(" ")[2] in HIGHER:
        axis.set_major_formatter(PercentFormatter(1.0))


def _legend(figure: Any, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, ncols=6, fontsize=9, loc="outside upper left")
