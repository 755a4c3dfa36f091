"""An example is a dictionary of named fields; errors name the file and line that it is from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_jax.errors import DataError, nearest

_FIELDS = 40  # names in a message
Example = Mapping[str, Any]  # field -> str, int, float or bool, or the bytes of an image file


class FileRow(dict[str, Any]):
    """An example from a file, with the number of its line."""

    __slots__ = ("line", "path")

    def __init__(self, fields: Mapping[str, Any], path: Path, line: int) -> None:
        """Hold the fields."""
        super().__init__(fields)
        self.path, self.line = path, line


def field_of(example: Example, field: str, option: str, where: str) -> Any:
    """Return `example[field]`, or raise a `DataError` that lists the fields.

    `option` is the option of the config that names the field. `where` is the source, for the
    message; an example from a file has its line instead.
    """
    if field in example:
        return example[field]
    raise missing(field, example, option, place_of(example, where))


def text_of(example: Example, field: str, option: str, where: str) -> str:
    """Return `field_of` as text; a number is converted, and anything else is a `DataError`."""
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
    """Return the file and line of an example, or `where`."""
    return f"{example.path}:{example.line}" if isinstance(example, FileRow) else where


def shown(value: Any) -> str:
    """Return a value of the data as text, cut to the length of a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def missing(field: str, fields: Iterable[str], option: str, where: str) -> DataError:
    """Return the error for a field or split that does not exist, and that `option` names."""
    names = list(fields)
    more = f" and {len(names) - _FIELDS} more" if len(names) > _FIELDS else ""
    return DataError(
        f"{where} has no {field!r}, which data.{option} names.\n"
        f"  there are: {', '.join(map(shown, names[:_FIELDS])) or 'none'}{more}\n"
        f"  nearest: {', '.join(map(shown, nearest(field, names, 1)))}"
    )
