"""The base that adapters share: its reference, its settings, and how it was changed before them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import LoraError, listed
from lora_jax.models.weights.source import is_safe

# The settings on which all adapters of a base must agree, and the check of their values.
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "reference": lambda value: isinstance(value, str) and value.isprintable(),
    "scan_layers": lambda value: isinstance(value, bool),
    "dtype": lambda value: value in ("float32", "bfloat16"),
    "param_dtype": lambda value: value in ("float32", "bfloat16"),
}


def model_settings(member: SavedAdapter) -> dict[str, Any]:
    """Return the settings of the base in an adapter's notes, perhaps none, after checking them."""
    for name, fits in _SETTINGS.items():
        if name in member.model and not fits(member.model[name]):
            raise LoraError(
                f"{member.folder} says model.{name} is {str(member.model[name])[:80]!r}"
            )
    return {name: member.model[name] for name in _SETTINGS if name in member.model}


def shared_settings(
    members: Sequence[SavedAdapter], base: str | None, trust_base: bool
) -> dict[str, Any]:
    """Return the reference of the base, and the model settings that all adapters agree on."""
    found: dict[str, tuple[Any, str]] = {} if base is None else {"reference": (base, "--base")}
    for member in members:
        for name, value in model_settings(member).items():
            if name == "reference" and base is not None:
                continue
            first, by = found.setdefault(name, (value, member.name))
            if first != value:
                cure = ", or name one base for all with --base" if name == "reference" else ""
                raise LoraError(
                    f"the adapters do not share one model: model.{name} is {first!r} for {by!r} "
                    f"and {value!r} for {member.name!r}; open them one by one{cure}"
                )
    whose = listed(f"{member.name}: {member.folder}" for member in members)
    if "reference" not in found:
        silent = f"\nThese adapters do not say what they were trained on:\n{whose}"
        raise LoraError(
            "no base: name it with --base, in the form that configs have in model.reference"
            + (silent if members else "")
        )
    settings = {name: value for name, (value, _) in found.items()}
    reference = settings["reference"]
    if base is None and not trust_base and not is_safe(reference):
        raise LoraError(
            f"the base {reference!r} is named only by the adapters, and would be downloaded:\n"
            f"{whose}\nAn adapter may come from anyone, so its base is downloaded only if you name "
            "it, or trust the adapter:\n"
            f"  --base {shlex.quote(reference)}\n  --trust-base"
        )
    return settings


def shared_recipe(members: Sequence[SavedAdapter]) -> Mapping[str, Any] | None:
    """Return the recipe by which the base of all adapters was quantised, or None."""
    recipes = {member.name: member.recipe for member in members}
    first = next(iter(recipes.values()), None)
    for name, recipe in recipes.items():
        if recipe != first:
            raise LoraError(
                f"the adapters do not share one base: {next(iter(recipes))!r} and {name!r} were "
                "trained on bases that were quantised differently; open them one by one"
            )
    return first


def shared_change(members: Sequence[SavedAdapter]) -> Any:
    """Return the method that changed the base of all adapters before training, or None."""
    found = {(member.changed_by, member.layout) for member in members}
    methods = {method for method, _ in found}
    if methods <= {None}:
        return None
    if len(found) > 1:
        raise LoraError(
            f"the adapters do not share one base: each method ({listed(map(str, methods))}) and "
            "each set of targets begins with a base of its own; open them one by one"
        )
    return methods.pop()
