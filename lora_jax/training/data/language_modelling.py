"""Packed rows for causal language modelling: prompt, answer, end; nothing split over two rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import grain
import numpy as np
from grain import experimental
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lora_jax.errors import nearest
from lora_jax.training.data.batches import IN_THREAD, Batches, Facts
from lora_jax.training.data.catalogue import open_source
from lora_jax.training.data.config import DataConfig
from lora_jax.training.data.errors import DataError
from lora_jax.training.data.source import Example, Source
from lora_jax.training.data.templates import Template
from lora_jax.training.data.tokens import Cut, Encoder, Row, chunks, collect, padding_id
from lora_jax.training.data.waiting import tracked

AHEAD = 1_000_000  # up to so many examples are tokenised at once, more as they are read

_BINS = 32  # rows that are filled side by side
_SAMPLE = 2_000  # examples that the padding is estimated from


def language_modelling(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epochs: int | None = 1,
) -> Batches:
    """Batches of packed rows of T = `config.max_length` tokens.

        input_ids    [B, T] int32
        targets      [B, T] int32    the token that follows
        loss_weight  [B, T] float32  1 where the target is to be learned: the answer and the end, or
                                     everything where there is no answer; else 0
        segment_ids  [B, T] int32    which example of the row, from 1; 0 is padding
        positions    [B, T] int32    place within the example, from 0

    An example of n tokens takes n - 1 places (its last token is only a target) in one row. One that
    is longer is cut at its end; one of which nothing to learn is left is left out; both are counted
    in the facts. The last batch is filled up with copies of its first row at loss_weight 0.

    Over all epochs every example comes exactly `epochs` times; since rows are filled side by side,
    the end of one epoch and the start of the next may share some.

    Args:
        config: the data.
        tokenizer: makes the tokens. The special tokens that its post-processor puts before a text
            are kept, those after it are not: `config.eos` says what ends an example.
        split: the name of a split.
        batch_size: rows of a batch.
        shuffle: whether each epoch has an order of its own, drawn from `seed` and its number.
        seed: of the order.
        epochs: how often the split is gone through; None never ends.

    Raises:
        DataError: the source or a field is not as the config says, or `config.eos` is not said.
    """
    source = open_source(config.source, config.data_dir)
    examples = source.examples(split)
    count = min(len(examples), config.limit(split) or len(examples))
    cut = Cut()
    reader = Reader(config, tokenizer, f"{source.name}, split {split!r}", cut)
    rows: Sequence[Row | None]
    if count <= AHEAD:
        rows = collect(_ahead(reader, examples, count, split))
    else:
        rows = Lazily(reader, examples, count)
    if len(rows) == 0:
        raise DataError(f"{reader.where}: no example of it has anything to learn")
    pad = padding_id(tokenizer)
    length = config.max_length
    facts = _facts(source, split, rows, (batch_size, length, pad), cut)
    dataset = grain.MapDataset.source(Shifted(rows))
    if shuffle:
        dataset = dataset.seed(seed).shuffle()
    if epochs != 1:
        dataset = dataset.repeat(epochs)
    return Batches(pack(dataset, length, pad).batch(batch_size).map(Fill(batch_size)), facts)


class Reader:
    """Turns examples into tokens and marks: 1 on those to be learned."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, where: str, cut: Cut) -> None:
        """Check the templates and the end token.

        Raises:
            DataError: one of them cannot be used.
        """
        self.where = where
        self._cut = cut
        self._prompt = Template(config.prompt, "prompt")
        self._answer = Template(config.answer, "answer")
        self._end = _end(config, tokenizer)
        # A row has `max_length` inputs, and the last token of an example is a target only.
        self._encoder = Encoder(tokenizer, config.max_length + 1)

    def rows(self, examples: Sequence[Example]) -> Iterator[Row | None]:
        """A row for each example, or None where there is nothing to learn."""
        start = self._encoder.start
        prompts = self._encoder.plain([self._prompt.fill(e, self.where) for e in examples])
        answers = self._encoder.plain([self._answer.fill(e, self.where) for e in examples])
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = np.array([*start, *prompt, *answer, *self._end], np.int32)
            marks = np.ones(len(ids), np.uint8)
            marks[: len(start) + (len(prompt) if self._answer.text else 0)] = 0
            yield self._within((ids, marks))

    def _within(self, row: Row) -> Row | None:
        ids, marks = row
        limit = self._encoder.max_length
        if len(ids) > limit:
            self._cut.examples += 1
            self._cut.tokens += len(ids) - limit
            ids, marks = ids[:limit], marks[:limit]
        if not marks[1:].any():  # the first token is never a target
            self._cut.dropped += 1
            return None
        return ids, marks


