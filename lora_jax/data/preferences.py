"""Pairs of answers, of which the first is better, in batches padded to a few lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_jax.data.batches import Batches, TextFacts
from lora_jax.data.catalogue import open_data
from lora_jax.data.config import DataConfig
from lora_jax.data.epochs import Epochs, EpochTable
from lora_jax.data.example_reader import Reader, Words, form_of
from lora_jax.data.forms import Preference, answers
from lora_jax.data.labels import Labels
from lora_jax.data.status import tracked
from lora_jax.errors import DataError
from lora_jax.models.text.example import Example, place_of
from lora_jax.models.text.tokens import (
    TextTruncation,
    TokenRow,
    Tokens,
    chunks,
    collect,
    padding_id,
)


def preferences(
    config: DataConfig,
    words: Words,
    split: str,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epochs: int | None = 1,
    set_apart: bool = False,
) -> Batches:
    """Make batches of B pairs, the better answer first, of T tokens.

        input_ids    [B, 2, T] int32
        targets      [B, 2, T] int32    the next token
        loss_weight  [B, 2, T] float32  1 if the target belongs to the answer, else 0
        reference    [B, 2]    float32  zeros: the log-probabilities by the reference go here
        weight       [B]       float32  1, or 0 for a pair that only fills the batch
        index        [B]       int32    the number of the pair in the split

    The answers are the assistant's messages after the prompt. A pair of which one answer has
    nothing left to learn within `config.max_length` is left out, and counted.

    Args:
      config: the config of the data.
      words: the tokenizer, and what else the model makes of text.
      split: the name of a split.
      batch_size: pairs of a batch.
      shuffle: whether each epoch has its own order, drawn from `seed`.
      seed: the seed of the order.
      epochs: the number of epochs. None: without end.
      set_apart: see `language_modelling`.

    Raises:
      DataError: the examples are not pairs.
    """
    source = open_data(config, set_apart)
    examples = source.examples(split)
    some = examples[: min(len(examples), config.limit(split) or len(examples))]
    where = f"{source.name}, split {split!r}"
    form = form_of(config, some[0], where)
    if form.name != "preference":
        raise DataError(
            f"{place_of(some[0], where)}: the example has the form {form.name!r}; preferences are "
            "learned from pairs with the fields chosen and rejected, and perhaps prompt"
        )
    truncation = TextTruncation()
    reader = Reader(config, words, form, where)
    rows: list[TokenRow] = []
    for chunk in chunks(tracked(some, f"tokenising {split}", len(some)), 200):
        rows += _pairs(reader, [form.of(e, where) for e in chunk], chunk, where, truncation)
    if not rows:
        raise DataError(f"{where}: no pair has two answers within data.max_length")
    tokens = collect(rows)
    longest = tokens.lengths.reshape(-1, 2).max(1) - 1
    table = PairTable(
        epochs=Epochs(
            np.searchsorted(config.lengths, longest), batch_size, seed if shuffle else None, epochs
        ),
        labels=Labels(()),
        tokens=tokens,
        lengths=config.lengths,
        pad=padding_id(words.tokenizer),
    )
    count = int(tokens.lengths.sum())
    places = sum(2 * batch_size * table.length(chosen) for chosen in table.epochs.plan(0))
    facts = TextFacts(
        source=source.name,
        split=split,
        examples=len(tokens) // 2,
        batches=table.epochs.batches,
        tokens=count,
        padding=1 - count / places,
        truncation=truncation,
        notes=source.notes,
    )
    return dataclasses.replace(table.batches(facts), labels=None)


def _pairs(
    reader: Reader,
    pairs: Sequence[Preference],
    examples: Sequence[Example],
    where: str,
    truncation: TextTruncation,
) -> list[TokenRow]:
    """Return two rows for each pair that has two answers within the limit."""
    said = [answer for pair in pairs for answer in answers(pair)]
    places = [place_of(example, where) for example in examples for _ in range(2)]
    rows = [reader.within(row, truncation) for row in reader.whole(said, places, truncation)]
    whole = [(rows[i], rows[i + 1]) for i in range(0, len(rows), 2)]
    return [row for pair in whole if all(len(ids) for ids, _ in pair) for row in pair]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTable(EpochTable):
    """The tokenised pairs: rows 2 i and 2 i + 1 are the better and the worse answer of pair i."""

    tokens: Tokens
    lengths: tuple[int, ...]
    pad: int

    def columns(
        self, epoch: int, chosen: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """See `EpochTable`."""
        shape = (len(rows), 2, self.length(chosen))
        ids, targets = np.full(shape, self.pad, np.int32), np.full(shape, self.pad, np.int32)
        marks = np.zeros(shape, np.float32)
        for i, pair in enumerate(rows.tolist()):
            for side in range(2):
                own, learned = self.tokens[2 * pair + side]
                size = len(own) - 1
                ids[i, side, :size], targets[i, side, :size] = own[:-1], own[1:]
                marks[i, side, :size] = learned[1:]
        reference = np.zeros((len(rows), 2), np.float32)
        return {"input_ids": ids, "targets": targets, "loss_weight": marks, "reference": reference}

    def length(self, chosen: NDArray[np.int64]) -> int:
        """Return the bucket of a batch, which has room for its longest answer."""
        return self.lengths[self.epochs.sizes[chosen].max()]
