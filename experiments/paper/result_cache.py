"""Keep each experiment's part of the report for the next report into the same folder.

The runs of all experiments are gigabytes, and no machine has to hold them at once. A report writes
its texts and tables to report.json, one line for each experiment, and its figures to report.html.
The next report takes from there the parts of experiments without runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.paper import costs, saved_sections
from experiments.paper.experiments import Claim, Experiment
from experiments.paper.settings import there
from experiments.shared import page_files
from lora_jax.errors import LoraError
from lora_jax.report import render
from lora_jax.report.document import Fact, Section

FILE = "report.json"  # in the folder of the page


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of one experiment.

    sections: its sections of the page.
    claims: the paper's claims, with its numbers and ours.
    facts: facts for the top of the page.
    runs: the number of finished runs.
    spent: the costs of the commands that were started.
    """

    sections: tuple[Section, ...]
    claims: tuple[Claim, ...]
    facts: tuple[Fact, ...]
    runs: int
    spent: tuple[costs.Cost, ...]


Answers = Mapping[str, Answer]  # name of the experiment -> its results


def of(experiment: Experiment, folder: pathlib.Path) -> Answer | None:
    """Return the results of the runs in a folder; None if there is nothing yet."""
    sections = tuple(experiment.sections(folder))
    if not sections:
        return None
    claims, facts = experiment.claims(folder)
    spent = (costs.read(task.folder) for task in experiment.tasks(folder))
    return Answer(
        sections=sections,
        claims=tuple(claims),
        facts=tuple(facts),
        runs=sum(left.summary is not None for left in there(folder)),
        spent=tuple(cost for cost in spent if cost is not None),
    )


def gather(
    experiments: Sequence[Experiment], runs: pathlib.Path, before: Answers
) -> tuple[dict[str, Answer], list[str]]:
    """Return the results of all experiments that have some, from their runs if there are any."""
    found, kept = {}, []
    for one in experiments:
        answer = of(one, runs / one.name)
        if answer is None and one.name in before:
            answer = before[one.name]
            kept.append(one.name)
        if answer is not None:
            found[one.name] = answer
    return found, kept


def write(answers: Answers, folder: pathlib.Path) -> None:
    """Write the results into the folder of the page."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(_plain(answer), ensure_ascii=False)}"
        for name, answer in answers.items()
    ]
    partial = folder / f"{FILE}.tmp"
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(partial, folder / FILE)


def read(folder: pathlib.Path) -> dict[str, Answer]:
    """Read the results that `write` wrote into a folder; none if there is no such file."""
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
        drawings = page_files.drawings((folder / render.HTML).read_text())
        return {name: _answer(value, drawings) for name, value in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise LoraError(
            f"{file} and {render.HTML} cannot be read: {error}; restore both "
            "(in a checkout: `git checkout` of the folder), or write the report to another folder "
            "with --out: these files hold the parts of experiments that have no runs here"
        ) from error


def _plain(answer: Answer) -> dict[str, Any]:
    return {
        "runs": answer.runs,
        "facts": [dataclasses.asdict(fact) for fact in answer.facts],
        "claims": answer.claims,
        "spent": [dataclasses.asdict(cost) for cost in answer.spent],
        "sections": [saved_sections.plain(section) for section in answer.sections],
    }


def _answer(found: Any, drawings: Mapping[str, str]) -> Answer:
    return Answer(
        sections=tuple(saved_sections.read(section, drawings) for section in found["sections"]),
        claims=tuple((claim, paper, ours) for claim, paper, ours in found["claims"]),
        facts=tuple(Fact(**fact) for fact in found["facts"]),
        runs=int(found["runs"]),
        spent=tuple(map(costs.parsed, found["spent"])),
    )
