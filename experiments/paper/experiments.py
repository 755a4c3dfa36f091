"""The type of an experiment: its commands, and the functions that make its part of the report."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from lora_jax.report.document import Fact, Section

Claim = tuple[str, str, str]  # a claim, the paper's number, ours
Claims = tuple[Sequence[Claim], Sequence[Fact]]  # the claims, and facts for the top of the page


@dataclasses.dataclass(frozen=True)
class Task:
    """One command and its folder.

    folder: the folder that the command writes to.
    arguments: the arguments after `python`.
    """

    folder: pathlib.Path
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One question of the paper.

    name: the name of its folder, and its name on the command line.
    asks: the question in a line.
    tasks: folder of the experiment -> its commands, in order.
    sections: folder of the experiment -> its sections of the report, for the runs that exist.
    claims: folder of the experiment -> the paper's claims in numbers, compared with ours.
    """

    name: str
    asks: str
    tasks: Callable[[pathlib.Path], Sequence[Task]]
    sections: Callable[[pathlib.Path], Sequence[Section]]
    claims: Callable[[pathlib.Path], Claims] = lambda folder: ((), ())
