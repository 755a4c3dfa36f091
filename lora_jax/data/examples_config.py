"""The config that all kinds of data share: where examples come from, their labels, batches."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_jax.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """Where examples come from, what their labels are, and how many make a batch."""

    source: str
    """See the classes that derive from it."""
    data_dir: str | None = None
    """Where TFDS keeps prepared data. None: data/ in LORA_JAX_CACHE or ~/.cache/lora_jax."""
    label_field: str = "label"
    """Classification: the field with the label."""
    label_names: tuple[str, ...] = ()
    """The classes in order. Empty: those the source declares, else those found in the training
    split."""
    regression: bool = False
    """The label is a real number. Found by itself where the source says so; CSV files cannot."""
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
        self._require("source", bool(self.source), "the name of a source")
        for name in ("batch_size", "eval_batch_size"):
            self._require(name, getattr(self, name) > 0, "at least 1")
        for name in ("train_limit", "eval_limit", "test_limit"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "at least 1, or None for all")
        if self.regression and self.label_names:
            raise DataError("data.regression and data.label_names exclude each other: drop one")

    def limit(self, split: str) -> int | None:
        """How many examples of `split` are used at most; None for all."""
        limits = {
            self.test_split: self.test_limit,
            self.eval_split: self.eval_limit,
            self.train_split: self.train_limit,
        }
        return limits.get(split)

    def _require(self, field: str, condition: bool, expected: str) -> None:
        got: Any = getattr(self, field)
        if not condition:
            raise DataError(f"data.{field} must be {expected}, got {got!r}")
