"""Packed rows for causal language modelling. No example is split over two rows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lora_jax.data.batches import Batches, ShardBatches, TextFacts
from lora_jax.data.catalogue import open_source
from lora_jax.data.config import DataConfig
from lora_jax.data.packing import Packing, Streams
from lora_jax.data.process_slice import Shard
from lora_jax.data.source import DataSource
from lora_jax.data.status import tracked
from lora_jax.errors import DataError, nearest
from lora_jax.models.text.example import Example
from lora_jax.models.text.templates import Template
from lora_jax.models.text.tokens import (
    CHUNK,
    Encoder,
    TextTruncation,
    TokenRow,
    Tokens,
    collect,
    padding_id,
)

AHEAD = 1_000_000  # with more examples than this, rows are tokenised when they are read

_SAMPLE = 2_000  # the number of examples from which facts are estimated


def language_modelling(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epochs: int | None = 1,
    vocabulary: int | None = None,
) -> Batches:
    """Make batches of packed rows of T = `config.max_length` tokens.

        input_ids    [B, T] int32
        targets      [B, T] int32    the next token
        loss_weight  [B, T] float32  1 if the target is to be learned, else 0: learned are the
        answer
                                     and the end token, or everything if there is no answer
        segment_ids  [B, T] int32    the number of the example in the row, from 1; 0 is padding
        positions    [B, T] int32    the position in the example, from 0

    Without `config.pack` a row holds one example, and padding.

    An example of n tokens takes n - 1 positions of one row (its last token is only a target). A
    longer example is cut at its end, and an example without anything left to learn is left out;
    the facts count both.

    Row j of every batch comes from stream j, which consists of the examples j, j + B, j + 2B... and
    packs them by itself (`lora_jax.data.packing`). A process reads and tokenises only the streams
    of its own rows. Every example comes exactly `epochs` times in all; since several rows are
    filled at the same time, the end of one epoch and the start of the next may share some. A stream
    that ends before the others, or has no examples, yields rows of padding at loss_weight 0.

    Args:
      config: the config of the data.
      tokenizer: makes the tokens. Special tokens that its post-processor puts before a text are
        kept, those after it are not: `config.eos` is the token that ends an example.
      split: the name of a split.
      batch_size: rows of a batch.
      shuffle: whether each stream has its own order in each epoch, drawn from `seed`.
      seed: the seed of the orders.
      epochs: the number of epochs. None: without end.
      vocabulary: rows of the model's embedding; a token beyond them is an error.

    Returns:
      The batches.

    Raises:
      DataError: the source or a field is not as the config says, or `config.eos` is not given.
    """
    source = open_source(config.source, config.data_dir)
    examples = source.examples(split)
    count = min(len(examples), config.limit(split) or len(examples))
    where = f"{source.name}, split {split!r}"
    reader = Reader(config, tokenizer, where, vocabulary)
    list(reader.rows(examples[:1], TextTruncation()))  # a wrong field should be found early
    packing = Packing(
        batch_size=batch_size,
        length=config.max_length,
        pad=padding_id(tokenizer),
        seed=seed if shuffle else None,
        epochs=epochs,
        together=config.pack,
    )

    def part(shard: Shard) -> ShardBatches:
        own = shard.rows(batch_size).tolist()
        dealt = {number: range(number, count, batch_size) for number in own}
        truncation = TextTruncation()
        rows = _read(reader, examples, dealt, truncation, split)
        streams = Streams(rows, packing, shard, where)
        measured = _measure(rows, truncation, count)
        return streams.begin, _facts(source, split, measured, streams, packing, shard)

    return Batches(functools.cache(part))


class Reader:
    """Turns examples into tokens and marks; the mark is 1 on a token that is to be learned."""

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, where: str, vocabulary: int | None = None
    ) -> None:
        """Check the templates and the end token."""
        self.where = where
        self._prompt = Template(config.prompt, "prompt")
        self._answer = Template(config.answer, "answer")
        self._end = _end(config, tokenizer)
        # A row has `max_length` inputs, and the last token of an example is only a target.
        self._encoder = Encoder(tokenizer, config.max_length + 1, vocabulary)
        self._encoder.check([self._encoder.start, self._end])

    def rows(self, examples: Sequence[Example], truncation: TextTruncation) -> Iterator[TokenRow]:
        """Yield a row for each example, which is empty if there is nothing to learn.

        Counts of cut and dropped examples are added to `truncation`.
        """
        start = self._encoder.start
        asked = [self._prompt.fill(e, self.where) for e in examples]
        prompts = self._encoder.plain(asked)
        replies = [self._answer.fill(e, self.where) for e in examples]
        answers = self._encoder.plain(replies)
        truncation.see(list(zip(asked, replies, strict=True)))
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = np.array([*start, *prompt, *answer, *self._end], np.int32)
            marks = np.ones(len(ids), np.uint8)
            marks[: len(start) + (len(prompt) if self._answer.text else 0)] = 0
            yield self._within((ids, marks), truncation)

    def _within(self, row: TokenRow, truncation: TextTruncation) -> TokenRow:
        ids, marks = row
        limit = self._encoder.max_length
        if len(ids) > limit:
            truncation.examples += 1
            truncation.tokens += len(ids) - limit
            ids, marks = ids[:limit], marks[:limit]
        if not marks[1:].any():  # the first token is never a target
            truncation.dropped += 1
            return ids[:0], marks[:0]
        return ids, marks


def _end(config: DataConfig, tokenizer: Tokenizer) -> list[int]:
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    if config.eos is None:
        raise DataError(
            "data.eos must name the token that ends an example, or be empty for none.\n"
            f"  this tokenizer's special tokens: {', '.join(special[:20])}"
        )
    if not config.eos:
        return []
    found = tokenizer.token_to_id(config.eos)
    if found is None:
        raise DataError(
            f"data.eos {config.eos!r} is not in the tokenizer's vocabulary.\n"
            f"  nearest: {', '.join(nearest(config.eos, special or tokenizer.get_vocab()))}"
        )
    return [found]


def _read(
    reader: Reader,
    examples: Sequence[Example],
    dealt: Mapping[int, range],
    truncation: TextTruncation,
    split: str,
) -> Mapping[int, Sequence[TokenRow]]:
    """Return the rows of each stream."""
    total = sum(map(len, dealt.values()))
    if total > AHEAD:
        return {n: LazyRows(reader, examples, places, truncation) for n, places in dealt.items()}

    def rows(places: range) -> Iterator[TokenRow]:
        for start in range(0, len(places), CHUNK):
            some = places[start : start + CHUNK]
            yield from reader.rows(examples[some.start : some.stop : some.step], truncation)

    all_rows = chain.from_iterable(map(rows, dealt.values()))
    every = tracked(all_rows, f"tokenising {split}", total)
    return {number: collect(islice(every, len(places))) for number, places in dealt.items()}


@dataclasses.dataclass(frozen=True)
class LazyRows(Sequence[TokenRow]):
    """Rows that are tokenised each time they are read."""

    reader: Reader
    examples: Sequence[Example]
    places: range
    truncation: TextTruncation

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> TokenRow:  # type: ignore[override]
        (row,) = self.reader.rows([self.examples[self.places[index]]], self.truncation)
        return row


def _measure(
    rows: Mapping[int, Sequence[TokenRow]], truncation: TextTruncation, count: int
) -> tuple[int, int, TextTruncation]:
    """Count the examples in use, the positions they take in packed rows, and the truncation.

    The counts are for the `count` examples of the whole split. If this process has not tokenised
    all of them, they are scaled up from a sample.
    """
    each = -(-_SAMPLE // len(rows))
    lengths = np.concatenate([_lengths(stream, each) for stream in rows.values()])
    scale = count / max(1, len(lengths))  # exactly 1 if one process has tokenised everything
    scaled = TextTruncation(*(round(number * scale) for number in dataclasses.astuple(truncation)))
    places = int(np.maximum(lengths - 1, 0).sum())
    return round(np.count_nonzero(lengths) * scale), round(places * scale), scaled


def _lengths(rows: Sequence[TokenRow], sample: int) -> NDArray[np.int64]:
    if isinstance(rows, Tokens):
        return rows.lengths
    return np.array([len(rows[i][0]) for i in range(min(sample, len(rows)))], np.int64)


def _facts(
    source: DataSource,
    split: str,
    measured: tuple[int, int, TextTruncation],
    streams: Streams,
    packing: Packing,
    shard: Shard,
) -> TextFacts:
    examples, tokens, truncation = measured
    places = packing.batch_size * packing.length
    if packing.epochs is None:
        padding = 1 - streams.fill()
        batches = max(1, math.ceil(tokens / max(1e-9, 1 - padding) / places))
    else:
        batches = -(-streams.longest // packing.epochs)
        padding = 1 - tokens / max(1, batches * places)
    notes = source.notes
    if shard.share < 1:
        notes += (
            f"{split}: counted on {shard.share:.3g} of the examples, one process's, and scaled up",
        )
    return TextFacts(
        source=source.name,
        split=split,
        examples=examples,
        batches=batches,
        tokens=tokens,
        padding=padding,
        truncation=truncation,
        notes=notes,
    )
