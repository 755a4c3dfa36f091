"""What a source is: named splits, each a random-access sequence of dictionaries."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from lora_jax.data.errors import DataError
from lora_jax.data.status import tracked
from lora_jax.errors import nearest

Example = Mapping[str, Any]  # field name to str, int, float or bool; an image is bytes of its file


class DataSource(abc.ABC):
    """A data set: what is read is the same on every opening, in the same order."""

    name: str
    """As a user would write it."""
    splits: tuple[str, ...]
    """The names of the splits."""
    notes: tuple[str, ...] = ()
    """What a reader of results should know about the data, a sentence each."""

    @abc.abstractmethod
    def examples(self, split: str) -> Sequence[Example]:
        """The examples of a split; random access.

        Raises:
            DataError: no such split, or it cannot be read.
        """

    def classes(self, field: str) -> tuple[str, ...] | None:
        """The class names that the source declares for a field: () for a real number, None where
        it declares nothing."""
        return None


def read(source: DataSource, split: str, limit: int | None) -> list[Example]:
    """The first `limit` examples of a split (None: all), in memory."""
    examples = source.examples(split)
    total = len(examples) if limit is None else min(limit, len(examples))
    return list(tracked(islice(examples, total), f"reading {split}", total))


def field_of(example: Example, field: str, option: str, where: str) -> Any:
    """`example[field]`, or an error that names the fields there are.

    Args:
        example: a read example.
        field: the field's name.
        option: the config's option that names it.
        where: the source, for the message.
    """
    if field in example:
        return example[field]
    raise missing(field, example, option, where)


def missing(field: str, fields: Iterable[str], option: str, where: str) -> DataError:
    """The error for a field (or split) that is not there."""
    names = list(fields)
    return DataError(
        f"{where} has no {field!r}, which data.{option} names.\n"
        f"  there are: {', '.join(map(repr, names)) or 'none'}\n"
        f"  nearest: {', '.join(map(repr, nearest(field, names, 1)))}"
    )
