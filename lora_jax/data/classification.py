"""Batches for classification and regression: texts of similar length, padded to buckets."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lora_jax.data.batches import Batches
from lora_jax.data.catalogue import open_data
from lora_jax.data.config import DataConfig
from lora_jax.data.epochs import Epochs, TokenTable
from lora_jax.data.labels import Labels, labels_of
from lora_jax.data.source import read
from lora_jax.data.status import tracked
from lora_jax.errors import DataError
from lora_jax.models.text.example import Example, field_of, place_of, text_of
from lora_jax.models.text.tokens import (
    Encoder,
    TextOrPair,
    TextTruncation,
    TokenRow,
    chunks,
    collect,
    padded,
    padding_id,
)


def classification(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epochs: int | None = 1,
    set_apart: bool = False,
    vocabulary: int | None = None,
) -> Batches:
    """Make batches of tokenised texts with their labels.

    A batch has B rows of T tokens, where T is the smallest bucket that has room for all of them:

        input_ids    [B, T] int32
        mask         [B, T] bool     True on tokens, False on padding
        token_types  [B, T] int32    only for pairs if the tokenizer distinguishes the two texts
        label        [B]    int32    class id, or float32 for real numbers
        weight       [B]    float32  1, or 0 for a row that only fills the batch
        index        [B]    int32    number of the example in the split

    Every epoch has every example exactly once. B is always `batch_size`: a batch that would be
    short is filled with copies of its rows, at weight 0. Every process tokenises all texts at the
    start and keeps them in memory, five bytes a token, because the lengths of all texts decide
    which texts share a batch. A process makes only its own rows of a batch.

    Args:
      config: the config of the data.
      tokenizer: makes the tokens; its post-processor adds the special tokens.
      split: the name of a split.
      batch_size: rows of a batch.
      shuffle: whether each epoch has its own order, drawn from `seed` and its number. Without it
        batches go from short to long texts.
      seed: the seed of the order.
      epochs: the number of epochs. None: without end.
      set_apart: whether files without a validation split give up a share of the training examples
        for one (`config.eval_share`).
      vocabulary: rows of the model's embedding; a token beyond them is an error.

    Returns:
      The batches.

    Raises:
      DataError: the source, a field or a label is not as the config says.
    """
    source = open_data(config, set_apart)
    labels = labels_of(config, source)
    examples = read(source, split, config.limit(split))
    truncation = TextTruncation()
    encoder = Encoder(tokenizer, config.max_length, vocabulary)
    tokens = collect(_rows(config, examples, encoder, truncation, split))
    if truncation.empty == len(examples):
        raise DataError(
            f"{source.name}, split {split!r}: all {len(examples):,} texts are empty. "
            f"data.text_fields names their fields: {', '.join(config.text_fields)}"
        )
    values = _values(config, examples, labels, f"{source.name}, split {split!r}")
    buckets = np.searchsorted(config.lengths, tokens.lengths)
    table = ExampleTable(
        epochs=Epochs(buckets, batch_size, seed if shuffle else None, epochs),
        labels=labels,
        tokens=tokens,
        values=values,
        buckets=config.lengths,
        pad=padding_id(tokenizer),
        types=len(config.text_fields) == 2 and 1 in tokenizer.encode("a", "a").type_ids,
    )
    counts = Counter(values.tolist())
    classes = tuple((name, counts[i]) for i, name in enumerate(labels.names))
    return table.batches(table.facts(source, split, truncation, classes))


def _rows(
    config: DataConfig,
    examples: Sequence[Example],
    encoder: Encoder,
    truncation: TextTruncation,
    split: str,
) -> Iterator[TokenRow]:
    """Yield the token ids and token types of each example."""
    texts = (_text(config, x, f"split {split!r}, example {i}") for i, x in enumerate(examples))
    for chunk in chunks(tracked(texts, f"tokenising {split}", len(examples))):
        for encoding in encoder.truncate(chunk, truncation):
            yield np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.uint8)


def _text(config: DataConfig, example: Example, where: str) -> TextOrPair:
    parts = [text_of(example, f, "text_fields", where) for f in config.text_fields]
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _values(
    config: DataConfig, examples: Sequence[Example], labels: Labels, where: str
) -> NDArray[Any]:
    places = (place_of(example, f"{where}, example {i}") for i, example in enumerate(examples))
    values = [
        labels.encode(field_of(example, config.label_field, "label_field", place), place)
        for example, place in zip(examples, places, strict=True)
    ]
    return np.array(values, np.float32 if labels.regression else np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleTable(TokenTable):
    """The tokenised texts and their labels."""

    values: NDArray[Any]
    types: bool

    def columns(
        self, epoch: int, chosen: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        every = [self.tokens[example] for example in rows.tolist()]
        ids, mask, types = padded(every, self.length(chosen), self.pad)
        batch = {"input_ids": ids, "mask": mask, "label": self.values[rows]}
        return {**batch, "token_types": types} if self.types else batch
