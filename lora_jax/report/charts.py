"""Draw the charts of a report, each as a matplotlib figure with one set of axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_jax.report import svg
from lora_jax.sweeps import plots
from lora_jax.training import curves, metrics

_POINTS = 600  # points of a training curve: more than a screen has columns for
_WRITTEN = 12  # a heat map with at most this many rows has the numbers written in its cells
_LABELS = 32  # ticks of a heat map
_SHADES = mpl.colormaps["viridis"]


def curve(lines: Sequence[metrics.Line], name: str) -> Figure:
    """Plot a metric of metrics.jsonl over the steps, and the running mean of training steps."""
    with svg.drawing() as (figure, axis):
        curves.plot(axis, _thinned(lines, name), name)
        training = axis.lines[0]
        steps, found = training.get_xdata(), np.asarray(training.get_ydata(), float)
        width = max(len(found) // 20, 1)
        if training.get_label() == "training" and width > 1 and name != "learning_rate":
            training.set_alpha(0.35)
            mean = np.convolve(found, np.ones(width) / width, mode="valid")
            middle = steps[width // 2 : width // 2 + len(mean)]
            label = "training, running mean"
            axis.plot(middle, mean, color=training.get_color(), label=label)
        axis.legend()
        axis.grid()
    return figure


def _thinned(lines: Sequence[metrics.Line], name: str) -> list[metrics.Line]:
    """Average a metric of training over groups of steps, and keep every evaluation."""
    steps = [x for x in lines if "split" not in x and x.get(name) is not None]
    every = -(-len(steps) // _POINTS) or 1
    parts = [steps[i : i + every] for i in range(0, len(steps), every)]
    means = [
        {"step": part[len(part) // 2]["step"], name: sum(x[name] for x in part) / len(part)}
        for part in parts
    ]
    return [*means, *(line for line in lines if "split" in line)]


def compared(found: Mapping[str, Sequence[metrics.Line]], name: str) -> Figure:
    """Plot a metric of the validation split over the steps, with a line for each run."""
    with svg.drawing() as (figure, axis):
        for run, lines in found.items():
            own = [line for line in lines if line.get(name) is not None]
            axis.plot([x["step"] for x in own], [x[name] for x in own], marker="o", label=run)
        axis.set(xlabel="step", title=name)
        curves.bound(axis)
        axis.grid()
        plots.legend(figure, axis)
    return figure


def by_layer(
    found: Mapping[str, Sequence[float]],
    layers: Sequence[str],
    label: str,
    level: tuple[float, str] | None = None,
    top: float | None = None,
) -> Figure:
    """Plot a line for each name over the layers, and a dashed one at `level` (height, label)."""
    with svg.drawing() as (figure, axis):
        for name, values in found.items():
            axis.plot(range(len(layers)), values, marker="o", markersize=4, label=name)
        if level is not None:
            axis.axhline(level[0], color=svg.INK, alpha=0.6, linestyle="--", label=level[1])
        _layers(axis, layers)
        axis.set(ylabel=label)
        axis.set_ylim(bottom=0, top=top)
        axis.grid()
        plots.legend(figure, axis)
    return figure


def values(found: NDArray[np.floating], layers: Sequence[str], title: str) -> Figure:
    """Plot singular values [layer, i]: a line for each i over the layers; of one layer, over i.

    The largest has the full colour of a line, and the others are fainter.
    """
    with svg.drawing() as (figure, axis):
        rank = found.shape[1]
        if len(layers) > 1:
            for i in reversed(range(rank)):  # the largest is drawn on top of the others
                shade, alpha = _shade(i, rank)
                style: Any = {"marker": "o", "markersize": 4, "color": shade, "alpha": alpha}
                axis.plot(range(len(layers)), found[:, i], **style)
            _layers(axis, layers)
            _key(figure, axis, rank)
        else:
            axis.plot(range(1, rank + 1), found[0], marker="o")
            axis.set(xlabel="number of the singular value")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(ylabel="singular value", title=title)
        axis.set_ylim(bottom=0)
        axis.grid()
    return figure


def _shade(i: int, count: int) -> tuple[str, float]:
    """Return the colour of line i, and its share of it."""
    return next(iter(svg.LINES)), 1 - 0.75 * i / max(count - 1, 1)


def _key(figure: Figure, axis: Any, rank: int) -> None:
    """Add the colour bar that tells which shade belongs to which singular value."""
    if rank > 1:
        norm = BoundaryNorm(np.arange(rank + 1) + 0.5, rank)
        key = ScalarMappable(norm, ListedColormap([_shade(i, rank) for i in range(rank)]))
        ticks = sorted({1, rank} if rank > 10 else range(1, rank + 1))
        figure.colorbar(key, ax=axis, label="1 is the largest", ticks=ticks)


def _layers(axis: Any, layers: Sequence[str]) -> None:
    every = -(-len(layers) // 16)
    places = range(0, len(layers), every)
    axis.set_xticks(list(places), [layers[i] for i in places])
    axis.set(xlabel="layer")


def heat(
    found: NDArray[np.floating],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    labels: tuple[str, str] = ("layer", ""),
) -> Figure:
    """Draw a matrix [row, column] as a heat map; a NaN cell stays empty.

    `labels` names the rows and the columns.
    """
    high = 0.3 if len(rows) <= _WRITTEN else 0.16
    with svg.drawing(max(4.6, 1.6 + 0.62 * len(columns)), 1.3 + high * len(rows)) as (figure, axis):
        _cells(figure, axis, found, _top(found), title)
        every = -(-len(columns) // _LABELS)
        turned = 30 if len(columns) > 4 else 0
        axis.set_xticks(range(0, len(columns), every), columns[::every], rotation=turned)
        every = -(-len(rows) // _LABELS)
        axis.set_yticks(range(0, len(rows), every), rows[::every])
        axis.set(ylabel=labels[0], xlabel=labels[1], title=title)
    return figure


def phi(found: NDArray[np.floating], names: Sequence[str], title: str, top: float) -> Figure:
    """Draw the subspace similarities phi(i, j) as a heat map, whose lightest colour is `top`."""
    rows, columns = found.shape
    with svg.drawing(4.6, 1.7 + min(2.4, max(0.35 * rows, 0.35))) as (figure, axis):
        _cells(figure, axis, found, top, "φ(i, j)", 1)
        axis.set_xticks(range(1, columns + 1, -(-columns // 10)))
        axis.set_yticks(range(1, rows + 1, -(-rows // 8)))
        axis.set(xlabel=f"j: {names[1]}", ylabel=f"i: {names[0]}", title=title)
    return figure


def _cells(
    figure: Figure, axis: Any, found: NDArray[np.floating], top: float, label: str, first: int = 0
) -> None:
    """Colour the cells from 0 to `top`, and write the numbers in them if there are few.

    `first` is the number of the first row and of the first column.
    """
    rows, columns = found.shape
    image = axis.imshow(
        found,
        aspect="auto",
        interpolation="none",
        cmap=_SHADES,
        vmin=0,
        vmax=top,
        extent=(first - 0.5, first + columns - 0.5, first + rows - 0.5, first - 0.5),
    )
    for (i, j), number in np.ndenumerate(found):
        if max(rows, columns) <= _WRITTEN and np.isfinite(number):
            dark = number > 0.55 * top  # dark text, because these shades are light
            text = f"{number:.2f}" if top < 10 else f"{number:.0f}"
            color = "black" if dark else "white"
            axis.text(j + first, i + first, text, ha="center", va="center", color=color, size=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label=label)


def _top(found: NDArray[np.floating]) -> float:
    finite = found[np.isfinite(found)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0
