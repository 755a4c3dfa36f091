"""A data source has named splits, each a random-access sequence of dictionaries."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from itertools import islice

from lora_jax.data.status import tracked
from lora_jax.errors import DataError, nearest
from lora_jax.models.text.example import Example


class DataSource(abc.ABC):
    """A data set. Every opening has the same examples in the same order."""

    name: str
    """The name of the source in a config."""
    splits: tuple[str, ...]
    """The names of the splits."""
    notes: tuple[str, ...] = ()
    """Facts about the data for readers of the results, each a sentence."""

    @abc.abstractmethod
    def examples(self, split: str) -> Sequence[Example]:
        """Return the examples of a split, with random access.

        Args:
          split: the name of the split.

        Raises:
          DataError: there is no such split, or it cannot be read.
        """

    def classes(self, field: str) -> tuple[str, ...] | None:
        """Return the class names that the source declares for a field.

        Args:
          field: the name of the field.

        Returns:
          The names; () for a real number, and None if the source declares nothing.
        """
        return None


def no_split(source: DataSource, split: str) -> DataError:
    return DataError(
        f"{source.name} has no split {split!r}.\n  there are: {', '.join(source.splits)}\n"
        f"  nearest: {', '.join(nearest(split, source.splits, 1))}"
    )


def read(source: DataSource, split: str, limit: int | None) -> list[Example]:
    """Read the first `limit` examples of a split into memory. None: all."""
    examples = source.examples(split)
    total = len(examples) if limit is None else min(limit, len(examples))
    return list(tracked(islice(examples, total), f"reading {split}", total))
