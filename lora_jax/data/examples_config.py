"""The config that all kinds of data share: the source of examples, their labels, the batches."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_jax.errors import DataError
from lora_jax.system.checked import Checked


@dataclasses.dataclass(frozen=True)
class ExamplesConfig(Checked):
    """The source of the examples, their labels, and the sizes of batches."""

    _path = "data."

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
    batch_size: int = 32
    """Rows of a training batch."""
    eval_batch_size: int = 64
    """Rows of an evaluation batch."""
    train_split: str = "train"
    """The split for training."""
    eval_split: str = "validation"
    """The split for the evaluations that pick the best adapter."""
    test_split: str = "test"
    """The split that is evaluated before training and with the best adapter."""
    train_limit: int | None = None
    """Use only this many training examples, the first ones. None: all."""
    eval_limit: int | None = None
    """Use only this many evaluation examples, the first ones. None: all."""
    test_limit: int | None = None
    """Use only this many test examples, the first ones. None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("source", bool(self.source), "the name of a source")
        for name in ("batch_size", "eval_batch_size"):
            self._require(name, getattr(self, name) > 0, "at least 1")
        for name in ("train_limit", "eval_limit", "test_limit"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "at least 1, or None for all")
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

    def _require(self, field: str, condition: bool, expected: str) -> None:
        got: Any = getattr(self, field)
        if not condition:
            raise DataError(f"data.{field} must be {expected}, got {got!r}")
