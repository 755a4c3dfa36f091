"""The config of a data set of texts: what is read, and how batches are made of it."""

from __future__ import annotations

import dataclasses

from lora_jax.data.examples_config import ExamplesConfig


@dataclasses.dataclass(frozen=True)
class DataConfig(ExamplesConfig):
    """The data: where examples come from and how they become batches."""

    source: str = "reviews"
    """reviews (movie-review snippets), reuters8, reuters52 and newsgroups (texts by topic), wordnet
    (word to definition), tfds:name/config:version, or JSONL and CSV files: data/{split}.jsonl, or
    train=a.csv,validation=b.csv."""
    text_fields: tuple[str, ...] = ("text",)
    """Classification: the field with the text, or the two fields of a pair."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("max_length", self.max_length > 0, "at least 1")
        self._require("text_fields", len(self.text_fields) in (1, 2), "one field, or two")
        self._require("buckets", all(b > 0 for b in self.buckets), "lengths above 0")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The batch lengths in use, ascending; the last one is `max_length`.

        >>> DataConfig(max_length=100, buckets=(64, 32, 128)).lengths
        (32, 64, 100)
        """
        return (*sorted({b for b in self.buckets if b < self.max_length}), self.max_length)
