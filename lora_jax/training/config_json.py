"""A config as JSON: what config.json holds, how two configs are compared, and the hash of one.

A stored config may be of an earlier release. `RENAMED` lists the fields that had another name then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Field of config.json or summary.json by its first name -> its name today. Files have the new
# name, old files are read by `upgrade`; hashes and folder names use the first name for ever.
RENAMED = {"lora.beside": "lora.trainable", "beside_parameters": "trainable_parameters"}
_FIRST = {new: first for first, new in RENAMED.items()}


def upgrade(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json or summary.json under the names of today.

    >>> upgrade({"lora": {"beside": None}, "beside_parameters": 3})
    {'lora': {'trainable': None}, 'trainable_parameters': 3}
    """
    return _renamed(stored, RENAMED)


def first_name(path: str) -> str:
    """Return the first name that the field at a dotted path has had."""
    return _FIRST.get(path, path)


def _renamed(values: Mapping[str, Any], names: Mapping[str, str], prefix: str = "") -> Any:
    found = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        new = names.get(path, path).rpartition(".")[2]
        found[new] = _renamed(value, names, f"{path}.") if isinstance(value, dict) else value
    return found


def to_dict(config: Any) -> Any:
    """Return a config as JSON values; a function is written `module:name`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
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
    """Return the values that decide what a run computes: all but the incidental fields."""
    left_out = {f.name for f in dataclasses.fields(config) if f.metadata.get("incidental")}
    left_out |= {name for name, value in _later(config).items() if getattr(config, name) == value}
    return {name: value for name, value in to_dict(config).items() if name not in left_out}


def changes(stored: Mapping[str, Any], config: Any) -> list[str]:
    """List the values that decide what a run computes and differ from those of a stored config.

    Args:
      stored: config.json; an old one has old names and lacks the fields that came later.
    """
    stored = upgrade(stored)
    defaults = {name: to_dict(value) for name, value in _later(config).items()}
    ours = {**defaults, **identity(config)}
    return differences({name: stored.get(name, defaults.get(name)) for name in ours}, ours)


def _later(config: Any) -> dict[str, Any]:
    """The fields that came later, with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(config) if f.metadata.get("later")}


def stable_identity(config: Any) -> dict[str, Any]:
    """Return `identity` under the first names of the fields, so that a new name changes no hash."""
    found: dict[str, Any] = _renamed(identity(config), _FIRST)
    return found


def short_hash(identity: Mapping[str, Any]) -> str:
    """Return eight characters that differ when the `stable_identity` does."""
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
