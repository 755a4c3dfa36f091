"""The type of an experiment: its commands, and the functions that make its part of the report."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from lora_jax.report.document import Fact, Section

Claim = tuple[str, str, str]  # a claim, the paper's number, ours
Claims = tuple[Sequence[Claim], Sequence[Fact]]  # and what of them is for the top of the page


@dataclasses.dataclass(frozen=True)
class Task:
    """One command, and the folder that what it leaves is in.

    arguments: what follows `python`.
    """

    folder: pathlib.Path
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One question.

    name: of its folder, and on the command line.
    asks: the question, in a line.
    tasks: folder of the experiment -> its commands, in order.
    sections: folder of the experiment -> what the report says of it, of as much as is there.
    claims: folder of the experiment -> what the paper claims of it, in numbers.
    """

    name: str
    asks: str
    tasks: Callable[[pathlib.Path], Sequence[Task]]
    sections: Callable[[pathlib.Path], Sequence[Section]]
    claims: Callable[[pathlib.Path], Claims] = lambda folder: ((), ())
