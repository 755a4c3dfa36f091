"""Write a page about runs of train.py: scores, curves, and what the update is made of.

    lora-jax report runs/reviews
    lora-jax report runs/sweep-1a2b3c4d
    lora-jax report runs/reviews runs/topics --out compared

Given a run directory, the page shows that run. Given a directory of runs, which a sweep or several
tasks write, or several directories, it compares the runs. It writes

    report.html      the whole report in one file, which needs no network
    report.md        the same as Markdown
    *.png, *.svg     the figures

A run that has not finished is shown up to its last step. An adapter without a run, written by
`lora-jax import` or `lora_jax.save`, has a page as well. The section on what of W the update
amplifies needs the base model that the adapter names; if it cannot be opened, the report says so.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from lora_jax.checkpoint import adapter_path, storage
from lora_jax.errors import LoraError
from lora_jax.report import glossary, many_runs, render, run_files, single_adapter, single_run
from lora_jax.report.document import Note, Report
from lora_jax.serving.served_adapters import BaseChoice
from lora_jax.sweeps import member_names
from lora_jax.system.console import Console, command, say


@dataclasses.dataclass(frozen=True)
class ReportOptions(BaseChoice):
    """The options of `lora-jax report`."""

    run_dir: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN_DIR [RUN_DIR ...]")
    ] = ()
    """A run directory of train.py, a directory of run directories, or an adapter."""
    out: str | None = None
    """The folder for the report. None: RUN_DIR/report."""
    docs: str | None = None
    """The documentation site, https://... or the folder with its files: the explanations of words
    in the report link there. None: they have no links."""


def run(options: ReportOptions, console: Console, aside: Console) -> None:
    """Write the report, print its path to `console`, and what is missing to `aside`."""
    given = [pathlib.Path(path) for path in options.run_dir]
    if not given:
        raise LoraError("no run directory: give one that train.py wrote, such as runs/reviews")
    if len(given) > 1 and options.out is None:
        raise LoraError(
            f"{len(given)} run directories are compared in one report: say where it goes, --out DIR"
        )
    if (given[0].expanduser() / "meta").exists() and options.out is None:
        raise LoraError(
            f"{given[0]} is an adapter's own folder: say where the report goes, --out DIR"
        )
    made = make(given, options)
    run = given[0].expanduser()
    out = run / "report" if options.out is None else pathlib.Path(options.out).expanduser()
    made = glossary.with_glossary(made, options.docs, out)
    for note in notes(made):
        say(aside, f"note: {note.text}")
    # The run may come from a stranger, and "report" in it be a link.
    say(console, str(render.write(made, out, below=run if options.out is None else None)))


def make(given: Sequence[pathlib.Path], base: BaseChoice) -> Report:
    """Make the report of a run, of several runs, or of an adapter."""
    if len(given) == 1 and not run_files.is_run(given[0].expanduser()):
        path = given[0].expanduser()
        if adapter_path.adapter_in(storage.folder_at(path)) is not None:
            return single_adapter.report(path, base)
    runs = run_files.every(given)
    if len(given) == 1 and run_files.is_run(given[0].expanduser()):
        return single_run.report(runs[0], base)
    ways = [path.expanduser().resolve().as_posix() for path in given]
    title = ", ".join(member_names.shortest(way, ways, "/") for way in ways)
    return many_runs.report(title, runs, base, "LoRA runs" if len(given) > 1 else "LoRA sweep")


def notes(made: Report) -> list[Note]:
    """Return every note of a report: each says what is missing and how to get it."""
    blocks = (block for section in made.sections for block in section.blocks)
    return [*made.notes, *(block for block in blocks if isinstance(block, Note))]


main = command("report", ReportOptions, __doc__, run)
