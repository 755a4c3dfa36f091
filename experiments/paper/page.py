"""Make the report of all experiments that have results."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.paper import agreement, costs
from experiments.paper.experiments import Experiment
from experiments.paper.result_cache import Answers
from lora_jax.report import formatting
from lora_jax.report.document import Fact, Note, Report, Section, Table
from lora_jax.training.sizes import in_units


def make(experiments: Sequence[Experiment], answers: Answers) -> Report:
    """Make the report. A note names each experiment without results."""
    missing = [one for one in experiments if one.name not in answers]
    found = [answers[one.name] for one in experiments if one.name in answers]
    spent = [cost for answer in found for cost in answer.spent]
    claims = [row for answer in found for row in answer.claims]
    return Report(
        kind="The paper's questions",
        title="The LoRA paper's questions, asked of small models",
        lead=(
            "Which matrices to adapt? Which rank? What is an update made of? How do other methods "
            "compare? These are the experiments of Hu et al. (arXiv 2106.09685) on models that "
            "train on two CPU cores, with the paper's numbers next to ours."
        ),
        facts=(
            Fact(
                "runs",
                f"{sum(answer.runs for answer in found):,}",
                f"in {len(found)} experiments",
            ),
            Fact(
                "time",
                f"{sum(cost.seconds for cost in spent) / 60:,.0f} minutes",
                "for all commands, one after the other",
            ),
            *(fact for answer in found for fact in answer.facts),
        ),
        sections=(
            agreement.section(claims),
            *(section for answer in found for section in answer.sections),
            _how(spent),
        ),
        notes=tuple(
            Note(
                f"There are no results of {one.name} ({one.asks}): run `python -m "
                f"experiments.paper {one.name}`."
            )
            for one in missing
        ),
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}" if math.isfinite(seconds) else formatting.NONE


def _how(spent: Sequence[costs.Cost]) -> Section:
    rows = tuple(
        (
            cost.command,
            f"{cost.seconds / 60:.1f}",
            _minutes(cost.processor_seconds),
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
                "Every command, with all times that it was started: minutes from start to end, "
                "which include other work of the machine, and minutes of all cores together.",
                ("command", "minutes", "processor", "memory", "day", "machine"),
                rows,
                ("command", "day", "machine"),
            ),
        ),
    )
