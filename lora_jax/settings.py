"""The base class of configs: each field has a value of its annotated type, and numbers are finite.

>>> @dataclasses.dataclass(frozen=True)
... class Speed(Settings):
...     limit: float | None = None
>>> Speed(limit="fast")
Traceback (most recent call last):
lora_jax.errors.LoraError: limit must be float or None, got 'fast'
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from lora_jax.errors import LoraError


class Settings:
    """A frozen dataclass that checks its fields. A subclass that checks more calls this first.

    Lists become tuples, and NumPy's scalars Python's.
    """

    _path: ClassVar[str] = ""
    """The path of the config in that of a run, such as "lora."; error messages begin with it."""

    def __post_init__(self) -> None:
        """Raise `LoraError` for the first field whose value does not have its type."""
        for name, hint in _hints(type(self)).items():
            given = value = getattr(self, name)
            value = value.item() if isinstance(value, np.generic) else value
            value = tuple(value) if isinstance(value, list) else value
            if not _fits(value, hint):
                raise LoraError(
                    f"{self._path}{name} must be {type_name(hint)}, got {value!r}"
                    f"{_note(value, hint)}"
                )
            if value is not given:
                object.__setattr__(self, name, value)


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
        real = isinstance(value, int | kind) and not isinstance(value, bool)
        return real and _is_usable(value)
    try:
        return isinstance(value, kind)
    except TypeError:  # Any, a protocol or a type variable
        return True


def _is_usable(number: int | float) -> bool:
    return abs(number) < 2**63 if isinstance(number, int) else math.isfinite(number)


def _note(value: Any, hint: Any) -> str:
    """Return what the name of the type does not say."""
    if isinstance(value, int | float) and not _is_usable(value):
        return ": a number must be finite, and an int must fit into 64 bits"
    single = isinstance(value, str) and get_origin(hint) is tuple
    return f"; one alone is written ({value!r},)" if single else ""


def type_name(hint: Any) -> str:
    """Return the name of a type for an error message.

    Args:
      hint: the annotation of a field.

    >>> type_name(float | None), type_name(tuple[str, ...]), type_name(Literal["a", "b"])
    ('float or None', 'str, several', "'a' or 'b'")
    """
    options = get_args(hint)
    if get_origin(hint) is Annotated:
        return type_name(options[0])
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(type_name, options))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, options))
    if get_origin(hint) is tuple:
        return f"{type_name(options[0])}, several"
    return "None" if hint is types.NoneType else str(getattr(hint, "__name__", hint))
