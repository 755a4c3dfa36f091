"""The base class of configs: each field has a value of its annotated type, and numbers are finite.

>>> @dataclasses.dataclass(frozen=True)
... class Speed(Checked):
...     limit: float | None = None
>>> Speed(limit="fast")
Traceback (most recent call last):
lora_jax.system.checked.ConfigError: limit must be float or None, got 'fast'
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from lora_jax.errors import LoraError


class ConfigError(LoraError):
    """A config field has a value that it cannot have; the message names the field."""


BOUNDS: dict[str, Callable[[Any], bool]] = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "above 0": lambda x: x > 0,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "at least 1, or -1 for the rest": lambda x: x == -1 or x >= 1,
}


class Checked:
    """A frozen dataclass that checks its fields; lists become tuples, NumPy's scalars Python's."""

    _path: ClassVar[str] = ""  # of the config in that of a run, such as "lora."
    # One of `BOUNDS`, which None satisfies -> fields; a subclass adds to the bounds of its base.
    _bounds: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value of another type, or beyond the bounds of its field.

        A subclass with own checks calls this first.
        """
        kind: Any = type(self)
        for name, hint in _hints(kind).items():
            value = getattr(self, name)
            value = value.item() if isinstance(value, np.generic) else value
            value = tuple(value) if isinstance(value, list) else value
            if not _fits(value, hint):
                size = {int: " within 64 bits", float: ", and finite"}.get(type(value), "")
                alone = isinstance(value, str) and get_origin(hint) is tuple
                cure = f"; one alone is written ({value!r},)" if alone else ""
                expected = f"{self._path}{name} must be {type_name(hint)}{size}"
                raise ConfigError(f"{expected}, got {value!r}{cure}")
            object.__setattr__(self, name, value)
        tables = [vars(base).get("_bounds", {}) for base in reversed(kind.__mro__)]
        for bound, names in (row for table in tables for row in table.items()):
            for name in names:
                value = getattr(self, name)
                require(value is None or BOUNDS[bound](value), f"{self._path}{name}", value, bound)


def require(condition: bool, field: str, got: Any, expected: str) -> None:
    """Raise a `ConfigError` that names the dotted path `field` unless `condition` is true."""
    if not condition:
        raise ConfigError(f"{field} must be {expected}, got {got!r}")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    kind, options = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return _fits(value, options[0])
    if kind in (Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if kind is Literal:
        return value in options
    if kind is tuple and options and isinstance(value, tuple):
        each = options[:1] * len(value) if options[-1] is ... else options
        return len(each) == len(value) and all(map(_fits, value, each))
    if kind in (int, float):
        limit = 2**63 if type(value) is int else math.inf
        return type(value) in (int, kind) and abs(value) < limit
    try:
        return isinstance(value, kind)
    except TypeError:  # Any, a protocol or a type variable
        return True


def type_name(hint: Any) -> str:
    """Return the name of a type for an error message.

    >>> type_name(float | None), type_name(tuple[str, ...]), type_name(Literal["a", "b"])
    ('float or None', 'str, several', "'a' or 'b'")
    """
    options = get_args(hint)
    match get_origin(hint):
        case origin if origin in (Union, types.UnionType):
            return " or ".join(map(type_name, options))
        case origin if origin is Literal:
            return " or ".join(map(repr, options))
        case origin if origin in (tuple, Annotated):
            return type_name(options[0]) + ", several" * (origin is tuple)
    return "None" if hint is types.NoneType else str(getattr(hint, "__name__", hint))
