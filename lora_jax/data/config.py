"""The config of the data: what is read, and how batches are made of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_jax.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data: where examples come from and how they become batches."""

    source: str = "reviews"
    """reviews (movie-review snippets), reuters8, reuters52 and newsgroups (texts by topic), wordnet
    (word to definition), tfds:name/config:version, or JSONL and CSV files: data/{split}.jsonl, or
    train=a.csv,validation=b.csv."""
    data_dir: str | None = None
    """Where TFDS keeps prepared data. None: LORA_JAX_CACHE or ~/.cache/lora_jax, below data/."""
    text_fields: tuple[str, ...] = ("text",)
    """Classification: the field with the text, or the two fields of a pair."""
    label_field: str = "label"
    """Classification: the field with the label."""
    label_names: tuple[str, ...] = ()
    """The classes in order. Empty: those the source declares, else those found in the training
    split."""
    regression: bool = False
    """The label is a real number. Found by itself where the source says so; CSV files cannot."""
    prompt: str = "{text}"
    """Language modelling: what comes before the answer, with fields of an example in braces."""
    answer: str = ""
    """Language modelling: what is to be learned, with fields in braces. Empty: every token of the
    prompt is."""
    eos: str | None = None
    """Language modelling: the token that ends an example, as the tokenizer's vocabulary spells it;
    "" for none. Has to be said."""
    max_length: int = 128
    """Longest example in tokens, and the row length in language modelling. What it cuts is counted
    and reported."""
    pack: bool = dataclasses.field(default=True, metadata={"later": True})
    """Language modelling: a row holds as many examples as fit. False: it holds one, so that
    batch_size counts examples."""
    buckets: tuple[int, ...] = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    """Classification: a batch is padded to the smallest of these that holds it, or to
    max_length. Each length that occurs is compiled once."""
    batch_size: int = 32
    """Rows of a training batch."""
    eval_batch_size: int = 64
    """Rows of an evaluation batch."""
    train_split: str = "train"
    """The split that is learned from."""
    eval_split: str = "validation"
    """The split that picks the best adapter."""
    test_split: str = "test"
    """The split that is evaluated once at the end."""
    train_limit: int | None = None
    """Use only the first so many training examples. None: all."""
    eval_limit: int | None = None
    """Use only the first so many evaluation examples. None: all."""
    test_limit: int | None = None
    """Use only the first so many test examples. None: all."""

    def __post_init__(self) -> None:
        _require(bool(self.source), "source", self.source, "the name of a source")
        for name in ("max_length", "batch_size", "eval_batch_size"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        for name in ("train_limit", "eval_limit", "test_limit"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "at least 1, or None for all")
        _require(
            len(self.text_fields) in (1, 2), "text_fields", self.text_fields, "one field, or two"
        )
        _require(all(b > 0 for b in self.buckets), "buckets", self.buckets, "lengths above 0")
        if self.regression and self.label_names:
            raise DataError("data.regression and data.label_names exclude each other: drop one")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The batch lengths in use, ascending; the last one is `max_length`.

        >>> DataConfig(max_length=100, buckets=(64, 32, 128)).lengths
        (32, 64, 100)
        """
        return (*sorted({b for b in self.buckets if b < self.max_length}), self.max_length)

    def limit(self, split: str) -> int | None:
        """How many examples of `split` are used at most; None for all."""
        limits = {
            self.test_split: self.test_limit,
            self.eval_split: self.eval_limit,
            self.train_split: self.train_limit,
        }
        return limits.get(split)


def _require(condition: bool, field: str, got: Any, expected: str) -> None:
    if not condition:
        raise DataError(f"data.{field} must be {expected}, got {got!r}")
