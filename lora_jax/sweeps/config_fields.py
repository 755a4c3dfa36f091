"""Get and set the fields of a config by dotted path, and convert values to their types.

>>> from lora_jax.training.config import LoraConfig
>>> with_field(LoraConfig(), "rank", 2).rank
2
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import tyro

from lora_jax.errors import listed, nearest
from lora_jax.training.config import ConfigError

C = TypeVar("C")


def field_types(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return path -> type of every field that decides what a run computes, in their order.

    >>> from lora_jax.training.config import LoraConfig
    >>> field_types(LoraConfig())["alpha"]
    <class 'float'>
    """
    hints = get_type_hints(type(config), include_extras=True)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if field.metadata.get("incidental") or get_origin(hints[field.name]) is Annotated:
            continue  # the latter cannot be set on a command line
        if dataclasses.is_dataclass(value):
            found |= field_types(value, f"{path}.")
        else:
            found[path] = hints[field.name]
    return found


def field_type(config: Any, path: str, where: str) -> Any:
    known = field_types(config)
    if path in known:
        return known[path]
    near = nearest(path, known)
    near += [k for k in known if k.endswith(f".{path}") and k not in near]
    raise ConfigError(
        f"{where}: {type(config).__name__} has no field {path!r} that decides what a run computes; "
        f"nearest:\n{listed(near)}"
    )


def with_field(config: C, path: str, value: Any) -> C:
    """Return the config with one field changed; the config's own checks run."""
    name, _, rest = path.partition(".")
    inner = with_field(getattr(config, name), rest, value) if rest else value
    changes: dict[str, Any] = {name: inner}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def converted(value: Any, hint: Any) -> Any:
    """Convert a value as the command line would for a field of type `hint`."""
    value = value.item() if isinstance(value, np.generic) else value
    value = tuple(value) if isinstance(value, list) else value
    found = _parsed([str(v) for v in (value if isinstance(value, tuple) else (value,))], hint)
    if found != value:  # for example, a string that reads as a number is not a number
        raise ValueError(value)
    return found


def read(text: str, hint: Any) -> Any:
    """Read text as a value of type `hint`; spaces separate the entries of a tuple.

    >>> read("1e-3", float), read("None", float | None), read("a b", tuple[str, ...])
    (0.001, None, ('a', 'b'))
    """
    return _parsed(text.split() if may_be_tuple(hint) else [text], hint)


def _parsed(words: list[str], hint: Any) -> Any:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the caller prints its own error
            return tyro.cli(hint, args=["--", *words], console_outputs=False)
    except SystemExit:
        raise ValueError(words) from None


def may_be_tuple(hint: Any) -> bool:
    """Return whether a value of the type may be a tuple.

    >>> may_be_tuple(tuple[str, ...] | None), may_be_tuple(str)
    (True, False)
    """
    return get_origin(hint) is tuple or any(get_origin(h) is tuple for h in get_args(hint))
