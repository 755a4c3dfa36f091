"""Parameters that are trained as a whole: PEFT's modules_to_save, and biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.base import dense
from lora_jax.errors import LoraError
from lora_jax.exchange.axes import (
    module_rows,
    rows_there,
    stack_first,
    tensors_of,
    whole_from_module,
    whole_to_module,
)
from lora_jax.exchange.module_update import Modules
from lora_jax.exchange.names import NameTable, TensorPlace, written
from lora_jax.layout import Layout
from lora_jax.models.hf_module import HfModule


def places_of(table: NameTable, tensor: str) -> list[TensorPlace]:
    """Return the places of a file's tensor in the tree."""
    places = table.find(tensor)
    if not places:
        raise LoraError(
            f"the model has no {tensor!r} by the names given; nearest:\n{table.near(tensor)}"
        )
    return places


def is_shared(uses: Any) -> bool:
    """Return whether a parameter is both looked up and multiplied: an embedding and a head."""
    return any(u.lookup for u in uses) and any(u.is_product for u in uses)


def into_parameters(
    modules: Modules, table: NameTable, leaves: Mapping[str, Any], used: Any, layout: Layout
) -> dict[str, Any]:
    """Return the parameters that a file replaces as a whole, if they differ."""
    found: dict[str, np.ndarray] = {}

    def own(path: str) -> np.ndarray:
        if path not in found:
            found[path] = np.array(dense(leaves[path]))
        return found[path]

    for name, value in (*modules.base.items(), *modules.values.items()):
        for place in places_of(table, name):
            shared = place.tied or (is_shared(used[place.path]) and not modules.ties)
            if shared and name in modules.values:
                raise LoraError(
                    f"{name!r} was trained as a whole, and {place.path!r} is the embedding and "
                    "the output head in one; give the model a head of its own (untie it)"
                )
            _put(stack_first(layout, place.path, len(place.at), own(place.path)), place, value)
    new = {p: x for p, x in found.items() if not np.array_equal(x, np.asarray(dense(leaves[p])))}
    return {path: jnp.asarray(value) for path, value in new.items()}


def _put(into: np.ndarray, place: TensorPlace, value: np.ndarray) -> None:
    entry = place.entry
    value = value[rows_there(entry, len(value), entry.name)] if value.ndim else value
    if any(i >= n for i, n in zip(place.at, into.shape, strict=False)):
        raise LoraError(f"{entry.name!r}: {place.path!r} has no slice {place.at}")
    part = into[place.at][_slot(entry)]
    part[...] = whole_from_module(place.path, entry, value, part.shape)


def _slot(entry: HfModule) -> Any:
    """Return the index of a module's part of our parameter."""
    return (...,) if entry.part is None else (..., slice(entry.part[0], sum(entry.part)))


def out_of_parameters(
    whole: Mapping[str, Any], leaves: Mapping[str, Any], table: NameTable, layout: Layout
) -> dict[str, np.ndarray]:
    """Return whole parameters as tensors of modules; `leaves` are the base's, {} without a base."""
    return {
        tensor: tensor_of(tensor, whole, leaves, table, layout)
        for path, value in whole.items()
        for entry in written(table.entries(path))
        for _, tensor in tensors_of(table, layout, path, entry, np.shape(value))
    }


def tensor_of(
    tensor: str,
    whole: Mapping[str, Any],
    leaves: Mapping[str, Any],
    table: NameTable,
    layout: Layout,
) -> np.ndarray:
    """Return a module's tensor: rows that are not in `whole` are the base's, in `leaves`."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for place in table.find(tensor):
        value = whole.get(place.path)
        if place.tied or (value is None and place.entry.rows is None):
            continue
        if value is None and place.path not in leaves:
            raise LoraError(
                f"{tensor!r} holds {place.path!r} too, which was not trained: pass "
                "params=, the base"
            )
        value = np.asarray(dense(leaves[place.path]) if value is None else value)
        x = stack_first(layout, place.path, len(place.at), value)[place.at][_slot(place.entry)]
        x = whole_to_module(place.path, place.entry, x)
        parts.append((module_rows(place.entry, len(x)) if x.ndim else np.array(0), x))
    total = max(int(rows.max(initial=0)) + 1 for rows, _ in parts)
    shape = (total, *parts[0][1].shape[1:]) if parts[0][1].ndim else ()
    out = np.zeros(shape, np.result_type(*(x.dtype for _, x in parts)))
    for rows, x in parts:
        out[rows if x.ndim else ...] = x
    return out
