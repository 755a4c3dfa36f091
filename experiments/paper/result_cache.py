"""What the report says of each experiment, kept for the next report into the same folder.

The runs of all experiments are gigabytes, and no machine has to hold them at once: a report leaves
its texts and tables in report.json, one line an experiment, and its figures in report.html. The
next report takes from there what it finds no runs of.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.paper import costs, page_files, saved_sections
from experiments.paper.experiments import Claim, Experiment
from experiments.paper.settings import there
from lora_jax.errors import LoraError
from lora_jax.report import render
from lora_jax.report.document import Fact, Section

FILE = "report.json"  # beside the page


@dataclasses.dataclass(frozen=True)
class Answer:
    """To one question.

    sections: of the page. claims: the paper's, with its numbers and ours.
    facts: for the top of the page.
    runs: that have finished. spent: on the commands that have been started.
    """

    sections: tuple[Section, ...]
    claims: tuple[Claim, ...]
    facts: tuple[Fact, ...]
    runs: int
    spent: tuple[costs.Cost, ...]


Answers = Mapping[str, Answer]  # by the experiments' names


def of(experiment: Experiment, folder: pathlib.Path) -> Answer | None:
    """What the runs in a folder say; None where there is nothing yet.

    Raises:
      LoraError: what a run has left cannot be read.
    """
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
    """The answers of all experiments that there are any of, from their runs before all else.

    Args:
      runs: with a folder for each experiment.
      before: the answers of an earlier report.

    Returns:
      The answers in the order of the experiments, and the names of those that are of the earlier
      report.

    Raises:
      LoraError: what a run has left cannot be read.
    """
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
    """Write them into the folder of the page."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(_plain(answer), ensure_ascii=False)}"
        for name, answer in answers.items()
    ]
    partial = folder / f"{FILE}.tmp"
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(partial, folder / FILE)


def read(folder: pathlib.Path) -> dict[str, Answer]:
    """What `write` left in a folder; nothing where there is no such file.

    Raises:
      LoraError: it cannot be read, or the page has not all of its figures.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
        drawings = page_files.drawings((folder / render.HTML).read_text())
        return {name: _answer(value, drawings) for name, value in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise LoraError(
            f"{file} and {render.HTML} cannot be read: {error}; put both back as they were "
            "(in a checkout: `git checkout` of the folder), or write the report to another folder "
            "with --out: it is what this report keeps of experiments that have no runs here"
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
