"""Tokenised examples: rows of different lengths in flat arrays, and counts of the truncation."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Encoding, Tokenizer

from lora_jax.errors import DataError, is_failure

T = TypeVar("T")
TextOrPair = str | tuple[str, str]
TokenRow = tuple[NDArray[np.int32], NDArray[np.uint8]]  # token ids, and a mark for each token

SECONDS, CHARACTERS = 60.0, 10_000  # a tokenizer may take so long, and a second more for so many
CHUNK = 1000  # texts that the tokenizer gets together, because it uses all cores for them


@dataclasses.dataclass
class TextTruncation:
    """Counts of what was cut off or dropped; they grow while texts are tokenised."""

    examples: int = 0
    """Examples that were longer than the limit."""
    tokens: int = 0
    """Tokens that were cut off these examples."""
    learned: int = 0
    """How many of these tokens were to be learned."""
    overlong: int = 0
    """Examples that were left out because they were longer than the limit."""
    escaped: int = 0
    """Control tokens in what people wrote, which are read as text."""
    open_ended: int = 0
    """Answers without a token that ends them, so that it is not learned when to stop."""
    dropped: int = 0
    """Examples that were dropped because nothing to learn was left."""
    empty: int = 0
    """Examples of white space alone."""
    nul: int = 0
    """Examples with a NUL character, as a file in another encoding has them."""

    def see(self, texts: Sequence[TextOrPair]) -> None:
        """Count the texts that are empty, or hold NUL."""
        self.empty += sum(not "".join(text).strip() for text in texts)
        self.nul += sum("\0" in "".join(text) for text in texts)

    def remarks(self, count: int) -> list[str]:
        """Return what a reader of the results should know about `count` texts."""
        found = {"are empty": self.empty, "hold NUL characters": self.nul}
        said = [f"{n:,} of {count:,} texts {what}" for what, n in found.items() if n]
        others = {
            "examples longer than max_length left out": self.overlong,
            "control tokens in messages read as text": self.escaped,
            "answers end without a token that ends a turn, so when to stop is not learned": (
                self.open_ended
            ),
        }
        return [*said, *(f"{n:,} {what}" for what, n in others.items() if n)]


@dataclasses.dataclass(frozen=True)
class Tokens(Sequence[TokenRow]):
    """Rows of tokens in flat arrays, which take five bytes a token for any number of rows."""

    ids: NDArray[np.int32]
    """Token ids of all rows, one after the other."""
    marks: NDArray[np.uint8]
    """A mark for each token: its type (classification), or whether it is to be learned."""
    starts: NDArray[np.int64]
    """The start of each row in the flat arrays, and the end of the last row."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> TokenRow:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = slice(self.starts[index], self.starts[index + 1])
        return self.ids[row], self.marks[row]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each row."""
        return np.diff(self.starts)


def collect(rows: Iterable[TokenRow]) -> Tokens:
    """Copy rows into `Tokens`, one by one."""
    ids, marks, lengths = [], [], [0]
    for row_ids, row_marks in rows:
        ids.append(row_ids)
        marks.append(row_marks)
        lengths.append(len(row_ids))
    return Tokens(
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        np.concatenate(marks) if marks else np.zeros(0, np.uint8),
        np.cumsum(lengths, dtype=np.int64),
    )


class Encoder:
    """A tokenizer without its own padding and truncation; it counts what it truncates."""

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, vocabulary: int | None = None
    ) -> None:
        """Copy the tokenizer, so that the settings of the caller's do not change.

        `vocabulary` is the number of rows of the model's embedding; a token beyond them is an
        error. None: no check.
        """
        self.max_length, self._vocabulary = max_length, vocabulary
        self._whole = _copied(tokenizer)
        self._whole.no_padding()
        self._whole.no_truncation()

    @functools.cached_property
    def start(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer's post-processor puts before a text."""
        (probe,) = self._encoded(["a"])
        if 0 not in probe.special_tokens_mask:
            raise DataError(
                "the tokenizer gives no token for the text 'a': is tokenizer.json whole, and that "
                "of this model?"
            )
        found = tuple(probe.ids[: probe.special_tokens_mask.index(0)])
        self.check([found])
        return found

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts without cutting and without special tokens, except those in the text."""
        encodings = self._encoded(texts, add_special_tokens=False)
        found = [encoding.ids for encoding in encodings]
        self.check(found)
        return found

    def with_offsets(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenise texts as `plain` does, with the characters that each token stands for."""
        found = self._encoded(texts, self._whole.encode_batch, add_special_tokens=False)
        self.check(encoding.ids for encoding in found)
        return found

    def _encoded(
        self,
        texts: Sequence[TextOrPair],
        encode: Callable[..., list[Encoding]] | None = None,
        **options: bool,
    ) -> list[Encoding]:
        encode = self._whole.encode_batch_fast if encode is None else encode
        size = sum(
            len(one) for text in texts for one in ((text,) if isinstance(text, str) else text)
        )
        try:
            found: list[Encoding] = _in_time(lambda: encode(list(texts), **options), size)
        except DataError:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            for text in texts:
                for one in (text,) if isinstance(text, str) else text:
                    _check_whole(one)
            raise DataError(
                f"the tokenizer fails on one of {len(texts)} texts: {str(error)[:200]}\n"
                "A regular expression in tokenizer.json that takes too long for a text fails like "
                "this; is the file that of the model, from someone you trust?"
            ) from error
        return found

    def check(self, rows: Iterable[Sequence[int]]) -> None:
        """Raise `DataError` for a token without an embedding: the model would read NaN there."""
        if self._vocabulary is None:
            return
        highest = max((max(ids) for ids in rows if ids), default=-1)
        if highest >= self._vocabulary:
            token = self._whole.id_to_token(highest)
            raise DataError(
                f"the tokenizer gives token {highest} ({token!r}), and the model has embeddings "
                f"for {self._vocabulary}, counted from 0.\n"
                "Is tokenizer.json that of this model? A token that was added to it needs a row in "
                "the model's embedding too."
            )

    def truncate(self, texts: Sequence[TextOrPair], truncation: TextTruncation) -> list[Encoding]:
        """Tokenise texts and cut them to `max_length`; the counts are added to `truncation`.

        The tokenizer cuts before it adds its special tokens. It cuts from the end of a text, and
        from the longer one of a pair first. `DataError`: `max_length` leaves no room for text after
        the special tokens.
        """
        truncation.see(texts)
        encodings = self._encoded(texts)
        self.check(encoding.ids for encoding in encodings)
        long = [i for i, e in enumerate(encodings) if len(e) > self.max_length]
        if long:
            special = self._whole.num_special_tokens_to_add(is_pair=isinstance(texts[0], tuple))
            if special >= self.max_length:
                raise DataError(
                    f"data.max_length {self.max_length} leaves no room for text: the tokenizer "
                    f"adds {special} special tokens to an example"
                )
            self._whole.enable_truncation(self.max_length)
            short = self._encoded([texts[i] for i in long])
            self._whole.no_truncation()
            for i, encoding in zip(long, short, strict=True):
                if len(encoding) > self.max_length:
                    raise DataError(
                        f"the tokenizer makes {len(encoding)} tokens of a text that is cut to "
                        f"{self.max_length}: its post-processor repeats the text, and no model is "
                        "fed so; is tokenizer.json that of this model?"
                    )
                truncation.examples += 1
                truncation.tokens += len(encodings[i]) - len(encoding)
                encodings[i] = encoding
        return encodings


