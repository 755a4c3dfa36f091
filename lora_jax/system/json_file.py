"""Strict reading of JSON that may come from a stranger.

Python's reader accepts more than JSON: a key twice (the last one wins), NaN and Infinity, half a
character (an unpaired surrogate). It raises five types of errors, none of which names the file.
Here every fault raises the caller's own error type, and the message begins with the place.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lora_jax.system import regular_files
from lora_jax.system.regular_files import MakeError

_SHOWN = 80  # characters of the text that a message quotes
_DEPTH = 100  # nested lists and objects


def read(
    path: os.PathLike[str], error: MakeError, *, cure: str = "", finite: bool = True
) -> dict[str, Any]:
    """Read a file that holds one JSON object, with all checks; `cure` ends each message."""

    def refused(message: str) -> Exception:
        return error(f"{message}; {cure}" if cure else message)

    data = regular_files.read(path, refused)
    return parse_object(data, str(path), refused, finite=finite)


def parse_object(
    data: bytes, where: str, error: MakeError, *, finite: bool = True
) -> dict[str, Any]:
    """Read one JSON object with `parse`, and refuse any other value."""
    value = parse(data, where, error, finite=finite)
    if not isinstance(value, dict):
        raise error(f"{where} holds {_kind(value)}, expected an object {{...}}")
    return value


def parse(data: bytes, where: str, error: MakeError, *, finite: bool = True) -> Any:
    """Read one JSON value in UTF-8, with or without a byte order mark.

    Every message begins with `where`, a file and perhaps its line. `finite` refuses NaN and
    Infinity, which Python's own writer writes.

    >>> parse(b'{"a": [1, null]}', "x.json", ValueError)
    {'a': [1, None]}
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = first_repeated(name for name, _ in pairs)
            raise _RefusedError(f"{where}: the key {_cut(repr(twice))} is there twice")
        return found

    def constant(name: str) -> float:
        if finite:
            raise _RefusedError(f"{where}: {name} is not a number that JSON has")
        return float(name)

    try:
        value = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=constant
        )
        if rb"\ud" in data.lower():  # an escaped half of a character that has two
            json.dumps(value, ensure_ascii=False).encode()
        if data.count(b"[") + data.count(b"{") > _DEPTH and _depth(value) > _DEPTH:
            raise RecursionError
    except _RefusedError as refused:
        raise error(str(refused)) from None
    except UnicodeEncodeError:
        raise error(f"{where} holds half a character (an unpaired surrogate)") from None
    except UnicodeDecodeError as fault:
        raise error(f"{where} is not UTF-8 (byte {fault.start}: {fault.reason})") from None
    except RecursionError:
        raise error(f"{where} is nested too deeply") from None
    except ValueError as fault:
        raise error(f"{where} is not JSON: {_cut(str(fault))}") from None
    return value


class _RefusedError(Exception):
    """A fault that the reader's hooks found; `parse` turns it into the caller's error."""


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that is there more than once, or None."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _depth(value: Any) -> int:
    """Return the depth of nested lists and objects, without recursion."""
    deepest, left = 0, [(value, 1)]
    while left:
        one, depth = left.pop()
        if isinstance(one, dict | list):
            deepest = max(deepest, depth)
            inner = one.values() if isinstance(one, dict) else one
            left += [(each, depth + 1) for each in inner if isinstance(each, dict | list)]
    return deepest


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
