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
from lora_jax.data.catalogue import open_data
from lora_jax.data.config import DataConfig
from lora_jax.data.example_reader import Reader, Words, form_of
from lora_jax.data.forms import Form
from lora_jax.data.packing import Packing, Streams
from lora_jax.data.process_slice import Shard
from lora_jax.data.source import DataSource
from lora_jax.data.status import tracked
from lora_jax.models.text.example import Example
from lora_jax.models.text.tokens import (
    CHUNK,
    TextTruncation,
    TokenRow,
    Tokens,
    collect,
    padding_id,
)

AHEAD = 200_000  # with more examples than this, rows are tokenised when they are read

_SAMPLE = 2_000  # the number of examples from which facts are estimated


def language_modelling(
    config: DataConfig,
    tokenizer: Tokenizer | Words,
    split: str,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epochs: int | None = 1,
    set_apart: bool = False,
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
      tokenizer: makes the tokens; `Words` also has the chat template, the token that ends a text
        and the number of embeddings. Special tokens that the tokenizer's post-processor puts
        before a text are kept, those after it are not.
      split: the name of a split.
      batch_size: rows of a batch.
      shuffle: whether each stream has its own order in each epoch, drawn from `seed`.
      seed: the seed of the orders.
      epochs: the number of epochs. None: without end.
      set_apart: whether files without a validation split give up a share of the training examples
        for one (`config.eval_share`).

    Returns:
      The batches.

    Raises:
      DataError: the source or a field is not as the config says, or `config.eos` is not given.
    """
    words = tokenizer if isinstance(tokenizer, Words) else Words(tokenizer)
    source = open_data(config, set_apart)
    examples = source.examples(split)
    count = min(len(examples), config.limit(split) or len(examples))
    where = f"{source.name}, split {split!r}"
    first = examples[:1]
    form = form_of(config, first[0], where)
    reader = Reader(config, words, form, where)
    list(reader.rows(first, TextTruncation()))  # a wrong field should be found early
    packing = Packing(
        batch_size=batch_size,
        length=config.max_length,
        pad=padding_id(words.tokenizer),
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
        notes = (*source.notes, *_said(config, form, source))
        return streams.begin, _facts(source.name, split, measured, streams, packing, shard, notes)

    return Batches(functools.cache(part))


def _said(config: DataConfig, form: Form, source: DataSource) -> tuple[str, ...]:
    """Tell what was found by itself."""
    if config.prompt is not None or config.form != "auto":
        return ()
    learned = {"last": "the last answer of each", "all": "every token"}.get(config.train_on)
    return (
        f"the fields {', '.join(form.keys)} are the form {form.name!r} (data.form); learned is "
        f"{learned or form.learned} (data.train_on)",
    )


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
    source: str,
    split: str,
    measured: tuple[int, int, TextTruncation],
    streams: Streams,
    packing: Packing,
    shard: Shard,
    notes: tuple[str, ...],
) -> TextFacts:
    examples, tokens, truncation = measured
    places = packing.batch_size * packing.length
    if packing.epochs is None:
        padding = 1 - streams.fill()
        batches = max(1, math.ceil(tokens / max(1e-9, 1 - padding) / places))
    else:
        batches = -(-streams.longest // packing.epochs)
        padding = 1 - tokens / max(1, batches * places)
    if shard.share < 1:
        notes += (
            f"{split}: counted on {shard.share:.3g} of the examples, one process's, and scaled up",
        )
    return TextFacts(
        source=source,
        split=split,
        examples=examples,
        batches=batches,
        tokens=tokens,
        padding=padding,
        truncation=truncation,
        notes=notes,
    )
