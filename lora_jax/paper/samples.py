"""Few examples and many: the paper's Table 16."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure as Drawing

from lora_jax.paper import published, settings, sweeps
from lora_jax.paper.experiments import Task
from lora_jax.paper.settings import Setting
from lora_jax.report import digits, ink
from lora_jax.report.document import Block, Figure, Panel, Section, Table
from lora_jax.training.group import names

METHODS = ("full", "prefix_embedding", "prefix_layer", "lora")
FILE = "configs/paper/samples.py"
ALL = 10_289  # rows of the training split of the reviews, for the axis
_RATE, _LIMIT = "optimizer.learning_rate", "data.train_limit"
_APART = 1.06  # the factor by which the bars of methods are moved apart
_MARKERS = "osD^v"
_COLOURS = ("#3f78b5", "#c79a2b", "#4f9d69", "#c8553d", "#8a63b5")  # readable on light and dark

Limits = dict[int | None, Setting]  # training examples, None: all
Found = dict[str, Limits]  # by the methods' names


def tasks(folder: pathlib.Path) -> Sequence[Task]:
    """A group of nine runs for each method."""
    return sweeps.tasks(folder, FILE, METHODS)


def sections(folder: pathlib.Path) -> Sequence[Section]:
    """What the report says of the runs in the folder, as far as they have finished.

    Raises:
      LoraError: what a run has left cannot be read.
    """
    runs = sweeps.runs(folder, METHODS)
    notes = sweeps.notes(tasks(folder), runs)
    found = by_limit(runs)
    blocks: list[Block] = [*_results(found)] if found else []
    return (Section("Few examples and many", (*blocks, *notes)),)


def by_limit(runs: sweeps.Runs) -> Found:
    """The finished runs of each method by the number of training examples, all of them last."""
    found: Found = {}
    for method, lefts in runs.items():
        own = {one.config.get(_LIMIT): one for one in settings.settings(lefts)}
        if own:
            found[method] = dict(sorted(own.items(), key=lambda item: _count(item[0])))
    return found


def _count(limit: int | None) -> int:
    return ALL if limit is None else limit


def _results(found: Found) -> list[Block]:
    limits = sorted({limit for own in found.values() for limit in own}, key=_count)
    theirs = sorted({count for own in published.SAMPLES.values() for count in own})
    rows = []
    for method, own in found.items():
        scores = [own[limit].scores("test") if limit in own else [] for limit in limits]
        paper = published.SAMPLES.get(method, {})
        rates = dict.fromkeys(names.number(float(one.config[_RATE])) for one in own.values())
        rows.append(
            (
                method,
                ", ".join(rates),
                *map(settings.text, scores),
                *(f"{paper[count]:.1f}" if count in paper else digits.NONE for count in theirs),
            )
        )
    ours = tuple("all" if limit is None else f"{limit:,}" for limit in limits)
    seeds = sorted({len(one.runs) for own in found.values() for one in own.values()})
    table = Table(
        "Test accuracy in per cent by the number of training examples, mean ± standard deviation "
        f"over {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds; all is "
        f"{ALL:,}. Every run takes as many steps, and the best of its evaluations on the "
        "validation split is kept. Beside it the paper's GPT-3 175B on MNLI (its Table 16).",
        ("method", "learning rate", *ours, *(f"paper: {count:,}" for count in theirs)),
        tuple(rows),
        ("method", "learning rate"),
        next((i for i, method in enumerate(found) if method == "lora"), None),
    )
    return [table, Figure(_CAPTION, (Panel("samples", _said(found), draw(found)),))]


_CAPTION = (
    "Test accuracy over training examples, mean and standard deviation over the seeds. The methods "
    "are moved apart a little, so that each bar is seen."
)


def _said(found: Found) -> str:
    lines = []
    for method, own in found.items():
        points = [f"{_count(x):,}: {100 * one.mean('test'):.1f}" for x, one in own.items()]
        lines.append(f"{method} {', '.join(points)}")
    return f"Test accuracy in per cent by training examples: {'; '.join(lines)}"


def draw(found: Found) -> Drawing:
    """A line for each method over the examples, the spreads as bars."""
    counts = sorted({_count(limit) for own in found.values() for limit in own})
    with ink.style():
        figure, axis = ink.new(4.6, 3.8)
        for number, (method, own) in enumerate(found.items()):
            shift = _APART ** (number - (len(found) - 1) / 2)
            spreads = [100 * one.spread("test") for one in own.values()]
            axis.errorbar(
                [_count(limit) * shift for limit in own],
                [100 * one.mean("test") for one in own.values()],
                yerr=[s if math.isfinite(s) else 0.0 for s in spreads],
                color=_COLOURS[number % len(_COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                elinewidth=1.2,
                capsize=2.5,
                label=method,
            )
        axis.set_xscale("log")
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.minorticks_off()
        axis.set(xlabel="training examples", ylabel="test accuracy in per cent")
        axis.grid()
        figure.legend(loc="outside lower center", ncols=2)
    return figure
