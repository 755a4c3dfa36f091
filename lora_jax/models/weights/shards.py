"""Load an array shard by shard: each process reads the parts of its own devices, each once.

`jax.make_array_from_callback` would read a part twice if two devices hold it (8 calls for 4 parts
on 8 devices), and does not wait for one part before it reads the next.
"""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

Index = tuple[slice, ...]  # one slice for each axis, with start and stop

# XLA can use a host buffer that begins at such a multiple without copying it (on CPU).
_ALIGNMENT = 64


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
