"""The record of a run as a picture."""

from __future__ import annotations

import pathlib
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_jax.training import metrics


def draw(run: pathlib.Path) -> None:
    """Write curves.png: the loss of every step and the numbers of every evaluation."""
    lines = metrics.read(run)
    steps = [line for line in lines if "split" not in line]
    evaluations = [line for line in lines if line.get("split") == "validation"]
    names = [n for n in (evaluations[0] if evaluations else ()) if n not in ("step", "split")]
    scores = [name for name in names if name != "loss"]
    figure = Figure(figsize=(5 * (1 + len(scores)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(scores), squeeze=False)[0]
    _plot(axes[0], steps, "loss", "training", linewidth=0.8)
    for axis, name in zip(axes, ["loss", *scores], strict=True):
        _plot(axis, evaluations, name, "validation", marker="o")
        axis.set(xlabel="step", title=name)
        axis.legend()
    figure.savefig(run / "curves.png", dpi=100)


def _plot(axis: Any, lines: list[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    found = [line for line in lines if line.get(name) is not None]
    axis.plot([x["step"] for x in found], [x[name] for x in found], label=label, **style)
