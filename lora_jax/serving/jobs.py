"""Prompts that a decoder continues, and the pieces of their texts."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_jax.errors import LoraError
from lora_jax.multi.stack import BASE
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

    row: the number of the prompt.
    token: the generated token; None if it was a stop token.
    finish: the reason why the row is finished: "stop" at a stop token, "length" at the largest
        number of tokens that was asked for, or that the model has positions for or the decoder
        slots. None: it is not finished.
    """

    row: int
    token: int | None
    finish: str | None


@dataclasses.dataclass(eq=False)
class Job:
    """A prompt that waits or is being continued.

    number: its number among the prompts that were given with it.
    limit: the largest number of tokens that can be written.
    pieces: the pieces that nobody has read yet; an error is the last.
    started, written: the numbers of tokens whose computation has begun, and that were read.
    over: whether no more pieces will come. Set it to cancel the job: its row is then free.
    """

    prompt: Prompt
    number: int
    limit: int
    sampling: Sampling
    pieces: deque[Piece | BaseException] = dataclasses.field(default_factory=deque)
    started: int = 0
    written: int = 0
    over: bool = False

    def end(self, piece: Piece | BaseException) -> None:
        """Add the last piece."""
        self.pieces.append(piece)
        self.over = True


class Rows(NamedTuple):
    """The jobs in the rows of a program; every array has the rows first.

    live: whether there is a job.
    adapters: the numbers of the adapters.
    numbers: the numbers of the prompts.
    steps: the numbers of the tokens in their texts.
    how: their sampling, as `choose` takes it.
    """

    live: NDArray[np.bool_]
    adapters: NDArray[np.int32]
    numbers: NDArray[np.int32]
    steps: NDArray[np.int32]
    how: Mapping[str, Any]

    @staticmethod
    def of(jobs: Mapping[int, Job], count: int) -> Rows:
        """Return `count` rows, in which the jobs write their next tokens."""
        found = [jobs.get(row) for row in range(count)]
        whole = [(j.prompt.adapter, j.number, j.started) if j else (BASE, 0, 0) for j in found]
        numbers = [(j.sampling if j else GREEDY).numbers for j in found]
        how = {name: np.stack([each[name] for each in numbers]) for name in numbers[0]}
        return Rows(np.array([j is not None for j in found]), *np.array(whole, np.int32).T, how)


def hand_out(tokens: Any, jobs: Mapping[int, Job]) -> None:
    """Give each job the token of its row, unless it is over by now."""
    for row, token in enumerate(np.asarray(tokens).tolist()):
        if (job := jobs.get(row)) is None or job.over:
            continue
        job.written += 1
        if token < 0:
            message = (
                f"prompt {job.number}: adapter {job.prompt.adapter} (counted from 0; {BASE} "
                "is the base) gives logits that are not finite: its factors, or the base, hold "
                "NaN or infinity, or are too large"
            )
            job.end(LoraError(message))
        elif token in job.prompt.stop:
            job.end(Piece(job.number, None, "stop"))
        elif job.written == job.limit:
            job.end(Piece(job.number, token, "length"))
        else:
            job.pieces.append(Piece(job.number, token, None))
