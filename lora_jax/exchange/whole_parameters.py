"""Parameters that are trained as a whole: PEFT's modules_to_save, biases and trained tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.base import dense
from lora_jax.errors import LoraError
from lora_jax.exchange.axes import stack_first, whole_from_module, whole_to_module
from lora_jax.exchange.module_update import Modules, rotary_order
from lora_jax.exchange.names import NameTable, TensorPlace, written
from lora_jax.layout import Layout


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
    """Return the parameters that a file replaces as a whole, or in single rows, if they differ."""
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
    for name, (numbers, values) in modules.rows.items():
        for place in places_of(table, name):
            if not place.tied:
                _put_rows(own(place.path), place, numbers, values)
    new = {p: x for p, x in found.items() if not np.array_equal(x, np.asarray(dense(leaves[p])))}
    return {path: jnp.asarray(value) for path, value in new.items()}


def _put(into: np.ndarray, place: TensorPlace, value: np.ndarray) -> None:
    entry = place.entry
    if entry.rows is not None:
        value = value[entry.rows[0] : sum(entry.rows)]
    if entry.rotary:
        value = value[rotary_order(len(value), entry.rotary)]
    if any(i >= n for i, n in zip(place.at, into.shape, strict=False)):
        raise LoraError(f"{entry.name!r}: {place.path!r} has no slice {place.at}")
    part = into[place.at]
    if entry.part is None:
        part[...] = whole_from_module(place.path, entry, value, part.shape)
    else:
        slot = (..., slice(entry.part[0], sum(entry.part)))
        part[slot] = whole_from_module(place.path, entry, value, part[slot].shape)


def _put_rows(into: np.ndarray, place: TensorPlace, numbers: Any, values: np.ndarray) -> None:
    if values.shape != (len(numbers), *into.shape[1:]) or max(numbers, default=0) >= len(into):
        raise LoraError(
            f"{place.entry.name!r}: the file has rows {list(numbers)[:5]}... of shape "
            f"{values.shape}, and {place.path!r} has the shape {into.shape}"
        )
    into[list(numbers)] = values


def out_of_parameters(
    whole: Mapping[str, Any], leaves: Mapping[str, Any], table: NameTable, layout: Layout
) -> dict[str, np.ndarray]:
    """Return whole parameters as tensors of modules.

    `leaves` are the base's, for the other rows of a fused module; {} if there is no base.
    """
    found: dict[str, np.ndarray] = {}
    fused: dict[str, list[tuple[tuple[int, int], np.ndarray]]] = {}
    for path, value in whole.items():
        for entry in written(table.entries(path)):
            holes = table.holes(path, entry)
            array = stack_first(layout, path, holes, np.asarray(value))
            for index, tensor in table.tensors(path, entry, array.shape[:holes]):
                x = array[index]
                if entry.part is not None:
                    x = x[..., entry.part[0] : sum(entry.part)]
                x = whole_to_module(path, entry, x)
                if entry.rotary:
                    x = x[np.argsort(rotary_order(len(x), entry.rotary))]
                if entry.rows is None:
                    found[tensor] = x
                else:
                    fused.setdefault(tensor, []).append((entry.rows, x))
    for tensor, rows in fused.items():
        found[tensor] = _fused_value(tensor, rows, leaves, table, layout)
    return found


def _fused_value(
    tensor: str, rows: Any, leaves: Mapping[str, Any], table: NameTable, layout: Layout
) -> np.ndarray:
    """Return the tensor of a fused module; rows that were not trained are the base's."""
    places = [p for p in table.find(tensor) if p.entry.rows is not None]
    total = max(sum(p.entry.rows or (0,)) for p in places)
    out = np.zeros((total, *rows[0][1].shape[1:]), rows[0][1].dtype)
    for (start, size), x in rows:
        out[start : start + size] = x
    done = {span for span, _ in rows}
    for place in places:
        if place.entry.rows in done:
            continue
        if place.path not in leaves:
            raise LoraError(
                f"{tensor!r} holds {place.path!r} too, which was not trained: pass "
                "params=, the base"
            )
        x = np.asarray(dense(leaves[place.path]))
        x = stack_first(layout, place.path, len(place.at), x)[place.at]
        x = whole_to_module(place.path, place.entry, x)
        start, size = place.entry.rows or (0, 0)
        out[start : start + size] = x
    return out
