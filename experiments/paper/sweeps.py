"""The commands, runs and missing runs of experiments that have several groups.

A group, such as the runs of one method or of one model, has a folder and a config attribute of its
name.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from experiments.paper.experiments import Task
from experiments.paper.settings import there
from lora_jax.report import single_run
from lora_jax.report.document import Note
from lora_jax.report.run_files import SavedRun

_NOTES = 4  # at most this many unfinished runs get a note; more are only counted
Runs = dict[str, list[SavedRun]]  # name of the group -> its runs


def tasks(folder: pathlib.Path, file: str, groups: Sequence[str]) -> list[Task]:
    """Return the command of each group."""
    return [
        Task(
            folder / group,
            ("train.py", "--config", f"{file}:{group}", "--run-dir", str(folder / group)),
        )
        for group in groups
    ]


def runs(folder: pathlib.Path, methods: Sequence[str]) -> Runs:
    """Read all runs in a folder, finished or not, and group them by the methods of their configs.

    The methods are in the order given; a method without runs is left out.
    """
    found: Runs = {method: [] for method in methods}
    for run in there(folder):
        name = run.config.get("method", {}).get("name", "lora")
        found.setdefault(name, []).append(run)
    return {method: saved for method, saved in found.items() if saved}


def notes(tasks: Sequence[Task], found: Runs) -> list[Note]:
    """Return notes about missing and unfinished runs, with the commands that make them."""
    missing = [task for task in tasks if task.folder.name not in found]
    waiting = [run for saved in found.values() for run in saved if run.summary is None]
    many = len(waiting) > _NOTES
    said = [
        *_missing(missing),
        *([] if many else [note for run in waiting for note in single_run.unfinished(run)]),
    ]
    if many:
        counts = [f"{sum(x.summary is None for x in found[m])} of {m}" for m in found]
        several = ", ".join(text for text in counts if not text.startswith("0 "))
        every = sum(map(len, found.values()))
        said.append(
            Note(
                f"{len(waiting)} of {every} runs have not finished: {several}. This report shows "
                "the finished ones; the same commands continue the others."
            )
        )
    return said


def _missing(missing: Sequence[Task]) -> list[Note]:
    if not missing:
        return []
    names = [task.folder.name for task in missing]
    command = " ".join(("python", *missing[0].arguments))
    rest = (
        f"; for the others, put {', '.join(names[1:])} in place of {names[0]}" if names[1:] else ""
    )
    return [
        Note(f"There are no runs of {', '.join(names)}. This command makes them: {command}{rest}.")
    ]
