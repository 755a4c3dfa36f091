"""The axes of a parameter in our layout and in a module, which has PyTorch's [out, in].

The functions come in pairs that are each other's inverse.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax.errors import LoraError
from lora_jax.exchange.names import NameTable
from lora_jax.layout import Layout
from lora_jax.models.hf_module import HfModule
from lora_jax.spec import Target


def stack_axes(layout: Layout, path: str, count: int) -> tuple[int, ...]:
    """Return the `count` stack axes of a parameter: its own, or else the usual ones."""
    known = {t.path: t.stack for t in layout.targets if len(t.stack) == count}
    usual = collections.Counter(known.values()).most_common(1)
    return known.get(path, usual[0][0] if usual else tuple(range(count)))


def tensors_of(
    table: NameTable, layout: Layout, path: str, entry: HfModule, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield the tensor's name for each index along the stack axes of a parameter."""
    axes = stack_axes(layout, path, table.holes(path, entry))
    return table.tensors(path, entry, [shape[i] for i in axes])


def stack_first(layout: Layout, path: str, count: int, value: np.ndarray) -> np.ndarray:
    """Return a view of a parameter with its stack axes in front."""
    return np.moveaxis(value, stack_axes(layout, path, count), range(count))


def layer_of(target: Target, entry: HfModule) -> str:
    """Return the layer of a module; one with several input axes has to say it."""
    layer = entry.layer_of(target.path)
    if not layer and len(target.inputs) > 1:
        raise LoraError(
            f"{target.path!r} has the input axes {target.inputs} of {target.shape}, and "
            "nothing says whether they are heads or the window of a convolution: name it as "
            f"HfModule({entry.name!r}, layer='linear'), or layer='conv'"
        )
    return layer


def input_order(target: Target, layer: str) -> tuple[int, ...]:
    """Return the input axes of W in the module's order: a convolution has the channels first."""
    if layer != "conv":
        return target.inputs
    channels = [i for i in target.inputs if {i - 1, i + 1} & set(target.outputs)]
    if len(channels) != 1:
        raise LoraError(
            f"{target.path!r} of shape {target.shape} is not the kernel of a convolution: its "
            f"channels are the input axis next to the output axis, and the inputs are "
            f"{target.inputs}, the outputs {target.outputs}"
        )
    return (*channels, *(i for i in target.inputs if i not in channels))


def a_from_module(target: Target, layer: str, a: np.ndarray) -> np.ndarray:
    """Convert [rank, in] (or a convolution's [rank, in, *window]) to [fan_in, rank]."""
    order = input_order(target, layer)
    wanted = target.sizes(order)
    if layer == "conv" and a.shape[1:] != wanted:
        raise LoraError(
            f"{target.path!r}: the file has a convolution of [in, *window] = {a.shape[1:]}, the "
            f"model of {wanted} (a convolution in groups cannot be read: PEFT's first factor sees "
            "all channels)"
        )
    if math.prod(a.shape[1:]) != target.fan_in:
        raise LoraError(
            f"{target.path!r} has {target.fan_in} inputs, the file {math.prod(a.shape[1:])}"
        )
    x = a.reshape(len(a), *wanted)
    back = [order.index(i) for i in target.inputs]
    return np.moveaxis(x.transpose(0, *(1 + i for i in back)), 0, -1).reshape(target.fan_in, -1)


def a_to_module(target: Target, layer: str, a: np.ndarray) -> np.ndarray:
    """Convert [fan_in, rank] to the module's form: the inverse of `a_from_module`."""
    order = input_order(target, layer)
    x = a.reshape(*target.sizes(target.inputs), -1)
    x = np.moveaxis(x, -1, 0)
    x = x.transpose(0, *(1 + target.inputs.index(i) for i in order))
    return x if layer == "conv" else x.reshape(len(x), target.fan_in)


def rows_of(target: Target, entry: HfModule) -> np.ndarray:
    """Return the indices of W's output rows that form a module, in our order."""
    rows = np.arange(target.fan_out).reshape(target.sizes(target.outputs))
    if entry.part is None:
        return rows.ravel()
    start, size = entry.part
    axis = entry.axis % rows.ndim
    if start + size > rows.shape[axis]:
        raise LoraError(
            f"{target.path!r}: the names say that {entry.name!r} is the part {entry.part} of an "
            f"output axis of size {rows.shape[axis]}"
        )
    return rows.take(range(start, start + size), axis).ravel()


def module_rows(entry: HfModule, count: int) -> np.ndarray:
    """Return the row of the module for each of our `count` rows, in our order.

    So `ours = theirs[rows]`, and `theirs[rows] = ours` is the inverse.
    """
    order = rotary_order(count, entry.rotary) if entry.rotary else np.arange(count)
    return order if entry.rows is None else entry.rows[0] + order


def rows_there(entry: HfModule, total: int, name: str) -> np.ndarray:
    """Return `module_rows` of a module that has `total` rows in a file."""
    if entry.rows is not None and sum(entry.rows) > total:
        raise LoraError(f"{name!r} has {total} output rows; the names say {entry.rows}")
    return module_rows(entry, total if entry.rows is None else entry.rows[1])


def rotary_order(rows: int, head: int) -> np.ndarray:
    """Return the indices that sort rows of half-split rotary pairs into interleaved order.

    Row 2i of a head is its row i, and row 2i + 1 its row i + head / 2.

    >>> rotary_order(8, 4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    if head % 2 or rows % head:
        raise LoraError(f"rotary={head}: {rows} output rows are not heads of this (even) size")
    return np.arange(rows).reshape(-1, 2, head // 2).swapaxes(1, 2).reshape(rows)


def whole_from_module(
    path: str, entry: HfModule, value: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Return a module's whole weight or bias as (a slice of) our parameter, in the given shape."""
    if value.ndim > 1 and entry.is_transposed(path):
        axes = (*range(2, value.ndim), 1, 0)  # [out, in, *window] to [*window, in, out]
        value = value.transpose(axes)
    if value.shape != shape and (value.ndim > 2 or value.size != math.prod(shape)):
        raise LoraError(
            f"{entry.name!r} is stored with the shape {value.shape} (in our order), and the "
            f"parameter {path!r} has {shape}"
        )
    return value.reshape(shape)


def whole_to_module(path: str, entry: HfModule, value: Any) -> np.ndarray:
    """Return our parameter in the module's form: the inverse of `whole_from_module`."""
    value = np.asarray(value)
    if value.ndim < 2 or not entry.is_transposed(path):
        return value
    if value.ndim > 2 and entry.layer_of(path) != "conv":
        raise LoraError(
            f"{path!r} of shape {value.shape} was trained as a whole, and nothing says which of "
            "its axes are inputs; reshape it to [in, out] before it is saved, or say "
            f"HfModule({entry.name!r}, layer='conv') if it is a convolution"
        )
    return value.transpose(value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
