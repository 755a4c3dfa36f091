"""Prompts that a decoder continues, and the pieces of their texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_jax.errors import LoraError
from lora_jax.multi.stack import BASE
from lora_jax.serving.engine import Job
from lora_jax.serving.sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue.

    tokens: its tokens, at least one.
    adapter: the number of its adapter (`lora_jax.multi.stack`), or `lora_jax.multi.BASE` for none.
    stop: tokens that end the generated text.
    """

    tokens: Sequence[int]
    adapter: int = BASE
    stop: Collection[int] = ()


class Piece(NamedTuple):
    """The result of one step for one row.

    token: the generated token; None if it was a stop token.
    finish: the reason why the row is finished: "stop" at a stop token, "length" at the largest
        number of tokens that was asked for, or that the model has positions for or the decoder
        slots. None: it is not finished.
    """

    row: int
    token: int | None
    finish: str | None


@dataclasses.dataclass(eq=False, kw_only=True)
class Writing(Job):
    """A text that is written, or waits for a row; its results are pieces.

    limit: the largest number of tokens that can be written.
    started, written: the numbers of tokens whose computation has begun, and that were read.
    """

    prompt: Prompt
    limit: int = 1
    sampling: Sampling = GREEDY
    started: int = 0
    written: int = 0


def rows_of(jobs: Mapping[int, Writing], count: int) -> dict[str, NDArray[Any]]:
    """Return the arguments of a program that writes the next token of each job in its row.

    They are the numbers of the adapters, of the prompts, and of the tokens in their texts, whether
    there is a job in the row ("live"), and the settings of `choose`; all [count].
    """
    empty = Writing(prompt=Prompt([]), adapter=BASE)
    found = [jobs.get(row, empty) for row in range(count)]
    numbers: list[dict[str, Any]] = [
        {"live": job is not empty, "adapter": np.int32(job.adapter), "row": np.int32(job.number)}
        | {"step": np.int32(job.started), **job.sampling.numbers}
        for job in found
    ]
    return {name: np.stack([each[name] for each in numbers]) for name in numbers[0]}


def hand_out(tokens: Any, jobs: Mapping[int, Writing]) -> None:
    """Give each job the token of its row, unless it is over by now."""
    for row, token in enumerate(np.asarray(tokens).tolist()):
        if (job := jobs.get(row)) is None or job.over:
            continue
        job.written += 1
        if token < 0:
            message = (
                f"prompt {job.number}: adapter {job.adapter} (counted from 0; {BASE} is the base) "
                "gives logits that are not finite: its factors, or the base, hold NaN or infinity, "
                "or are too large"
            )
            job.end(LoraError(message))
        elif token in job.prompt.stop:
            job.end(Piece(job.number, None, "stop"))
        elif job.written == job.limit:
            job.end(Piece(job.number, token, "length"))
        else:
            job.results.append(Piece(job.number, token, None))
