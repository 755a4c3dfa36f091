"""The config of a data set of texts."""

from __future__ import annotations

import dataclasses

from lora_jax.data.examples_config import ExamplesConfig


@dataclasses.dataclass(frozen=True)
class DataConfig(ExamplesConfig):
    """The source of the examples, and how they become batches."""

    source: str = "reviews"
    """reviews (movie-review snippets); reuters8, reuters52 and newsgroups (texts by topic); wordnet
    (words and definitions); tfds:name/config:version; or JSONL and CSV files, as data/{split}.jsonl
    or train=a.csv,validation=b.csv."""
    text_fields: tuple[str, ...] = ("text",)
    """Classification: the field with the text, or the two fields of a pair of texts."""
    prompt: str = "{text}"
    """Language modelling: the text before the answer, with fields of an example in braces."""
    answer: str = ""
    """Language modelling: the text to learn, with fields in braces. Empty: every token of the
    prompt is learned."""
    eos: str | None = None
    """Language modelling: the token that ends an example, as in the tokenizer's vocabulary; "" for
    none. It must be given."""
    max_length: int = 128
    """Longest example in tokens, and in language modelling the length of a row. Longer examples are
    cut, counted and reported."""
    pack: bool = True
    """Language modelling: put as many examples into a row as fit. False: one example in a row, so
    that batch_size counts examples."""
    buckets: tuple[int, ...] = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    """Classification: a batch is padded to the smallest of these lengths that has room for it, or
    to max_length. Each length in use is compiled once."""

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
