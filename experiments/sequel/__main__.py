"""Test the claims of what came after LoRA, with a tuned rate for every method, and write a report.

    python -m experiments.sequel                      run all tables, then write the report
    python -m experiments.sequel kinds rslora         run only these
    python -m experiments.sequel --list               list the tables and their state
    python -m experiments.sequel --report-only        only write the report of the results there are
    python -m experiments.sequel --quick              a small version of all, in under 20 minutes

A cell is a run with a method, a learning rate and a seed, in `runs/sequel/KEY`. Its scores go to
results.json in the folder of the report, and a cell that is there is not run again. A program that
was stopped continues. A grid goes on by itself until its best rate is not at an edge. The main
methods of all tables are run first.

Exit status: 0 done, 1 an error that was printed, 2 a command line that cannot be read, 130 stopped
by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from experiments.sequel import cells, formats, page, programs, tables
from experiments.sequel.cells import Size
from experiments.sequel.results import Results
from experiments.sequel.tables import Table
from experiments.shared import page_files
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.system import whole_files
from lora_jax.system.console import Console, guarded, say, say_table
from lora_jax.training import processes


@dataclasses.dataclass(frozen=True)
class SequelOptions:
    """The options of `python -m experiments.sequel`."""

    tables: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TABLE ...]")
    ] = ()
    """The tables to run: kinds, rslora, loraplus, bits, starts, dora, where. None: all of
    them."""
    runs: str = "runs/sequel"
    """The folder of the runs."""
    out: str | None = None
    """The folder of results.json and the report. None: RUNS/report."""
    steps: int | None = None
    """Steps of each cell. None: 160, and 16 with --quick."""
    quick: bool = False
    """Few steps, the main methods of each table, and grids that go on by one rate at most."""
    list: bool = False
    """List the tables and their state, and do nothing else."""
    report_only: bool = False
    """Run nothing, and write the report of the results there are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m experiments.sequel`, and return its exit status."""
    options = tyro.cli(
        SequelOptions,
        prog="python -m experiments.sequel",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        return guarded(lambda: run(options))
    except processes.Preempted as stopped:
        say(Console(stderr=True), f"SIGTERM: {stopped} is saved: the same command goes on from it.")
        return processes.PREEMPTED


def run(options: SequelOptions) -> None:
    """Train what has no results, write the report, and print its path."""
    console, known = Console(stderr=True), {table.name: table for table in tables.TABLES}
    for name in options.tables:
        if name not in known:
            raise LoraError(
                f"no table {name!r}; nearest:\n{listed(nearest(name, known))}\n"
                f"there are: {', '.join(known)}"
            )
    chosen = [known[name] for name in options.tables or known]
    size = cells.QUICK if options.quick else cells.FULL
    if options.steps is not None:
        size = dataclasses.replace(size, steps=options.steps)
    runs = pathlib.Path(options.runs).expanduser()
    out = runs / "report" if options.out is None else pathlib.Path(options.out).expanduser()
    results = Results(out / "results.json")
    if options.list:
        _list(chosen, results, size)
        return
    file = out / "formats.json"
    if not options.report_only:
        for main in (True,) if options.quick else (True, False):
            for table in chosen:
                _train(table, main, size, runs, results, console)
        if not file.is_file():
            lost = [dataclasses.asdict(x) for x in formats.measure()]
            whole_files.write_json(file, lost)
    lost = json.loads(file.read_text()) if file.is_file() else []
    report = page.make(results, size, [formats.Lost(**x) for x in lost])
    say(Console(), str(page_files.write(report, out)))


def _train(
    table: Table, main: bool, size: Size, runs: pathlib.Path, results: Results, console: Console
) -> None:
    """Train all methods of a table, or its main ones, round by round until no grid goes on."""
    while True:
        arms = table.chosen(main)
        found = [one for arm in arms for one in tables.waiting(arm, results, size)]
        say(console, f"{table.name}: {len(found)} cells to train")
        if not found:
            return
        programs.train(found, runs, results, console)


def _list(chosen: Sequence[Table], results: Results, size: Size) -> None:
    rows = [("table", "", "methods", "rates done", "grids finished")]
    for table in chosen:
        own = [tables.tuned(arm, results, size) for arm in table.arms]
        done = sum(len(one.found) for one in own if one is not None)
        whole = sum(not tables.waiting(arm, results, size) for arm in table.arms)
        rows.append((table.name, table.asks, str(len(own)), str(done), str(whole)))
    say_table(Console(), rows, (0, 1))


if __name__ == "__main__":
    sys.exit(main())
