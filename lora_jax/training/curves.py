"""Draw the metrics of a run, curves.png."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from lora_jax.training import metrics

FILE = "curves.png"
_STEEP = 2.5


def draw(run: pathlib.Path) -> bytes:
    """Return curves.png: the loss of every step and the scores of every evaluation."""
    lines = metrics.read(run)
    shown = names(lines)
    figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        plot(axis, lines, name)
    return png(figure, dpi=100)


def png(figure: Figure, dpi: int) -> bytes:
    """Return a figure as the bytes of a PNG file of `dpi` pixels per inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def names(lines: list[metrics.Line]) -> list[str]:
    """Return the names of the metrics that get a curve: the loss, and the scores of evaluations."""
    evaluations = [line for line in lines if line.get("split") == "validation"]
    found = [n for n in (evaluations[0] if evaluations else ()) if n not in ("step", "split")]
    return ["loss", *(name for name in found if name != "loss")]


def plot(axis: Any, lines: list[metrics.Line], name: str) -> None:
    """Plot one metric, at every training step and every validation that has it."""
    steps = [line for line in lines if "split" not in line]
    _plot(axis, steps, name, "training", linewidth=0.8)
    evaluations = [line for line in lines if line.get("split") == "validation"]
    _plot(axis, evaluations, name, "validation", marker="o")
    axis.set(xlabel="step", title=name)
    axis.legend()
    bound(axis)


def _plot(axis: Any, lines: list[metrics.Line], name: str, label: str, **style: Any) -> None:
    found = [line for line in lines if line.get(name) is not None]
    if found:
        axis.plot([x["step"] for x in found], [x[name] for x in found], label=label, **style)


def bound(axis: Any) -> None:
    """End the axis of shares, such as an accuracy, at 1; and show the tail of a steep fall.

    A curve whose first tenth is far above its last half has a logarithmic axis.
    """
    lines = [np.asarray(line.get_ydata(), float) for line in axis.lines]
    lines = [line[np.isfinite(line)] for line in lines if len(line) > 1]
    if not (lines := [line for line in lines if len(line)]):
        return
    if max(line.max() for line in lines) <= 1 < axis.get_ylim()[1]:
        axis.set_ylim(top=1)
    starts = max(line[: len(line) // 10 + 1].mean() for line in lines)
    ends = min(np.median(line[len(line) // 2 :]) for line in lines)
    falls = axis.get_title() != "learning_rate" and starts > _STEEP * ends
    if falls and min(line.min() for line in lines) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
