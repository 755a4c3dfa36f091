"""Questions with an answer that a script checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Question(NamedTuple):
    """A question and its answer, as texts of which the model continues the first."""

    text: str
    answer: str


class Task(NamedTuple):
    """How to ask, the reward of (a text, the right answer) from 0 to 1, and the most tokens."""

    ask: Callable[[np.random.Generator], Question]
    reward: Callable[[str, str], float]
    tokens: int


def _sum(rng: np.random.Generator) -> Question:
    one, two = rng.integers(0, 10, 2)
    return Question(f"{one} + {two} =", f" {one + two}")


def _sorted(rng: np.random.Generator) -> Question:
    found = rng.choice(10, 3, replace=False)
    return Question(f"Sort {' '.join(map(str, found))}:", f" {' '.join(map(str, sorted(found)))}")


def _bracketed(rng: np.random.Generator) -> Question:
    one, two = rng.integers(0, 10, 2)
    return Question(f"The larger of {one} and {two} in brackets:", f" [{max(one, two)}]")


def same_numbers(text: str, answer: str) -> float:
    """Return 1 if the first numbers of a text are the answer's, and 0 otherwise."""
    wanted = re.findall(r"\d+", answer)
    return float(re.findall(r"\d+", text)[: len(wanted)] == wanted)


def in_brackets(text: str, answer: str) -> float:
    """Return 1 for the answer in brackets, a half for another number in them, and 0 otherwise."""
    found = re.match(r"\s*\[(\d+)\]", text)
    return 0.0 if found is None else 1.0 if found[0].strip() == answer.strip() else 0.5


TASKS = {
    "sums": Task(_sum, same_numbers, 4),
    "sort": Task(_sorted, same_numbers, 8),
    "format": Task(_bracketed, in_brackets, 6),
}
