"""Load arrays from disk, and the bases of tensors that stay quantised.

An array is loaded shard by shard: each process reads the parts of its own devices, each once.
`jax.make_array_from_callback` would read a part twice if two devices hold it (8 calls for 4 parts
on 8 devices), and does not wait for one part before it reads the next.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from lora_jax.base import QuantisedMatrix
from lora_jax.bases.placement import placed
from lora_jax.errors import WeightsError

Index = tuple[slice, ...]  # one slice for each axis, with start and stop

# XLA can use a host buffer that begins at such a multiple without copying it (on CPU).
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class ArrayOnDisk:
    """One array of a quantised tensor; `read` reads the part at an index (slices with start and
    stop)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def whole(self) -> np.ndarray:
        return self.read(tuple(slice(0, size) for size in self.shape))


def in_memory(array: np.ndarray) -> Any:
    """Return an array that has been read already, because it is small."""
    return ArrayOnDisk(array.shape, array.dtype, lambda index: array[index])


def stack(
    layers: Mapping[str, QuantisedMatrix | None], path: str, shape: tuple[int, ...]
) -> QuantisedMatrix:
    """Stack the bases of the tensors of a parameter, by name (None for floats), along the axes
    `shape`, the last one fastest.

    `WeightsError`: layers or experts are quantised in different ways, or some not at all.
    """
    (name, first), *others = layers.items()
    for other, layer in others:
        if _settings(layer) != _settings(first):
            raise WeightsError(
                f"{path} stacks the layers, which are quantised in different ways:\n"
                f"  {name}: {_settings(first)}\n  {other}: {_settings(layer)}\n"
                "Load the model with scan_layers=False, which keeps the layers apart, or with "
                "keep_quantised=False, which expands them."
            )
    bases: list[Any] = list(layers.values())
    for size in reversed(shape):
        groups = [bases[start : start + size] for start in range(0, len(bases), size)]
        bases = [jax.tree.map(lambda *xs: _stacked(xs), *group) for group in groups]
    (whole,) = bases
    return cast(QuantisedMatrix, whole)


def load_base(base: QuantisedMatrix, where: Any) -> QuantisedMatrix:
    """Return the base with its arrays on the devices that `where` gives for each."""
    if where is None:
        where = jax.tree.map(lambda x: None, base)
    arrays, structure = jax.tree.flatten(base)
    places = jax.tree.leaves(where, is_leaf=lambda x: x is None)
    loaded = [load(x.shape, at, _contiguous(x)) for x, at in zip(arrays, places, strict=True)]
    whole: QuantisedMatrix = jax.tree.unflatten(structure, loaded)
    return whole


def shardings(base: QuantisedMatrix, where: Sharding, path: str) -> QuantisedMatrix:
    """Return the sharding of each array of a base, given that of W."""
    if not isinstance(where, NamedSharding):
        return jax.tree.map(lambda x: where, base)
    specs = placed(base, where.spec, where.mesh.shape, path)
    return jax.tree.map(
        lambda spec: NamedSharding(where.mesh, spec, memory_kind=where.memory_kind), specs
    )


def _settings(base: QuantisedMatrix | None) -> str:
    """Return the kind, settings and shapes of a base, which stacked layers must share."""
    if base is None:
        return "floats"
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    given = [f"{name}={x}" for name, x in fields.items() if isinstance(x, str | int | tuple)]
    return f"{type(base).__name__}({', '.join(given)})"


def _stacked(arrays: Sequence[ArrayOnDisk]) -> ArrayOnDisk:
    def read(index: Index) -> np.ndarray:
        return np.stack([array.read(index[1:]) for array in arrays[index[0]]])

    return ArrayOnDisk((len(arrays), *arrays[0].shape), arrays[0].dtype, read)


def _contiguous(array: ArrayOnDisk) -> Callable[[Index], np.ndarray]:
    """Return a function that reads into memory which XLA can use without copying it."""

    def read(index: Index) -> np.ndarray:
        part = array.read(index)
        into = empty(part.shape, array.dtype)
        into[...] = part
        return into

    return read


def load(
    shape: tuple[int, ...], sharding: Sharding | None, read: Callable[[Index], np.ndarray]
) -> jax.Array:
    """Load an array.

    `read` is called once for each part that devices of this process hold, and each part is on its
    devices before the next one is read. It returns a new array that is not changed afterwards.
    Without a sharding, there is one part on the default device.
    """
    if sharding is None:
        return jax.device_put(read(tuple(slice(0, size) for size in shape)))
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        held = [part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True)]
        holders.setdefault(tuple(held), []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        part = read(tuple(slice(*pair) for pair in bounds))
        places = [SingleDeviceSharding(one, memory_kind=sharding.memory_kind) for one in devices]
        # Waits, because parts in transfer would pile up in the host's memory.
        arrays += jax.block_until_ready([jax.device_put(part, where) for where in places])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array that `jax.device_put` need not copy if it is on the CPU."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
