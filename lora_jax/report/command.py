"""A page about a run of train.py, or many: scores, curves, and what the update is made of.

    lora-jax report runs/reviews
    lora-jax report runs/sweep-1a2b3c4d
    lora-jax report runs/reviews runs/topics --out compared

A run directory gives the report of that run; a directory of runs (what a sweep or several tasks
leave), or several directories, the runs side by side. Written are

    report.html      all of it in one file, which needs no network
    report.md        the same as Markdown
    *.png, *.svg     the figures

A run that has not finished is shown as far as it is, and so is an adapter without a run, which
`lora-jax import` or `lora_jax.save` has written. What of W an update amplifies needs the base
that the adapter names; where that cannot be had the report says so.

Exit status: 0 done, 1 an error that was printed, 2 a command line that cannot be read, 130 stopped
by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from lora_jax.checkpoint import adapter_path, storage
from lora_jax.console import guarded, read_options, say
from lora_jax.errors import LoraError
from lora_jax.report import glossary, many_runs, render, run_files, single_adapter, single_run
from lora_jax.report.document import Note, Report
from lora_jax.report.update_analysis import BaseChoice


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """The command line."""

    run_dir: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN_DIR [RUN_DIR ...]")
    ] = ()
    """A run directory of train.py, a directory of such, or an adapter."""
    out: str | None = None
    """Where the files go. None: RUN_DIR/report."""
    base: str | None = None
    """The model, in the form of model.reference. None: the one that the adapter names."""
    trust_base: bool = False
    """Fetch the base that an adapter names, also if it is none that lora_jax knows the sum of."""
    allow_other_base: bool = False
    """Compare with another base than the adapter was trained on."""
    docs: str | None = None
    """The documentation site, https://... or the folder it was built into: the page's explanations
    of its words link there. None: the page explains them, and links nowhere."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    given = read_options(ReportOptions, "lora-jax report", __doc__, arguments)
    return guarded(lambda: run(given, Console(stderr=True)))


def run(options: ReportOptions, console: Console) -> None:
    """Read, analyse and write; the page's path goes to stdout, what is missing to `console`.

    Raises:
      LoraError, OSError: a user's error.
    """
    given = [pathlib.Path(path) for path in options.run_dir]
    if not given:
        raise LoraError("no run directory: give one of train.py, such as runs/reviews")
    if len(given) > 1 and options.out is None:
        raise LoraError(
            f"{len(given)} run directories are compared in one report: say where it goes, --out DIR"
        )
    if (given[0].expanduser() / "meta").exists() and options.out is None:
        raise LoraError(
            f"{given[0]} is an adapter's own folder: say where the report goes, --out DIR"
        )
    made = make(given, BaseChoice(options.base, options.trust_base, options.allow_other_base))
    made = glossary.with_glossary(made, options.docs)
    for note in notes(made):
        say(console, f"note: {note.text}")
    out = given[0].expanduser() / "report" if options.out is None else pathlib.Path(options.out)
    say(Console(), str(render.write(made, out.expanduser())))


def make(given: Sequence[pathlib.Path], base: BaseChoice) -> Report:
    """The report of what is in these directories."""
    if len(given) == 1 and not run_files.is_run(given[0].expanduser()):
        path = given[0].expanduser()
        if adapter_path.adapter_in(storage.folder_at(path)) is not None:
            return single_adapter.report(path, base)
    runs = run_files.every(given)
    if len(given) == 1 and run_files.is_run(given[0].expanduser()):
        return single_run.report(runs[0], base)
    title = ", ".join(path.expanduser().resolve().name for path in given)
    return many_runs.report(title, runs, base)


def notes(made: Report) -> list[Note]:
    """All that is missing."""
    blocks = (block for section in made.sections for block in section.blocks)
    return [*made.notes, *(block for block in blocks if isinstance(block, Note))]
