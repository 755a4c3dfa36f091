"""Tensors that stay quantised: bases whose arrays are on the disk, and how they are loaded."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from lora_jax.bases.matrix import QuantisedMatrix
from lora_jax.bases.placement import placed
from lora_jax.models.errors import WeightsError
from lora_jax.models.weights import shards
from lora_jax.models.weights.shards import Index


@dataclasses.dataclass(frozen=True)
class ArrayOnDisk:
    """One array of a quantised tensor.

    Attributes:
        read: the part at an index (a slice with start and stop for each axis).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def whole(self) -> np.ndarray:
        return self.read(tuple(slice(0, size) for size in self.shape))


def in_memory(array: np.ndarray) -> Any:
    """An array that is so small that it was read already."""
    return ArrayOnDisk(array.shape, array.dtype, lambda index: array[index])


def stack(
    layers: Mapping[str, QuantisedMatrix | None], path: str, shape: tuple[int, ...]
) -> QuantisedMatrix:
    """Return the base of a parameter, given that of each tensor that it is made of, by name.

    Args:
        shape: of the axes that they are stacked to, the last one fastest.

    Raises:
        WeightsError: layers or experts that are quantised in different ways, or some of them not
            at all.
    """
    (name, first), *others = layers.items()
    for other, layer in others:
        if _form(layer) != _form(first):
            raise WeightsError(
                f"{path} stacks the layers, which are quantised in different ways:\n"
                f"  {name}: {_form(first)}\n  {other}: {_form(layer)}\n"
                "Load the model with scan_layers=False, which keeps the layers apart, or with "
                "keep_quantised=False, which expands them."
            )
    bases: list[Any] = list(layers.values())
    for size in reversed(shape):
        groups = [bases[start : start + size] for start in range(0, len(bases), size)]
        bases = [jax.tree.map(lambda *xs: _stacked(xs), *group) for group in groups]
    (whole,) = bases
    return cast(QuantisedMatrix, whole)


def load(base: QuantisedMatrix, where: Any) -> QuantisedMatrix:
    """Return the base with its arrays on the devices, each where `where` says."""
    if where is None:
        where = jax.tree.map(lambda x: None, base)
    arrays, structure = jax.tree.flatten(base)
    places = jax.tree.leaves(where, is_leaf=lambda x: x is None)
    loaded = [
        shards.load(x.shape, at, _contiguous(x)) for x, at in zip(arrays, places, strict=True)
    ]
    whole: QuantisedMatrix = jax.tree.unflatten(structure, loaded)
    return whole


def shardings(base: QuantisedMatrix, where: Sharding, path: str) -> QuantisedMatrix:
    """The sharding of each array, given that of W."""
    if not isinstance(where, NamedSharding):
        return jax.tree.map(lambda x: where, base)
    specs = placed(base, where.spec, where.mesh.shape, path)
    return jax.tree.map(
        lambda spec: NamedSharding(where.mesh, spec, memory_kind=where.memory_kind), specs
    )


def _form(base: QuantisedMatrix | None) -> str:
    """The kind of a base, its settings and shapes: what layers have in common to be stacked."""
    if base is None:
        return "floats"
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    settings = [f"{name}={x}" for name, x in fields.items() if isinstance(x, str | int | tuple)]
    return f"{type(base).__name__}({', '.join(settings)})"


def _stacked(arrays: Sequence[ArrayOnDisk]) -> ArrayOnDisk:
    def read(index: Index) -> np.ndarray:
        return np.stack([array.read(index[1:]) for array in arrays[index[0]]])

    return ArrayOnDisk((len(arrays), *arrays[0].shape), arrays[0].dtype, read)


def _contiguous(array: ArrayOnDisk) -> Callable[[Index], np.ndarray]:
    """Reads into memory that XLA can take over without copying it."""

    def read(index: Index) -> np.ndarray:
        part = array.read(index)
        into = shards.empty(part.shape, array.dtype)
        into[...] = part
        return into

    return read
