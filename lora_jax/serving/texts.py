"""The texts of prompts while they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Self

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from lora_jax.serving.engine import Job
from lora_jax.serving.jobs import Piece
from lora_jax.serving.prompts import Request


class TextPiece(str):
    """The next part of a text, which may be empty: a token may be only a part of a character.

    row: the number of the request.
    token: the token; None for a stop token, which has no text.
    finish: why the text ends here ("stop" or "length"); None if it goes on.
    """

    row: int
    token: int | None
    finish: str | None


def decoded(
    pieces: Iterable[Piece], requests: Sequence[Request], tokenizer: Tokenizer
) -> Iterator[TextPiece]:
    # The text of a token may depend on the token before it (a space at the start of a word).
    going: dict[int, DecodeStream] = {}
    for row, token, finish in pieces:
        if row not in going:
            going[row] = DecodeStream(ids=[*requests[row].prompt.tokens], skip_special_tokens=True)
        more = "" if token is None else going[row].step(tokenizer, token) or ""
        text = TextPiece(more)
        text.row, text.token, text.finish = row, token, finish
        yield text


class Texts(Iterator[TextPiece]):
    """Yields the pieces of one text or of several as they are written.

    Closing it, leaving its `with` block or dropping it cancels what is not written yet, and frees
    the rows of the batch. Pieces that nobody takes are kept.

    Args:
      pieces: the pieces; their `row` is the number of the text, and their `finish` says why a text
        ends there ("stop" or "length").
      jobs: the jobs to cancel.
    """

    def __init__(self, pieces: Iterator[TextPiece], jobs: Sequence[Job]) -> None:
        self._pieces, self._jobs = pieces, jobs

    def __next__(self) -> TextPiece:
        return next(self._pieces)

    def close(self) -> None:
        """Cancel what is not written yet."""
        for job in self._jobs:
            job.over = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    __del__ = close
