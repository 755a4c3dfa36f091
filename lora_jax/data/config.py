"""The configs of data sets: what all kinds share, the texts and the images."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from lora_jax.errors import DataError
from lora_jax.system.checked import Checked, require

# The names in `lora_jax.data.forms.FORMS`, which says what each means.
FormName = Literal[
    "auto",
    "messages",
    "conversations",
    "preference",
    "preference_messages",
    "judged",
    "judged_messages",
    "completion",
    "instruction",
    "text",
]


@dataclasses.dataclass(frozen=True)
class ExamplesConfig(Checked):
    """The source of the examples, their labels, and the sizes of batches."""

    _path = "data."
    _bounds: ClassVar = {
        "at least 1": ("batch_size", "eval_batch_size", "train_limit", "eval_limit", "test_limit")
    }

    source: str
    """The source; see the subclasses."""
    data_dir: str | None = None
    """The folder for prepared data. None: data/ in LORA_JAX_CACHE or ~/.cache/lora_jax."""
    label_field: str = "label"
    """Classification: the field with the label."""
    label_names: tuple[str, ...] = ()
    """The classes in order. Empty: the classes that the source declares, or else the labels in
    the training split."""
    regression: bool = False
    """The label is a real number. Most sources say so by themselves; CSV files cannot."""
    batch_size: int = dataclasses.field(default=32, metadata={"changeable": True})
    """Rows of a training batch."""
    eval_batch_size: int = 64
    """Rows of an evaluation batch."""
    train_split: str = "train"
    """The split for training."""
    eval_split: str = "validation"
    """The split for the evaluations that pick the best adapter."""
    test_split: str = "test"
    """The split that is evaluated before training and with the best adapter."""
    eval_share: float = 0.1
    """The share of the training examples that is set apart, at most 1,000 of them, as the
    validation split of files that have none."""
    train_limit: int | None = None
    """Use only this many training examples, the first ones. None: all."""
    eval_limit: int | None = None
    """Use only this many evaluation examples, the first ones. None: all."""
    test_limit: int | None = None
    """Use only this many test examples, the first ones. None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.source), "data.source", self.source, "the name of a source")
        share = self.eval_share
        require(0 < share < 1, "data.eval_share", share, "above 0 and below 1")
        if self.regression and self.label_names:
            raise DataError("data.regression and data.label_names exclude each other: drop one")

    def limit(self, split: str) -> int | None:
        """Return the largest number of examples of `split` to use. None: all."""
        limits = {
            self.test_split: self.test_limit,
            self.eval_split: self.eval_limit,
            self.train_split: self.train_limit,
        }
        return limits.get(split)


@dataclasses.dataclass(frozen=True)
class DataConfig(ExamplesConfig):
    """The source of the examples, and how they become batches."""

    _bounds: ClassVar = {"at least 1": ("max_length",)}

    source: str = "reviews"
    """reviews (movie-review snippets); reuters8, reuters52 and newsgroups (texts by topic); wordnet
    (words and definitions); tfds:name/config:version; or JSONL and CSV files, as data/{split}.jsonl
    or train=a.csv,validation=b.csv, also of the hub, as hub:org/name@revision/{split}.jsonl."""
    text_fields: tuple[str, ...] = ("text",)
    """Classification: the field with the text, or the two fields of a pair of texts."""
    form: FormName = "auto"
    """Language modelling: the form of the examples. auto: found by the keys of the first one."""
    prompt: str | None = None
    """Language modelling: the text before the answer, with fields of an example in braces. None:
    the examples have one of the forms."""
    answer: str = ""
    """Language modelling: the text to learn, with fields in braces. Empty: every token of the
    prompt is learned."""
    eos: str | None = None
    """Language modelling: the token that ends a text, as in the tokenizer's vocabulary; "" for
    none. None: the model's own. A chat template ends its turns by itself."""
    template: str | None = None
    """Conversations: a file with the Jinja text of a chat template. None: the model's own."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Language modelling: learn every answer, the last answer of each conversation, or every token
    of all messages."""
    max_length: int = 128
    """Longest example in tokens, and in language modelling the length of a row. Longer examples are
    counted and reported."""
    overlong: Literal["cut", "drop"] = "cut"
    """Language modelling: cut longer examples at their end, or leave them out."""
    pack: bool = True
    """Language modelling: put as many examples into a row as fit. Without it a row is one example,
    so that batch_size counts examples."""
    buckets: tuple[int, ...] = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    """Classification: a batch is padded to the smallest of these lengths that has room for it, or
    to max_length. Each length in use is compiled once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fields, buckets = self.text_fields, self.buckets
        require(len(fields) in (1, 2), "data.text_fields", fields, "one field, or two")
        require(all(b > 0 for b in buckets), "data.buckets", buckets, "lengths above 0")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The batch lengths in use, ascending; the last one is `max_length`.

        >>> DataConfig(max_length=100, buckets=(64, 32, 128)).lengths
        (32, 64, 100)
        """
        return (*sorted({b for b in self.buckets if b < self.max_length}), self.max_length)


@dataclasses.dataclass(frozen=True)
class ImageDataConfig(ExamplesConfig):
    """The source of the images, their augmentation in training, and the sizes of batches."""

    _bounds: ClassVar = {"at least 1": ("threads",)}

    source: str = "tfds:beans"
    """tfds:name/config:version, or JSONL and CSV files with the path of an image file in each row,
    as data/{split}.jsonl or train=a.csv,validation=b.csv."""
    image_field: str = "image"
    """The field with the image."""
    flip: bool = False
    """Training: mirror a random half of the images, left to right."""
    crop: float = 1.0
    """Training: cut out a random part of each image, with at least this share of its area, and a
    width of three quarters to four thirds of its height. 1: use the whole image."""
    threads: int = dataclasses.field(default=4, metadata={"incidental": True})
    """Batches that are decoded at the same time, each in a thread; as many more are kept ready."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.image_field), "data.image_field", self.image_field, "the name of a field")
        require(0 < self.crop <= 1, "data.crop", self.crop, "above 0 and at most 1")
