"""Experiments of several groups: their commands, their runs, and what is missing.

A group, such as that of a method or of a model, is in the folder of its name, and an attribute of
that name is its config.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from experiments.paper.experiments import Task
from experiments.paper.settings import there
from lora_jax.report import single_run
from lora_jax.report.document import Note
from lora_jax.report.run_files import SavedRun

_NOTES = 4  # of runs that have not finished; more are counted
Runs = dict[str, list[SavedRun]]  # name of the group -> its runs


def tasks(folder: pathlib.Path, file: str, groups: Sequence[str]) -> list[Task]:
    """The commands.

    Args:
      file: the config file, below the repository's root.
      groups: the attributes of it.
    """
    return [
        Task(
            folder / group,
            ("train.py", "--config", f"{file}:{group}", "--run-dir", str(folder / group)),
        )
        for group in groups
    ]


def runs(folder: pathlib.Path, methods: Sequence[str]) -> Runs:
    """All runs that are there, finished or not, by the methods of their configs.

    Methods are in the order given; those that have none are not in it.

    Raises:
      LoraError: what a run has left cannot be read.
    """
    found: Runs = {method: [] for method in methods}
    for run in there(folder):
        name = run.config.get("method", {}).get("name", "lora")
        found.setdefault(name, []).append(run)
    return {method: saved for method, saved in found.items() if saved}


def notes(tasks: Sequence[Task], found: Runs) -> list[Note]:
    """What is not there, and the commands that make it.

    Args:
      tasks: what `tasks` gives.
      found: what `runs` gives.
    """
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
                f"{len(waiting)} of {every} runs have not finished: {several}. What has finished "
                "is shown; the same commands go on with the others."
            )
        )
    return said


def _missing(missing: Sequence[Task]) -> list[Note]:
    if not missing:
        return []
    names = [task.folder.name for task in missing]
    command = " ".join(("python", *missing[0].arguments))
    rest = (
        f"; {', '.join(names[1:])} in the place of {names[0]} for the others" if names[1:] else ""
    )
    return [Note(f"There are no runs of {', '.join(names)}. To have them: {command}{rest}.")]
