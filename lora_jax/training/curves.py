"""Draw the metrics of a run, curves.png."""

from __future__ import annotations

import io
import pathlib
from typing import Any

from matplotlib.figure import Figure

from lora_jax.training import metrics

FILE = "curves.png"


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
    """Plot one metric: at every validation and, if it is the loss, at every training step."""
    if name == "loss":
        steps = [line for line in lines if "split" not in line]
        _plot(axis, steps, name, "training", linewidth=0.8)
    evaluations = [line for line in lines if line.get("split") == "validation"]
    _plot(axis, evaluations, name, "validation", marker="o")
    axis.set(xlabel="step", title=name)
    axis.legend()


def _plot(axis: Any, lines: list[metrics.Line], name: str, label: str, **style: Any) -> None:
    found = [line for line in lines if line.get(name) is not None]
    axis.plot([x["step"] for x in found], [x[name] for x in found], label=label, **style)
