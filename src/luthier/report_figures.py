"""The report's pictures, drawn by matplotlib as inline SVG: curves, differences, depth, changes by layer."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ("#1f5fa8", "#c2561a", "#2e7d4f", "#8a4fa3", "#a8862a", "#5b6b7a", "#b03a5b", "#2a8f9e")
STYLE: Any = {
    "svg.hashsalt": "luthier", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a94a0", "axes.labelcolor": "#3b4550",
    "xtick.color": "#5b6570", "ytick.color": "#3b4550", "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
GOOD, BAD, NEUTRAL = "#2e7d4f", "#b03a2e", "#5b6570"


def curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Training loss against step; the pale lines are raw, one a training, the strong one is smoothed, the mean
    over the trainings that differ in what comes after the @ of their names."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.6, 3.6), layout="constrained")
        for (name, runs), colour in zip(_arms(histories).items(), _cycle(), strict=False):
            for rows in runs:
                axes.plot(*_line(rows, "step"), color=colour, alpha=0.25, linewidth=1)
            axes.plot(*_mean(runs, "step"), color=colour, linewidth=2, label=name)
        axes.set(xlabel="optimizer step", ylabel="training loss, nats per label token")
        axes.legend(frameon=False, ncols=3, fontsize=9)
        return _svg(figure)


def costs(histories: Mapping[str, Sequence[Mapping[str, Any]]], flops: Mapping[str, float]) -> str:
    """Training loss, smoothed and averaged over repeats, against tokens, floating-point operations and seconds.

    flops: operations a token of each training.
    """
    axes_of = {"tokens": "tokens", "flops": "floating-point operations", "seconds": "seconds"}
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(9.2, 3.2), sharey=True, layout="constrained")
        for (name, runs), colour in zip(_arms(histories, flops).items(), _cycle(), strict=False):
            for axes, key in zip(panels, axes_of, strict=True):
                axes.plot(*_mean(runs, key), color=colour, linewidth=2, label=name)
        for axes, label in zip(panels, axes_of.values(), strict=True):
            axes.set_xlabel(label, fontsize=9)
            axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        panels[0].set_ylabel("training loss, nats per label token")
        panels[0].legend(frameon=False, fontsize=9)
        return _svg(figure)


def _arms(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], flops: Mapping[str, float] | None = None
) -> dict[str, list[list[Mapping[str, Any]]]]:
    """The trainings of each step of the recipe, those that were repeated together."""
    arms: dict[str, list[list[Mapping[str, Any]]]] = {}
    for name, rows in histories.items():
        counted: list[Mapping[str, Any]] = [{**r, "flops": r["tokens"] * (flops or {}).get(name, 0.0)} for r in rows]
        arms.setdefault(name.split("@")[0], []).append(counted)
    return arms


def _line(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [r[key] for r in rows], [r["loss"] for r in rows]


def _mean(runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> tuple[list[float], list[float]]:
    """The mean over repeats, entry by entry as far as all of them go, smoothed."""
    entries = list(zip(*(list(zip(*_line(rows, key), strict=True)) for rows in runs), strict=False))
    across = [sum(x for x, _ in entry) / len(entry) for entry in entries]
    return across, _smooth([sum(y for _, y in entry) / len(entry) for entry in entries])


def differences(rows: Sequence[Mapping[str, Any]]) -> str:
    """Paired differences to the reference with intervals, a panel for each data and metric.

    rows: dicts with model, data, metric, diff, low, high.  Green is better than the reference.
    """
    panels = list(dict.fromkeys((r["data"], r["metric"]) for r in rows))
    models = list(dict.fromkeys(r["model"] for r in rows))
    with plt.rc_context(STYLE):
        height = 0.9 + 0.34 * len(models)
        figure, grid = plt.subplots(
            1, len(panels), figsize=(9.2, height), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, (data, metric) in zip(grid[0], panels, strict=True):
            better = 1 if metric == "accuracy" else -1
            for row in rows:
                if (row["data"], row["metric"]) != (data, metric):
                    continue
                y = models.index(row["model"])
                colour = GOOD if row["low"] * better > 0 and row["high"] * better > 0 else NEUTRAL
                colour = BAD if row["low"] * better < 0 and row["high"] * better < 0 else colour
                axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2.4, solid_capstyle="round")
                axes.plot([row["diff"]], [y], "o", color=colour, markersize=6)
            axes.axvline(0, color="#8a94a0", linewidth=1, linestyle=(0, (3, 3)))
            unit = "share of answers" if metric == "accuracy" else "nats per token"
            between = "\n" if len(panels) > 3 else " "
            axes.set_title(f"{data}: {metric}")
            axes.set_xlabel(f"difference,{between}{unit}", fontsize=9)
            axes.set_yticks(range(len(models)), models)
            axes.set_ylim(len(models) - 0.5, -0.5)
        return _svg(figure)


def depth(rows: Sequence[Mapping[str, Any]]) -> str:
    """A panel for each data and metric: the value, or the change where the row has one, against the layer.

    rows: dicts with model, data, metric, layer, value, and for skipped layers last, change and error.
    Variances and Jacobians are drawn by their logarithm. One layer may dwarf the others (without the first
    one nothing works), so other scales end at three times the ninth tenth of what they show; what lies
    beyond is a ring there, its value written beside.
    """
    panels = list(dict.fromkeys((r["data"], r["metric"]) for r in rows))
    colours = dict(zip(dict.fromkeys(r["model"] for r in rows), _cycle(), strict=False))
    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(lines, columns, figsize=(9.2, 2.7 * lines), squeeze=False, layout="constrained")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (data, metric) in zip(grid.flat, panels, strict=False):
            shown = [r for r in rows if (r["data"], r["metric"]) == (data, metric)]
            for model, colour in colours.items():
                _by_layer(axes, [r for r in shown if r["model"] == model], colour, model)
            if metric in ("variance", "jacobian"):
                axes.set_yscale("log")
            else:
                _cut(axes, shown, colours)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_title(f"{data}: {metric}")
            axes.set_xlabel("layer", fontsize=9)
        handles, names = grid.flat[0].get_legend_handles_labels()
        if len(colours) > 1:
            figure.legend(handles, names, frameon=False, ncols=4, fontsize=9, loc="outside upper left")
        return _svg(figure)


def _height(row: Mapping[str, Any]) -> float:
    return row["value"] if row.get("change") is None else row["change"]


def _by_layer(axes: Any, rows: Sequence[Mapping[str, Any]], colour: str, name: str) -> None:
    places = [(r["layer"] + (r.get("last") or r["layer"])) / 2 for r in rows]
    heights, errors = [_height(r) for r in rows], [r.get("error") or 0.0 for r in rows]
    axes.plot(places, heights, "o-", color=colour, linewidth=1.6, markersize=3.5, label=name)
    if any(errors):
        axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor=colour, alpha=0.4, linewidth=1)


def _cut(axes: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """End the scale where a few values would flatten all others, and ring them."""
    heights = sorted(map(_height, rows))
    top = 3 * heights[int(0.9 * (len(heights) - 1))]
    axes.axhline(0, color="#8a94a0", linewidth=0.8)
    if heights[-1] <= top or top <= 0:
        return
    axes.set_ylim(min(0, heights[0]) - 0.05 * top, 1.05 * top)
    for line, row in enumerate(r for r in rows if _height(r) > top):
        place, colour = row["layer"], colours[row["model"]]
        axes.plot([place], [top], "o", color=colour, markersize=6, fillstyle="none")
        said = f"layer {place}: {_height(row):.3g}"
        axes.text(  # in the middle: the layers that dwarf the others are mostly the first and the last
            0.5, 0.97 - 0.085 * line, said, transform=axes.transAxes, fontsize=8, color=colour, ha="center", va="top"
        )


def layers(changes: Mapping[str, Mapping[str, Mapping[int, float]]]) -> str:
    """A heat map for each model: relative change by layer (across) and role (down), one colour scale."""
    names = list(changes)
    columns = 2 if len(names) > 1 else 1
    lines = -(-len(names) // columns)
    peak = max((v for m in changes.values() for r in m.values() for v in r.values()), default=0.0) or 1.0
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(lines, columns, figsize=(9.2, 1.9 * lines), squeeze=False, layout="constrained")
        image = None
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(grid.flat, names, strict=False):
            roles = [r for r in changes[name] if any(changes[name][r].values())] or list(changes[name])[:1]
            depth = 1 + max((layer for r in roles for layer in changes[name][r]), default=0)
            values = [[changes[name][r].get(layer, 0.0) for layer in range(depth)] for r in roles]
            image = axes.imshow(values, aspect="auto", cmap="YlGnBu", vmin=0, vmax=peak, interpolation="nearest")
            axes.set_title(name)
            axes.set_yticks(range(len(roles)), [r.split(".", 1)[-1] for r in roles], fontsize=8)
            axes.set_xlabel("layer", fontsize=9)
        if image is not None:
            figure.colorbar(image, ax=grid, shrink=0.7, label="‖change‖ / ‖weight‖")
        return _svg(figure)


def grids(panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> str:
    """A heat map for each measure, by layer (across) and role (down), each on its own colour scale."""
    with plt.rc_context(STYLE):
        rows = max((len(p) for p in panels.values()), default=1)
        height = (0.9 + 0.2 * rows) * -(-len(panels) // 2)
        figure, grid = plt.subplots(
            -(-len(panels) // 2), 2, figsize=(9.2, height), squeeze=False, layout="constrained"
        )  # fmt: skip
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, roles) in zip(grid.flat, panels.items(), strict=False):
            depth = 1 + max((layer for layers in roles.values() for layer in layers), default=0)
            values = [[layers.get(i, float("nan")) for i in range(depth)] for layers in roles.values()]
            image = axes.imshow(values, aspect="auto", cmap="YlGnBu", interpolation="nearest")
            axes.set_title(title)
            axes.set_yticks(range(len(roles)), list(roles), fontsize=8)
            axes.set_xlabel("layer", fontsize=9)
            figure.colorbar(image, ax=axes, shrink=0.8)
        return _svg(figure)


def classes(rows: Sequence[Mapping[str, Any]]) -> str:
    """A heat map for each data: the share of right answers, in percent, of each model (across) in each class (down).

    rows: dicts with model, data, class, value and items.
    """
    panels, models, kinds = (list(dict.fromkeys(r[key] for r in rows)) for key in ("data", "model", "class"))
    kinds.sort()
    lines = -(-len(panels) // 3)
    with plt.rc_context(STYLE):
        height = (1.1 + 0.22 * len(kinds)) * lines
        figure, grid = plt.subplots(
            lines, min(3, len(panels)), figsize=(9.2, height), sharey=True, squeeze=False, layout="constrained"
        )
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, data in zip(grid.flat, panels, strict=False):
            of = {(r["class"], r["model"]): r["value"] for r in rows if r["data"] == data}
            values = [[of.get((kind, model), float("nan")) for model in models] for kind in kinds]
            axes.imshow(values, aspect="auto", cmap="YlGnBu", vmin=0, vmax=1, interpolation="nearest")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    if value == value:
                        colour = "white" if value > 0.6 else "#3b4550"
                        axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
            axes.set_title(data)
            axes.set_xticks(range(len(models)), models, fontsize=8, rotation=40, ha="right")
            axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
        return _svg(figure)


def _cycle() -> Sequence[str]:
    return COLOURS * 4


def _smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential average, corrected for its start."""
    out, mean, mass = [], 0.0, 0.0
    for value in values:
        mean, mass = keep * mean + (1 - keep) * value, keep * mass + (1 - keep)
        out.append(mean / mass)
    return out


def _svg(figure: Any) -> str:
    """The figure as an SVG element, without the XML head and without the date, so bytes repeat."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg)', lambda m: m.group(1) or m.group(2), text, count=1
    )
