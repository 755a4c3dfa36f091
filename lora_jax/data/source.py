"""What a source is: named splits, each a random-access sequence of dictionaries."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lora_jax.data.errors import DataError
from lora_jax.data.status import tracked
from lora_jax.errors import nearest

_FIELDS = 40  # names in a message
Example = Mapping[str, Any]  # field name to str, int, float or bool; an image is bytes of its file


class FileRow(dict[str, Any]):
    """An example out of a file, which knows its line."""

    __slots__ = ("line", "path")

    def __init__(self, fields: Mapping[str, Any], path: Path, line: int) -> None:
        """Hold the fields."""
        super().__init__(fields)
        self.path, self.line = path, line


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
        where: the source, for the message; an example out of a file has its line instead.
    """
    if field in example:
        return example[field]
    raise missing(field, example, option, place_of(example, where))


def text_of(example: Example, field: str, option: str, where: str) -> str:
    """`field_of` as a text; a number is written out.

    Raises:
        DataError: no such field, or a value that is neither a text nor a number.
    """
    value = field_of(example, field, option, where)
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(
        f"{place_of(example, where)}: {field!r}, which data.{option} names, is "
        f"{shown(value)}, expected a text.\n"
        "Leave out examples without one, and write a list (of messages, say) as one text into a "
        "field of its own: a conversation by the model's chat template."
    )


def place_of(example: Example, where: str) -> str:
    """The file and the line of an example, or `where`."""
    return f"{example.path}:{example.line}" if isinstance(example, FileRow) else where


def shown(value: Any) -> str:
    """A value out of the data, cut to what a message can hold."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def missing(field: str, fields: Iterable[str], option: str, where: str) -> DataError:
    """The error for a field (or split) that is not there."""
    names = list(fields)
    more = f" and {len(names) - _FIELDS} more" if len(names) > _FIELDS else ""
    return DataError(
        f"{where} has no {field!r}, which data.{option} names.\n"
        f"  there are: {', '.join(map(shown, names[:_FIELDS])) or 'none'}{more}\n"
        f"  nearest: {', '.join(map(shown, nearest(field, names, 1)))}"
    )
