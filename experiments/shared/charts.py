"""Charts of scores with their spread over seeds, and of the paper's single numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.shared.spreads import mean, spread
from lora_jax.report import svg


def dots(found: Mapping[str, Sequence[float]], label: str, title: str) -> Figure:
    """Plot every value, the mean and the standard deviation, in one row for each name."""
    with svg.drawing(4.6, 1.1 + 0.3 * max(len(found), 3)) as (figure, axis):
        for row, values in enumerate(found.values()):
            if not values:
                continue
            axis.scatter(values, [row] * len(values), s=16, color="C0", alpha=0.45, linewidths=0)
            apart = spread(values) if len(values) > 1 else None
            axis.errorbar(mean(values), row, xerr=apart, fmt="o", color="C0", capsize=3)
        axis.set_yticks(range(len(found)), list(found))
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.set(xlabel=label, title=title)
        axis.grid(axis="x")
    return figure


def lines(
    found: Mapping[str, Mapping[int, Sequence[float]]],
    xlabel: str,
    label: str,
    title: str,
) -> Figure:
    """Plot a line for each name over a whole number on a logarithmic axis."""
    with svg.drawing() as (figure, axis):
        places = sorted({x for line in found.values() for x, values in line.items() if values})
        for number, (name, line) in enumerate(found.items()):
            own = [(x, values) for x, values in sorted(line.items()) if values]
            shift = 1 + 0.04 * (number - (len(found) - 1) / 2)  # keeps error bars apart
            axis.errorbar(
                [x * shift for x, _ in own],
                [mean(values) for _, values in own],
                yerr=[spread(v) if len(v) > 1 else 0.0 for _, v in own],
                marker="o",
                markersize=4,
                capsize=3,
                label=name,
            )
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(places[:: -(-len(places) // 8) or 1])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.set(xlabel=xlabel, ylabel=label, title=title)
        axis.grid()
        if len(found) > 1:
            figure.legend(loc="outside lower center", ncols=3)
    return figure
