"""Compare choices of matrices with equal numbers of trained parameters (the paper's Table 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.paper.settings import Setting, matrices
from experiments.shared import charts
from lora_jax.report import formatting, svg
from lora_jax.report.document import Block, Figure, Panel, Table

MatrixScores = Mapping[tuple[str, ...], tuple[float, float]]  # matrices -> WikiSQL, MNLI


def blocks(found: Sequence[Setting], published: MatrixScores, name: str) -> list[Block]:
    """Make a figure and a table of settings that differ in their matrices, if there are any."""
    if not found:
        return []
    found, unit = sorted(found, key=_place), found[0].unit
    rows = []
    for setting in found:
        paper = published.get(matrices(setting), ())
        texts = [f"{value:.1f}" for value in paper] or [formatting.NONE] * 2
        rows.append(
            (
                label(setting),
                str(setting.config["lora.rank"]),
                f"{setting.trained:,}",
                setting.text("validation"),
                setting.text("test"),
                str(len(setting.runs)),
                *(texts if published else ()),
            )
        )
    columns = ("matrices", "r", "trained", "validation", "test", "seeds")
    theirs = ("paper: WikiSQL", "paper: MNLI") if published else ()
    table = Table(
        f"Scores are {unit.label}: mean ± standard deviation over seeds. The trained parameters "
        "include the head.",
        (*columns, *theirs),
        tuple(rows),
        ("matrices",),
    )
    ours = {label(setting): setting.shown("test") for setting in found}
    means = [sum(values) / len(values) for values in ours.values() if values]
    panels = [
        Panel(
            f"{name}-ours",
            f"Test {unit.label}, a line for each choice of matrices: {formatting.span(means)}",
            charts.dots(ours, unit.label, "test"),
        )
    ]
    if published:
        theirs_too = {"+".join(_short(names)): (value[0],) for names, value in published.items()}
        panels.append(
            Panel(
                f"{name}-paper",
                "The paper's accuracy on WikiSQL, GPT-3 175B: "
                + formatting.span(value[0] for value in published.values()),
                charts.dots(theirs_too, "accuracy, %", "the paper: GPT-3, WikiSQL"),
            )
        )
    with svg.style():
        figure = Figure("The score of every seed, with mean and standard deviation.", tuple(panels))
    return [figure, table]


def _place(setting: Setting) -> tuple[bool, int, list[int]]:
    """Return the sort key of Table 5: one matrix of attention, two, four; then the MLP's."""
    order = ("query", "q", "key", "k", "value", "v", "output", "o")
    names = matrices(setting)
    known = [order.index(name) for name in names if name in order]
    return (len(known) < len(names), len(names), known)


def label(setting: Setting) -> str:
    """Return a short name of the adapted matrices.

    >>> label(Setting({"lora.targets": ("layer*/{query,value}/kernel",)}, ()))
    'q+v'
    """
    return "+".join(_short(matrices(setting)))


def _short(names: Sequence[str]) -> list[str]:
    short = {"query": "q", "key": "k", "value": "v", "output": "o"}
    return [short.get(name, f"MLP {name}" if name in ("up", "down") else name) for name in names]
