"""Compare methods on few and on many examples (the paper's Table 16)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from experiments.paper import published, settings, sweeps
from experiments.paper.experiments import Task
from experiments.paper.settings import Setting
from experiments.shared import charts, spreads
from lora_jax.report import formatting
from lora_jax.report.document import Block, Figure, Panel, Section, Table
from lora_jax.sweeps import member_names

METHODS = ("full", "prefix_embedding", "prefix_layer", "lora")
FILE = "experiments/paper/configs/samples.py"
ALL = 10_289  # rows of the reviews' training split, the last point of the axis
_RATE, _LIMIT = "optimizer.learning_rate", "data.train_limit"

Limits = dict[int | None, Setting]  # training examples -> runs; None is all examples
Found = dict[str, Limits]  # name of the method -> its runs


def tasks(folder: pathlib.Path) -> Sequence[Task]:
    """Return one command for each method, which runs a group of nine runs."""
    return sweeps.tasks(folder, FILE, METHODS)


def sections(folder: pathlib.Path) -> Sequence[Section]:
    """Return the section about the runs in the folder; none if there are no runs."""
    runs = sweeps.runs(folder, METHODS)
    notes = sweeps.notes(tasks(folder), runs)
    found = by_limit(runs)
    blocks: list[Block] = [*_results(found)] if found else []
    return (Section("Few examples and many", (*blocks, *notes)),) if runs else ()


def by_limit(runs: sweeps.Runs) -> Found:
    """Group the finished runs of each method by the number of training examples, "all" last."""
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
        rates = dict.fromkeys(member_names.number(float(one.config[_RATE])) for one in own.values())
        rows.append(
            (
                method,
                ", ".join(rates),
                *map(spreads.text, scores),
                *(f"{paper[count]:.1f}" if count in paper else formatting.NONE for count in theirs),
            )
        )
    ours = tuple("all" if limit is None else f"{limit:,}" for limit in limits)
    seeds = sorted({len(one.runs) for own in found.values() for one in own.values()})
    table = Table(
        "Test accuracy in per cent by the number of training examples, mean ± standard deviation "
        f"over {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds; all is "
        f"{ALL:,}. Every run takes the same number of steps, and the best of its evaluations on "
        "the validation split is kept. The last columns have the paper's scores of GPT-3 175B on "
        "MNLI (its Table 16).",
        ("method", "learning rate", *ours, *(f"paper: {count:,}" for count in theirs)),
        tuple(rows),
        ("method", "learning rate"),
        next((i for i, method in enumerate(found) if method == "lora"), None),
    )
    return [table, Figure(_CAPTION, (_panel(found),))]


_CAPTION = (
    "Test accuracy over training examples, mean and standard deviation over the seeds. The methods "
    "are moved apart a little, so that every bar can be seen."
)


def _panel(found: Found) -> Panel:
    """Draw a line for each method."""
    lines = {
        method: {_count(x): [100 * v for v in one.scores("test")] for x, one in own.items()}
        for method, own in found.items()
    }
    said = "; ".join(
        f"{method} {', '.join(f'{x:,}: {spreads.mean(v):.1f}' for x, v in line.items())}"
        for method, line in lines.items()
    )
    return Panel(
        "samples",
        f"Test accuracy in per cent by training examples: {said}",
        charts.lines(lines, "training examples", "test accuracy, %", "few examples and many"),
    )
