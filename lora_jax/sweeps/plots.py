"""Draw the results of a group, results.png."""

from __future__ import annotations

import functools
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from lora_jax.sweeps import member_names
from lora_jax.sweeps.comparison import ComparedRun, Results
from lora_jax.training import curves

DrawPanel = Callable[[Any], None]  # a function that draws into a set of axes

_FIRST = "optimizer.learning_rate"  # the field along the axis, if it was varied
LINES = 17  # including the best run; with more lines a legend cannot be read
_WIDE = 52  # characters of a legend
_DASHES = ("-", "--", ":", "-.")
_COLUMNS = 4
_BEST = {"marker": "*", "markersize": 18, "color": "gold", "markeredgecolor": "black", "zorder": 5}


def figure_of(results: Results) -> Figure:
    """Draw the results.

    For a sweep it shows the score over the learning rate (or another number), with a line for each
    combination of the other fields; over seeds it shows the mean, with the range as a band. For
    tasks it has one panel each.
    """
    return _figure(results, [draw for _, draw in _panels(results)])


def figures_of(results: Results) -> list[tuple[str, Figure]]:
    """Draw each panel as a figure of its own, with the name of its split or task."""
    return [(name, _figure(results, [draw])) for name, draw in _panels(results)]


def _panels(results: Results) -> list[tuple[str, DrawPanel]]:
    """Return the name of each panel, and the function that draws it."""
    if results.tasks:
        return [(row.name, functools.partial(_task, row=row)) for row in results.rows]
    along = _along(results)
    if along is None:
        return [("all runs", functools.partial(_dots, results=results))]
    draw = functools.partial(_split, results=results, along=along)
    splits = results.splits or ("validation",)
    return [(split, functools.partial(draw, split=split)) for split in splits]


def _figure(results: Results, panels: Sequence[DrawPanel]) -> Figure:
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=not results.tasks).flatten()
    for axis, draw in zip(axes, panels, strict=False):
        draw(axis)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if axes[0].get_legend() is None:
        legend(figure, axes[0])
    return figure


def legend(figure: Figure, axis: Any) -> None:
    """Put a legend of the lines of `axis` below it, as wide as its figure, if they are not many."""
    handles, labels = axis.get_legend_handles_labels()
    if 1 < len(labels) <= LINES:
        labels = [textwrap.fill(label, _WIDE) for label in labels]
        columns = max(min(3, _WIDE // (max(map(len, labels)) + 6)), 1)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _along(results: Results) -> str | None:
    """Return the field for the axis, a number in every run: the learning rate if it was varied."""

    def fits(path: str) -> bool:
        found = [row.values[path] for row in results.rows]
        return path != "seed" and all(type(v) in (int, float) for v in found)

    return next((p for p in (_FIRST, *results.varied) if p in results.varied and fits(p)), None)


def _split(panel: Any, results: Results, along: str, split: str) -> None:
    """Draw the lines of one split; the runs of a line differ only in `along` and the seed."""
    short = {path: member_names.shortest(path, results.varied) for path in results.varied}
    others = [path for path in results.varied if path not in (along, "seed")]
    groups = defaultdict[tuple[Any, ...], list[ComparedRun]](list)
    for row in results.rows:
        groups[tuple(row.values[path] for path in others)].append(row)
    for style, (values, rows) in zip(_styles(list(groups)), groups.items(), strict=True):
        label = ", ".join(
            f"{short[p]} {member_names.label(v)}" for p, v in zip(others, values, strict=True)
        )
        _line(panel, rows, along, split, label=label, **style)
    _mark(panel, results, along, split)
    _scale(panel, sorted({row.values[along] for row in results.rows}))
    panel.set(xlabel=short[along].replace("_", " "), ylabel=results.rows[0].select, title=split)
    panel.label_outer()
    panel.grid(alpha=0.3)
    curves.bound(panel)


def _styles(groups: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return a colour for each value of the first field, and a dash for each of the others."""
    first = list(dict.fromkeys(values[:1] for values in groups))
    rest = list(dict.fromkeys(values[1:] for values in groups))
    shades = [line["color"] for line in mpl.rcParams["axes.prop_cycle"]]
    if len(first) > len(shades):
        ways = (0.3 + 0.55 * i / (len(first) - 1) for i in range(len(first)))
        shades = [mpl.colormaps["viridis"](way) for way in ways]
    return [
        {
            "color": shades[first.index(values[:1])],
            "linestyle": _DASHES[rest.index(values[1:]) % len(_DASHES)],
        }
        for values in groups
    ]


def _line(panel: Any, rows: Sequence[ComparedRun], along: str, split: str, **style: Any) -> None:
    found = defaultdict[float, list[float]](list)
    for row in rows:
        if (score := row.score(split)) is not None:
            found[row.values[along]].append(score)
    places = sorted(found)
    means = [math.fsum(found[x]) / len(found[x]) for x in places]
    panel.plot(places, means, marker="o", **style)
    if any(len(scores) > 1 for scores in found.values()):
        low, high = ([f(found[x]) for x in places] for f in (min, max))
        panel.fill_between(places, low, high, alpha=0.15, color=style["color"], linewidth=0)


def _mark(panel: Any, results: Results, along: str, split: str) -> None:
    """Draw a star at the run that the validation split picks, in every panel."""
    best = results.best
    if best is not None and (score := best.score(split)) is not None:
        panel.plot([best.values[along]], [score], linestyle="none", label="best", **_BEST)
        place = (best.values[along], score)
        panel.annotate(f"{score:.4f}", place, (0, 12), textcoords="offset points", ha="center")
        panel.margins(x=0.07, y=0.15)


def _scale(panel: Any, places: Sequence[float]) -> None:
    """Set a tick at each value, and a logarithmic axis if the values grow by factors."""
    if places[0] > 0 and places[-1] / places[0] >= 4:
        panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(places))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticklabels([member_names.label(float(x)) for x in places])


def _dots(panel: Any, results: Results) -> None:
    """Draw a dot for each run, the best on top, if nothing that was varied is a number."""
    rows = sorted(results.rows, key=lambda row: row.rank)
    panel.figure.set_size_inches(7, 1.2 + 0.35 * len(rows))
    for split, marker in zip(results.splits, "oxs", strict=False):
        scores = [math.nan if (s := row.score(split)) is None else s for row in rows]
        panel.plot(scores, range(len(rows)), marker, label=split)
    panel.set_yticks(range(len(rows)), [row.name for row in rows])
    panel.set(xlabel=rows[0].select)
    panel.grid(alpha=0.3)


def _task(panel: Any, row: ComparedRun) -> None:
    """Draw the validation score at every evaluation, and the test score before and after."""
    if row.curve:
        steps, scores = zip(*row.curve, strict=True)
        panel.plot(steps, scores, marker="o", label="validation")
        panel.axhline(scores[0], color="gray", linewidth=0.8, linestyle=":", label="before")
    best, score = row.summary["best_step"], row.score("validation")
    if best is not None and score is not None:
        panel.plot([best], [score], linestyle="none", label=f"best: {score:.4f}", **_BEST)
    before, after = row.score("test", "before"), row.score("test")
    tested = "" if before is None or after is None else f"\ntest {before:.4f} → {after:.4f}"
    panel.set(title=f"{row.name}{tested}", xlabel="step", ylabel=row.select)
    panel.grid(alpha=0.3)
    panel.margins(y=0.12)
    curves.bound(panel)
    panel.legend()
