"""From an Adapter to the updates of modules: the layout knows the axes, the table the names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import paths
from lora_jax.adapters import Adapter, as_factors, check
from lora_jax.base import dense
from lora_jax.errors import LoraError
from lora_jax.exchange import kind_arrays
from lora_jax.exchange.axes import a_to_module, layer_of, module_rows, rows_of
from lora_jax.exchange.module_update import Modules, ModuleUpdate, fuse, twin_of
from lora_jax.exchange.names import NameTable, written
from lora_jax.exchange.whole_parameters import out_of_parameters
from lora_jax.layout import Layout
from lora_jax.models.hf_module import HfModule, HfNames
from lora_jax.spec import Target
from lora_jax.updates import Directed, Factors, Rows, kind_of
from lora_jax.updates.tokens import row_numbers

Pieces = dict[str, list[tuple[HfModule, Any]]]  # tensor's name -> its pieces


def out_of_adapter(
    names: HfNames | None, adapter: Adapter, params: Any = None
) -> tuple[NameTable, Modules]:
    """Return an adapter as updates of modules, and the table of its parameters.

    Differences of biases need `params`, the base; the table then has all parameters.
    """
    layout, adapters, trainable = Adapter(*adapter)
    check(layout, adapters)
    if waiting := [t.path for t in layout.targets if kind_of(t).activated]:
        raise LoraError(
            f"{waiting[0]!r} is on from an invocation on, which only a PEFT folder can say: "
            "lora_jax.exchange.peft.save(..., invocation=the tokens)"
        )
    shapes = {t.path: t.shape for t in layout.targets}
    shapes |= {path: np.shape(x) for path, x in trainable.items()}
    table = NameTable(names, shapes) if params is None else NameTable.of(names, params)
    leaves = {} if params is None else paths.flatten(params)
    if params is not None:
        layout.check_params(leaves)
    pieces: Pieces = {}
    rows: dict[str, Any] = {}
    whole = dict(trainable)
    biases: dict[str, Any] = {}
    for target in layout.targets:
        if not target.inputs:
            delta = np.asarray(kind_of(target).delta(target, adapters[target.path]))
            if params is None:
                biases[target.path] = delta
            else:
                w = np.asarray(dense(leaves[target.path]))
                whole[target.path] = (w.astype(np.float32) + delta).astype(w.dtype)
            continue
        if isinstance(adapters[target.path], Rows):
            base = whole.get(target.path, leaves.get(target.path))
            rows |= _absolute_rows(target, adapters[target.path], table, base)
            continue
        _add_updates(pieces, target, adapters[target.path], table)
    updates = {
        tensor.removesuffix(".weight"): _module(tensor, found, table)
        for tensor, found in pieces.items()
    }
    tied = [(entry, name) for entry, name in _tied(layout, table) if name in updates]
    for entry, name in tied:
        updates[entry.tied] = twin_of(updates[name])
    _add_biases(updates, biases, layout, table)
    values = out_of_parameters(whole, leaves, table, layout)
    return table, Modules(updates, values, rows=rows, ties=bool(tied))


def _absolute_rows(target: Target, parameters: Rows, table: NameTable, w: Any) -> dict[str, Any]:
    """Return the values of trained rows, which files have in the place of differences."""
    if w is None:
        raise LoraError(
            f"{target.path!r} has trained rows, which are differences here and values in files: "
            "pass params=, the base"
        )
    numbers = row_numbers(target)
    values = np.asarray(dense(w), np.float32)[numbers] + np.asarray(parameters.delta)
    entries = written(table.entries(target.path))
    tensors = [name for e in entries for _, name in table.tensors(target.path, e, ())]
    return dict.fromkeys(tensors, (numbers, values))


def _add_updates(pieces: Pieces, target: Target, parameters: Any, table: NameTable) -> None:
    """Add the update of every slice of the stack, for every module of the parameter."""
    directed = isinstance(parameters, Directed)
    rescales = kind_of(target).rescales
    if not rescales and not target.parts:
        layout, adapters = as_factors(Layout((target,)), {target.path: parameters})
        (target,), parameters = layout.targets, adapters[target.path]
    kind = kind_of(target)
    if kind.rescales and not directed:
        stack = target.sizes(target.stack)
        for entry in written(table.entries(target.path)):
            for index, tensor in table.tensors(target.path, entry, stack):
                own = kind_arrays.out_of_target(target, entry, parameters, index)
                pieces.setdefault(tensor, []).append((entry, ModuleUpdate(None, None, own=own)))
        return
    factors = kind.factors(target, parameters)
    assert factors is not None  # as_factors refuses kinds without factors
    arrays = jax.tree.map(np.asarray, Factors(*factors))
    stack = target.sizes(target.stack)
    a = arrays.a.reshape(*stack, target.fan_in, -1)
    b = arrays.b.reshape(*stack, a.shape[-1], target.fan_out)
    lengths = None
    if directed:
        lengths = np.asarray(parameters.magnitude).reshape(*stack, target.fan_out)
    ours = max(target.inputs) < min(target.outputs)  # whether W is [in, out]
    for entry in written(table.entries(target.path)):
        layer = layer_of(target, entry)
        rows = rows_of(target, entry)
        columns = _own_columns(target, entry, a.shape[-1])
        if not len(columns):
            continue
        for index, tensor in table.tensors(target.path, entry, stack):
            update = ModuleUpdate(
                a_to_module(target, layer, a[index][:, columns]),
                b[index][columns][:, rows].T,
                _alpha(target, len(columns)),
                target.scaling,
                None if lengths is None else lengths[index][rows],
                layer=layer or "linear",
                stored_in_out=ours and entry.transposed is False,
            )
            pieces.setdefault(tensor, []).append((entry, update))


def _alpha(target: Target, rank: int) -> float:
    """Return the alpha that gives the target's scale at the rank to write."""
    if rank == target.rank:
        return float(target.alpha)
    return target.scale * (rank if target.scaling == "alpha/r" else math.sqrt(rank))


