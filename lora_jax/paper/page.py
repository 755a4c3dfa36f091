"""The report of all experiments that there is anything of."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from lora_jax.errors import LoraError
from lora_jax.paper import agreement, costs
from lora_jax.paper.experiments import Experiment
from lora_jax.paper.settings import there
from lora_jax.report.document import Fact, Note, Report, Section, Table
from lora_jax.training.summary import in_units


def make(experiments: Sequence[Experiment], runs: pathlib.Path) -> Report:
    """Of the folders in `runs`; an experiment of which there is nothing is named in a note.

    Raises:
      LoraError: there is nothing at all, or what is there cannot be read.
    """
    found = {one.name: tuple(one.sections(runs / one.name)) for one in experiments}
    missing = [one for one in experiments if not found[one.name]]
    if len(missing) == len(experiments):
        raise LoraError(
            f"{runs.resolve()} holds nothing of any experiment: run `python -m lora_jax.paper` "
            "first, or name another folder with --runs"
        )
    members = [left for one in experiments for left in there(runs / one.name)]
    finished = [left for left in members if left.summary is not None]
    spent = [cost for one in experiments for cost in _costs(one, runs)]
    claims = agreement.section(runs)
    return Report(
        kind="The paper's questions",
        title="LoRA's questions, asked of small models",
        lead=(
            "Which matrices to adapt, which rank, what an update is made of, and what else could "
            "be trained: the experiments of Hu et al. (arXiv 2106.09685) on models that train on "
            "two CPU cores, with the paper's numbers beside ours."
        ),
        facts=(
            Fact("runs", f"{len(finished):,}", f"in {len(experiments) - len(missing)} experiments"),
            Fact(
                "time",
                f"{sum(cost.seconds for cost in spent) / 60:,.0f} minutes",
                f"{sum(cost.processor_seconds for cost in spent) / 60:,.0f} of processor time",
            ),
            *agreement.facts(runs),
        ),
        sections=(
            claims,
            *(section for sections in found.values() for section in sections),
            _how(spent),
        ),
        notes=tuple(
            Note(f"Nothing of {one.name} ({one.asks}): run `python -m lora_jax.paper {one.name}`.")
            for one in missing
        ),
    )


def _costs(experiment: Experiment, runs: pathlib.Path) -> list[costs.Cost]:
    tasks = experiment.tasks(runs / experiment.name)
    return [cost for task in tasks if (cost := costs.read(task.folder)) is not None]


def _how(spent: Sequence[costs.Cost]) -> Section:
    rows = tuple(
        (
            cost.command,
            f"{cost.seconds / 60:.1f}",
            f"{cost.processor_seconds / 60:.1f}",
            in_units(cost.peak_bytes),
            cost.day,
            cost.machine,
        )
        for cost in spent
    )
    return Section(
        "How it was run",
        (
            Table(
                "Every command, with all times that it was started: minutes from start to end, and "
                "of all cores together.",
                ("command", "minutes", "processor", "memory", "day", "machine"),
                rows,
                ("command", "day", "machine"),
            ),
        ),
    )
