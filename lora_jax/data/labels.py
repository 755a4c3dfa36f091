"""The labels of a data set: named classes, or real numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from lora_jax.data.config import ExamplesConfig
from lora_jax.data.source import DataSource
from lora_jax.errors import DataError, nearest
from lora_jax.models.text.example import field_of, place_of, shown

MOST = 1_000  # the most classes that a head may have without names


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes of a data set, or real numbers as labels.

    Attributes:
      names: the names of the classes in the order of their ids; empty for real numbers.
    """

    names: tuple[str, ...]

    @property
    def regression(self) -> bool:
        """Whether a label is a real number."""
        return not self.names

    @property
    def outputs(self) -> int:
        """The number of outputs that a head needs."""
        return len(self.names) or 1

    def encode(self, value: Any, where: str) -> int | float:
        """Convert a label to a class id or a float.

        Args:
          value: a class id, a class name, or a number.
          where: the example, for the error message.

        Raises:
          DataError: it is none of these. GLUE marks the hidden labels of its test sets by -1.
        """
        if self.regression:
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            if not math.isfinite(number):
                raise DataError(f"{where}: label {shown(value)} is not a number (data.regression)")
            return number
        if isinstance(value, int) and 0 <= value < len(self.names):
            return int(value)  # the value may be a bool, which is an int as well
        if str(value) in self.names:
            return self.names.index(str(value))
        if value == -1:
            raise DataError(f"{where}: label -1 means hidden labels; this split has none to use")
        raise DataError(
            f"{where}: label {shown(value)} is not one of the {len(self.names)} classes "
            f"{', '.join(self.names[:10])}.\n"
            f"  nearest: {', '.join(nearest(str(value)[:80], self.names, 1))}\n"
            "data.label_names sets the classes; data.regression=True takes labels as real numbers."
        )


def labels_of(config: ExamplesConfig, source: DataSource) -> Labels:
    """Return the labels that the config names, or the source declares, or the training split has.

    Classes that are found in the split are ordered as numbers if all of them are numbers, else as
    text. Real numbers that are found (floats in JSONL) mean regression.

    Args:
      config: the config of the data.
      source: the source.

    Raises:
      DataError: the labels are of several kinds or neither text nor numbers, or there is only one
        class, or there are more than 1,000 classes without names.
    """
    labels = _labels_of(config, source)
    if len(labels.names) == 1:
        raise DataError(
            f"{source.name}: every label is {shown(labels.names[0])}, and from one class there is "
            "nothing to learn.\n"
            "data.label_field names the field of the labels, data.label_names all classes."
        )
    return labels


def _labels_of(config: ExamplesConfig, source: DataSource) -> Labels:
    if config.regression:
        return Labels(())
    if config.label_names:
        return Labels(config.label_names)
    declared = source.classes(config.label_field)
    if declared is not None:
        return Labels(declared)
    where = f"{source.name}, split {config.train_split!r}"
    values: set[Any] = set()
    for i, example in enumerate(source.examples(config.train_split)):
        value = field_of(example, config.label_field, "label_field", where)
        if not isinstance(value, str | int | float) or not str(value).strip():
            place = place_of(example, f"{where}, example {i}")
            raise DataError(
                f"{place}: label {shown(value)}, expected a text or a number. Leave out examples "
                "without a label; an empty class must be named in data.label_names"
            )
        values.add(value)
    if all(isinstance(v, float) for v in values):
        return Labels(())
    if all(isinstance(v, int) for v in values):
        low, high = min(map(int, values)), max(map(int, values))
        if low < 0:
            raise DataError(f"{where}: label {low}; class ids start at 0")
        _check_count(high + 1, f"{where}: class ids up to {high}")
        return Labels(tuple(map(str, range(high + 1))))
    if not all(isinstance(v, str) for v in values):
        kinds = sorted({type(v).__name__ for v in values})
        raise DataError(f"{where}: labels of more than one kind: {', '.join(kinds)}")
    return Labels(_ordered(values, where))


def _ordered(values: set[str], where: str) -> tuple[str, ...]:
    _check_count(len(values), f"{where}: {len(values)} different labels")
    alike: dict[str, str] = {}
    for value in sorted(values):
        if (other := alike.setdefault(value.strip().casefold(), value)) != value:
            raise DataError(
                f"{where}: the labels {shown(other)} and {shown(value)} differ only in white space "
                "or case. Write one of them in the data; if they are two classes, name all classes "
                "in data.label_names"
            )
    if all(re.fullmatch("-?[0-9]+", v) for v in values):
        return tuple(sorted(values, key=int))
    return tuple(sorted(values))


def _check_count(count: int, said: str) -> None:
    """Raise `DataError` if a head would have more outputs than a user without class names meant."""
    if count > MOST:
        raise DataError(
            f"{said}. Real numbers need data.regression=True; more than {MOST:,} classes must be "
            "named in data.label_names."
        )