def _own_columns(target: Target, entry: HfModule, rank: int) -> np.ndarray:
    """Return the ranks that a module needs: all, or the ranks of the parts that it has."""
    if not target.parts:
        return np.arange(rank)
    axis = target.part_axis % len(target.outputs)
    numbers = np.arange(len(target.parts))
    if entry.part is not None and entry.axis % len(target.outputs) == axis:
        start, stop = entry.part[0], sum(entry.part)
        numbers = np.array(
            [i for i, (at, size) in enumerate(target.parts) if at < stop and at + size > start], int
        )
    return np.concatenate(
        [np.arange(i * target.rank, (i + 1) * target.rank) for i in numbers] or [np.arange(0)]
    )


def _module(tensor: str, found: list[tuple[HfModule, ModuleUpdate]], table: NameTable) -> Any:
    """Return the update of one module, fused if several parameters are its rows."""
    if any(update.own is not None for _, update in found):
        if len(found) > 1 or found[0][0].rows is not None:
            raise LoraError(
                f"several parameters are rows of {tensor!r}, and only plain factors can be fused; "
                "merge the adapter"
            )
        return found[0][1]
    places = [(module_rows(entry, len(update.b)), update) for entry, update in found]
    if len(found) == 1 and found[0][0].rows is None:
        return found[0][1].of_rows(np.argsort(places[0][0]))
    if any(entry.rows is None for entry, _ in found):
        raise LoraError(f"several parameters are {tensor!r}; say which rows of it each is")
    known = [place.entry.rows for place in table.find(tensor)]
    total = max(sum(rows) for rows in known if rows is not None)
    try:
        return fuse(places, total)
    except LoraError as error:
        raise LoraError(f"{tensor!r}: {error}") from error


def _tied(layout: Layout, table: NameTable) -> list[tuple[HfModule, str]]:
    """Return the embeddings that the output head shares, with the module's name."""
    found = []
    for target in layout.targets:
        if not target.inputs:
            continue
        for entry in table.entries(target.path):
            if entry.tied:
                if kind_of(target).rescales:
                    raise LoraError(
                        f"{target.path!r} is the embedding and the output head in one, adapted by "
                        f"the kind {target.kind!r}: the two are rescaled along different axes, "
                        "which no file can say"
                    )
                found.append((entry, entry.tensor(target.path).removesuffix(".weight")))
    return found


def _add_biases(
    updates: dict[str, ModuleUpdate], biases: Mapping[str, Any], layout: Layout, table: NameTable
) -> None:
    """Add differences of biases to the updates of their modules; without the base, PEFT has no
    other place for them.
    """
    for path, delta in biases.items():
        target = layout[path]
        stack = target.sizes(target.stack)
        for entry in written(table.entries(path)):
            for index, tensor in table.tensors(path, entry, stack):
                module = tensor.removesuffix(".bias")
                if module not in updates or entry.rows is not None:
                    raise LoraError(
                        f"{path!r} is trained by a difference, and its module {module!r} has no "
                        "factors to carry it: pass params=, the base that it was trained on"
                    )
                value = delta.reshape(*stack, -1)[index][rows_of(target, entry)]
                value = value[np.argsort(module_rows(entry, len(value)))]
                update = updates[module]
                updates[module] = update._replace(bias=value / np.float32(update.scale))
