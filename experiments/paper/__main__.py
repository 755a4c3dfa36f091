"""Run the experiments of the LoRA paper on models that a laptop can train, and write a report.

    python -m experiments.paper                       run all experiments, then write the report
    python -m experiments.paper matrices rank         run only these
    python -m experiments.paper --list                list the experiments and their state
    python -m experiments.paper --report-only         only write the report of the existing runs

Runs are written to `runs/paper/EXPERIMENT`. A finished run is not run again, and a run that was
stopped continues. The report covers all existing runs: report.html, which needs no other file, and
report.md. They show the paper's numbers next to ours, and every command with its time and its
machine. An experiment without runs here keeps its part of an earlier report in the same folder.

Start it in a checkout of the repository: it runs `train.py` with `experiments/paper/configs`.

Exit status: 0 done, 1 an error that was printed, 2 a command line that cannot be read, 130 stopped
by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from experiments.paper import costs, page, questions, result_cache
from experiments.paper.experiments import Experiment
from experiments.shared import page_files
from lora_jax.errors import LoraError
from lora_jax.serving.served_adapters import BaseChoice
from lora_jax.system.console import guarded, say, say_table


@dataclasses.dataclass(frozen=True)
class PaperOptions:
    """The options of `python -m experiments.paper`."""

    experiments: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[EXPERIMENT ...]")
    ] = ()
    """The experiments to run: matrices, rank, directions, methods, samples, definitions, latency,
    benefits. None: all of them."""
    runs: str = "runs/paper"
    """The folder of the runs, with one folder for each experiment."""
    out: str | None = None
    """The folder for the report. None: RUNS/report."""
    list: bool = False
    """List the experiments and their cost so far, and do nothing else."""
    report_only: bool = False
    """Run nothing, and write the report of the existing runs."""
    base: str | None = None
    """The base model for Table 7, in the form of model.reference. None: the one that the adapter
    names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m experiments.paper`, and return its exit status."""
    options = tyro.cli(
        PaperOptions,
        prog="python -m experiments.paper",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return guarded(lambda: run(options, pathlib.Path.cwd()))


def run(options: PaperOptions, root: pathlib.Path) -> None:
    """Run what has not finished, write the report, and print its path to stdout."""
    base = BaseChoice(base=options.base)
    chosen = questions.chosen(options.experiments, base)
    runs = pathlib.Path(options.runs).expanduser()
    if options.list:
        _list(chosen, runs)
        return
    if not options.report_only:
        _check(root)
        for experiment in chosen:
            _train(experiment, runs / experiment.name, root)
    out = runs / "report" if options.out is None else pathlib.Path(options.out).expanduser()
    say(Console(), str(_report(questions.experiments(base), runs, out)))


def _report(
    experiments: Sequence[Experiment], runs: pathlib.Path, out: pathlib.Path
) -> pathlib.Path:
    """Write the page of all experiments with results, and return its path."""
    found, kept = result_cache.gather(experiments, runs, result_cache.read(out))
    if not found:
        raise LoraError(
            f"{runs.resolve()} holds no run of any experiment: run `python -m experiments.paper` "
            "first, or name another folder with --runs"
        )
    if kept:
        say(
            Console(stderr=True),
            f"no runs of {', '.join(kept)} in {runs}: their parts are kept as in "
            f"{out / result_cache.FILE}",
        )
    path = page_files.write(page.make(experiments, found), out)
    result_cache.write(found, out)
    return path


def _check(root: pathlib.Path) -> None:
    needed = ("train.py", "experiments/paper/configs")
    missing = [name for name in needed if not (root / name).exists()]
    if missing:
        raise LoraError(
            f"{root} has no {' and no '.join(missing)}: start this command in a checkout of the "
            "repository, which holds the experiments"
        )


def _train(experiment: Experiment, folder: pathlib.Path, root: pathlib.Path) -> None:
    console = Console(stderr=True)
    tasks = experiment.tasks(folder)
    for number, task in enumerate(tasks, 1):
        words = " ".join(task.arguments)
        say(console, f"{experiment.name} {number}/{len(tasks)}: python {words}")
        if not costs.run(task, root):
            say(console, f"finished before; delete {task.folder} to run it again")


def _list(chosen: Sequence[Experiment], runs: pathlib.Path) -> None:
    rows = [("experiment", "", "commands", "done", "minutes")]
    for experiment in chosen:
        tasks = experiment.tasks(runs / experiment.name)
        found = [cost for task in tasks if (cost := costs.read(task.folder)) is not None]
        done = sum(cost.finished for cost in found)
        minutes = f"{sum(cost.seconds for cost in found) / 60:.1f}" if found else "-"
        rows.append((experiment.name, experiment.asks, str(len(tasks)), str(done), minutes))
    say_table(Console(), rows, (0, 1))


if __name__ == "__main__":
    sys.exit(main())
