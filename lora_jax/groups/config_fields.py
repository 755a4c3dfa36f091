"""A config's fields by dotted path, and values that fit them.

>>> from lora_jax.training.config import LoraConfig
>>> replaced(LoraConfig(), "rank", 2).rank
2
"""

from __future__ import annotations

import dataclasses
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from lora_jax.errors import listed, nearest
from lora_jax.training.config import ConfigError

C = TypeVar("C")


def kinds(config: Any, prefix: str = "") -> dict[str, Any]:
    """Path -> type of every field that decides what a run computes, in their order.

    >>> from lora_jax.training.config import LoraConfig
    >>> kinds(LoraConfig())["alpha"]
    <class 'float'>
    """
    hints = get_type_hints(type(config), include_extras=True)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if field.metadata.get("incidental") or get_origin(hints[field.name]) is Annotated:
            continue  # the latter: what no command line can set
        if dataclasses.is_dataclass(value):
            found |= kinds(value, f"{path}.")
        else:
            found[path] = hints[field.name]
    return found


def kind(config: Any, path: str, where: str) -> Any:
    """The type of the field at `path`.

    Raises:
      ConfigError: there is none; the message has `where` the path was read and the nearest ones.
    """
    known = kinds(config)
    if path in known:
        return known[path]
    near = nearest(path, known)
    near += [k for k in known if k.endswith(f".{path}") and k not in near]
    raise ConfigError(
        f"{where}: {type(config).__name__} has no field {path!r} that decides what a run computes; "
        f"nearest:\n{listed(near)}"
    )


def replaced(config: C, path: str, value: Any) -> C:
    """The config with one field changed; its own checks are made."""
    name, _, rest = path.partition(".")
    inner = replaced(getattr(config, name), rest, value) if rest else value
    changes: dict[str, Any] = {name: inner}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def fitting(value: Any, hint: Any) -> Any:
    """`value` as the command line would have made it for a field of type `hint`.

    Raises:
      TypeError: it is of another type.
    """
    value = value.item() if isinstance(value, np.generic) else value
    options = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return _first(options, lambda option: fitting(value, option))
    if get_origin(hint) is Literal and value in options:
        return value
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(fitting(v, options[0]) for v in value)
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise TypeError(value)


def read(text: str, hint: Any) -> Any:
    """What `text` says, for a field of type `hint`; the parts of a tuple stand apart.

    >>> read("1e-3", float), read("None", float | None), read("a b", tuple[str, ...])
    (0.001, None, ('a', 'b'))

    Raises:
      TypeError, ValueError: it says nothing of that type.
    """
    options = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        ordered = sorted(options, key=lambda option: option is not types.NoneType)
        return _first(ordered, lambda option: read(text, option))
    if get_origin(hint) is Literal:
        return fitting(text, hint)
    if get_origin(hint) is tuple:
        return tuple(read(part, options[0]) for part in text.split())
    if hint in (bool, types.NoneType):
        return fitting({"True": True, "False": False, "None": None}.get(text, text), hint)
    return hint(text)


def _first(options: Any, attempt: Any) -> Any:
    for option in options:
        try:
            return attempt(option)
        except (TypeError, ValueError):
            continue
    raise TypeError(options)


def several(hint: Any) -> bool:
    """Whether a value of the type may be a tuple.

    >>> several(tuple[str, ...] | None), several(str)
    (True, False)
    """
    return get_origin(hint) is tuple or any(get_origin(h) is tuple for h in get_args(hint))


def said(hint: Any) -> str:
    """A type as a user would say it.

    >>> said(float | None), said(tuple[str, ...]), said(Literal["a", "b"])
    ('float or None', 'str, several', "'a' or 'b'")
    """
    options = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(said, options))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, options))
    if get_origin(hint) is tuple:
        return f"{said(options[0])}, several"
    return "None" if hint is types.NoneType else str(hint.__name__)