def _in_time(run: Callable[[], T], size: int) -> T:
    """Call the tokenizers package with `size` characters, and raise `DataError` if it takes too
    long.

    A regular expression of a stranger's tokenizer.json can take hours for a page of text, and
    nothing can stop the package then: it goes on in its thread until the process ends.
    """
    ends: list[tuple[T | None, BaseException | None]] = []

    def call() -> None:
        try:
            ends.append((run(), None))
        except BaseException as error:  # noqa: BLE001  raised again below
            ends.append((None, error))

    seconds = SECONDS + size / CHARACTERS
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ends:
        raise DataError(
            f"the tokenizer has not come to an end with {size:,} characters in {seconds:,.0f} "
            "seconds: an expression in tokenizer.json needs too long for a text; is the file that "
            "of the model, from someone you trust?"
        )
    ((found, error),) = ends
    if error is not None:
        raise error
    return found  # type: ignore[return-value]


def _copied(tokenizer: Tokenizer) -> Tokenizer:
    """Copy a tokenizer; what the package writes of a damaged one it does not read again."""
    try:
        return Tokenizer.from_str(tokenizer.to_str())
    except BaseException as error:
        if not is_failure(error):
            raise
        raise DataError(
            f"the tokenizer contradicts itself: {str(error)[:200]}\n"
            "Fetch the file that it is from again, from someone you trust."
        ) from error


def _check_whole(text: str) -> None:
    """Raise `DataError` for a text that cannot be UTF-8, which a tokenizer does not accept."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{text[:40]!r} holds half a character (an unpaired surrogate)") from None


def chunks(items: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; the last list may be shorter.

    >>> list(chunks("abc", 2))
    [['a', 'b'], ['c']]
    """
    rest = iter(items)
    for first in rest:
        yield list(chain([first], islice(rest, size - 1)))


def padded(
    rows: Sequence[tuple[ArrayLike, ArrayLike]], length: int, pad: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int32]]:
    """Return the ids, the mask and the types of (ids, types) of each row, padded to a length."""
    ids, types = (
        np.full((len(rows), length), pad, np.int32),
        np.zeros((len(rows), length), np.int32),
    )
    mask = np.zeros(ids.shape, bool)
    for row, (own_ids, own_types) in enumerate(rows):
        size = np.size(own_ids)
        ids[row, :size], types[row, :size], mask[row, :size] = own_ids, own_types, True
    return ids, mask, types


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the token id for padding. Padding is masked, but some models depend on its id."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    for name in ("[PAD]", "<pad>"):
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    return 0
