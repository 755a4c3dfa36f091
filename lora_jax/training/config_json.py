"""A config as JSON: what config.json holds, how two configs are compared, and the hash of one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

INCIDENTAL = ("incidental",)  # the fields that do not change what a run computes
FIXED = ("incidental", "changeable")  # and the ones that a run may change on its way


def to_dict(config: Any) -> Any:
    """Return a config as JSON values; a function becomes `module:name`."""
    if _is_config(config):
        fields = dataclasses.fields(config)
        return {field.name: to_dict(getattr(config, field.name)) for field in fields}
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    if callable(config):
        return f"{config.__module__}:{config.__qualname__}"
    return str(config)


def identity(config: Any) -> dict[str, Any]:
    """Return the fields that decide what a run computes, without values left at their default.

    So a field that a later release adds changes no run's name, nor the folder where it goes on.
    """

    def plain(value: Any) -> Any:
        return identity(value) if _is_config(value) else to_dict(value)

    found = {}
    for field in _fields(config, INCIDENTAL):
        value = plain(getattr(config, field.name))
        if value != plain(field.default):
            found[field.name] = value
    return found


def changes(
    stored: Mapping[str, Any], config: Any, without: Sequence[str] = INCIDENTAL
) -> list[str]:
    """List the fields that differ from a config.json, without the kinds of field `without`.

    A line has the form `path: old -> new`.
    """
    names = [field.name for field in _fields(config, without)]
    theirs, ours = (_comparable(x, config, without) for x in (stored, to_dict(config)))
    return differences({n: theirs.get(n) for n in names}, {n: ours.get(n) for n in names})


def _comparable(values: Mapping[str, Any], config: Any, without: Sequence[str]) -> dict[str, Any]:
    """Return the other fields of a config's values; lists whose order means nothing sorted."""
    found = dict(values)
    for field in dataclasses.fields(config):
        if any(field.metadata.get(kind) for kind in without):
            found.pop(field.name, None)
        value, own = found.get(field.name), getattr(config, field.name)
        if isinstance(value, dict) and _is_config(own):
            found[field.name] = _comparable(value, own, without)
        elif isinstance(value, list) and field.metadata.get("unordered"):
            # The first matching pattern decides the settings, so with settings the order counts.
            # An edited file may hold anything, so it is compared as text.
            ordered = any("@" in str(x) for x in value)
            found[field.name] = value if ordered else sorted(value, key=str)
    return found


def _fields(config: Any, without: Sequence[str]) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(config) if not any(map(f.metadata.get, without))]


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def short_hash(identity: Mapping[str, Any]) -> str:
    """Return eight characters that differ if the `identity` differs."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """List the fields in which two config dictionaries differ, as `path: old -> new`.

    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    ['a.b: 1 -> 3']
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
    found = []
    for key in dict.fromkeys([*old, *new]):
        inner = f"{path}.{key}" if path else key
        found += differences(old.get(key), new.get(key), inner)
    return found