def _end(config: DataConfig, tokenizer: Tokenizer) -> list[int]:
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    if config.eos is None:
        raise DataError(
            "data.eos has to name the token that ends an example, or be empty for none.\n"
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


def _ahead(reader: Reader, examples: Sequence[Example], count: int, split: str) -> Iterator[Row]:
    read = tracked(islice(examples, count), f"tokenising {split}", count)
    for chunk in chunks(read):
        for row in reader.rows(chunk):
            if row is not None:
                yield row


@dataclasses.dataclass(frozen=True)
class Lazily(Sequence[Row | None]):
    """Rows tokenised when they are asked for."""

    reader: Reader
    examples: Sequence[Example]
    total: int

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Row | None:  # type: ignore[override]
        if not 0 <= index < self.total:
            raise IndexError(index)
        return next(self.reader.rows([self.examples[index]]))


@dataclasses.dataclass(frozen=True)
class Shifted(Sequence[dict[str, NDArray[Any]] | None]):
    """Rows as inputs, targets and weights. Grain passes over a None."""

    rows: Sequence[Row | None]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]] | None:  # type: ignore[override]
        row = self.rows[index]
        if row is None:
            return None
        ids, marks = row
        return {
            "input_ids": ids[:-1],
            "targets": ids[1:],
            "loss_weight": marks[1:].astype(np.float32),
        }


def pack(dataset: grain.MapDataset, length: int, pad: int) -> grain.IterDataset:
    """First-fit packing into rows of `length`, in the order of the data set."""
    packed = experimental.FirstFitPackIterDataset(
        dataset.to_iter_dataset(IN_THREAD),
        length_struct={"input_ids": length, "targets": length, "loss_weight": length},
        num_packing_bins=_BINS,
        shuffle_bins=False,
        padding_struct={"input_ids": pad, "targets": pad, "loss_weight": 0},
    )
    return packed.map(_named)


def _named(row: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    names = {"segment_ids": "input_ids_segment_ids", "positions": "input_ids_positions"}
    names |= {name: name for name in ("input_ids", "targets", "loss_weight")}
    return {name: row[key] for name, key in names.items()}


@dataclasses.dataclass(frozen=True)
class Fill(grain.transforms.Map):
    """Fills a short batch with copies of its first row that weigh nothing."""

    batch_size: int

    def map(self, element: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with `batch_size` rows."""
        short = self.batch_size - len(element["input_ids"])
        if short == 0:
            return element
        full = {k: np.concatenate([v, np.repeat(v[:1], short, 0)]) for k, v in element.items()}
        full["loss_weight"][-short:] = 0
        return full


def _facts(
    source: Source,
    split: str,
    rows: Sequence[Row | None],
    shape: tuple[int, int, int],
    cut: Cut,
) -> Facts:
    """Packs a sample to see how full the rows get."""
    batch_size, length, pad = shape
    sample = grain.MapDataset.source(Shifted(rows))[: min(len(rows), _SAMPLE)]
    packed = [row["segment_ids"] > 0 for row in pack(sample, length, pad)]
    used = sum(int(row.sum()) for row in packed)
    tokens = round(used * len(rows) / len(sample))
    full = used / (len(packed) * length)
    batches = max(1, -(-round(tokens / full / length) // batch_size))
    return Facts(source.name, split, len(rows), batches, tokens, 1 - full, cut, (), source.notes)
