"""Show the results of a group in a table, on the screen and in files.

The results are read from the members' own summaries and run directories, so runs that were trained
one by one can be compared in the same way.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence

from flax.traverse_util import flatten_dict

from lora_jax.sweeps import member_names
from lora_jax.sweeps.comparison import ComparedRun, Results, gather
from lora_jax.sweeps.plots import figure_of
from lora_jax.system import whole_files
from lora_jax.system.console import Console, say, say_table
from lora_jax.training import curves
from lora_jax.training.directory import Summary


def show(summaries: Sequence[Summary], console: Console) -> None:
    """Print the members; in a sweep they are sorted, with the best first and marked."""
    found = listing(gather(summaries))
    texts = [i for i, name in enumerate(found.columns) if name in found.texts]
    styles = {0: "bold"} if found.best is None else {0: "bold", found.best + 1: "bold green"}
    say(console, found.title)
    say_table(console, [found.columns, *found.rows], texts, styles=styles)


@dataclasses.dataclass(frozen=True)
class Listing:
    """The members as a table of texts.

    texts: the columns that hold text, not numbers.
    best: the index of the row of the best member, if there is one.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[str, ...] = ()
    best: int | None = None


def listing(results: Results) -> Listing:
    """List the members: of a sweep with the best first, of several tasks in the order given."""
    return _of_tasks(results) if results.tasks else _of_sweep(results)


def write(path: pathlib.Path, summaries: Sequence[Summary]) -> None:
    """Write results.csv, results.json and results.png."""
    results = gather(summaries)
    best = None if results.best is None else results.best.name
    members = [{"name": r.name, "values": r.values, **r.summary} for r in results.rows]
    found = {"best": best, "varied": results.varied, "members": members}
    whole_files.write_json(path / "results.json", found)
    whole_files.write(path / "results.csv", _csv(results.rows))
    whole_files.write(path / "results.png", curves.png(figure_of(results), dpi=120))


def _of_sweep(results: Results) -> Listing:
    best, select = results.best, results.rows[0].select
    ordered = sorted(results.rows, key=lambda row: -row.rank)
    varied = [member_names.shortest(path, results.varied) for path in results.varied]
    values = [tuple(member_names.label(row.values[p]) for p in results.varied) for row in ordered]
    alike = len(set(values)) < len(values)  # then only their names distinguish them
    scores = [f"{split} {select}" for split in results.splits]
    return Listing(
        title=f"{len(results.rows)} runs, best first by validation {select}",
        columns=(*["run"] * alike, *varied, *scores, "best step", "trained"),
        rows=tuple(
            (*[row.name] * alike, *own, *map(_number, map(row.score, results.splits)), *_end(row))
            for row, own in zip(ordered, values, strict=True)
        ),
        texts=("run",),
        best=None if best is None else ordered.index(best),
    )


def _of_tasks(results: Results) -> Listing:
    scores = {row.select for row in results.rows}
    what = scores.pop() if len(scores) == 1 else "score"

    def name(row: ComparedRun) -> str:
        return row.name if what == row.select else f"{row.name} ({row.select})"

    def change(row: ComparedRun, split: str) -> str:
        return f"{_number(row.score(split, 'before'))} -> {_number(row.score(split))}"

    return Listing(
        title=f"{len(results.rows)} tasks: {what} before -> after training",
        columns=("task", *results.splits, "best step", "trained"),
        rows=tuple(
            (name(row), *(change(row, split) for split in results.splits), *_end(row))
            for row in results.rows
        ),
        texts=("task",),
    )


def _end(row: ComparedRun) -> tuple[str, str]:
    """Return the step of the best adapter, and the number of trained parameters."""
    step, trained = row.summary["best_step"], row.summary["adapter_parameters"]
    trained += row.summary["trainable_parameters"]
    return "-" if step is None else str(step), f"{trained:,}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _csv(rows: Sequence[ComparedRun]) -> bytes:
    """Return a table with a line for each run; nested values have dotted paths as column names."""
    lines = []
    for row in rows:
        pairs = row.values.items()
        values = {p: " ".join(map(str, v)) if isinstance(v, tuple) else v for p, v in pairs}
        lines.append({"name": row.name, **values, **flatten_dict(row.summary, sep=".")})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()
