"""Simulated devices: one CPU that JAX shows as many."""

from __future__ import annotations

import math
from typing import Any

import jax

from lora_jax.training.config import ConfigError, MeshConfig

# XLA's host platform takes 4,096 devices for those of two processes, and refuses to compile.
LIMIT = 2048


def sizes(config: MeshConfig, count: int | None) -> dict[str, int]:
    """The mesh of `count` devices; without a count, -1 stands for 1.

    >>> sizes(MeshConfig(data=-1, fsdp=4, tensor=2), 32)
    {'data': 4, 'fsdp': 4, 'tensor': 2}

    Raises:
      ConfigError: the sizes do not multiply to the count.
    """
    asked = {axis: getattr(config, axis) for axis in ("data", "fsdp", "tensor")}
    fixed = math.prod(size for size in asked.values() if size != -1)
    count = fixed if count is None else count
    found = {axis: count // fixed if size == -1 else size for axis, size in asked.items()}
    if math.prod(found.values()) != count:
        named = ", ".join(f"{axis} {size}" for axis, size in asked.items())
        raise ConfigError(
            f"--plan-devices {count} is not the product of mesh ({named}); give another number, "
            "or -1 for one of the sizes"
        )
    return found


def devices(count: int) -> list[Any]:
    """`count` simulated devices. They must be made before JAX is used for anything else.

    Raises:
      ConfigError: JAX has been used already, and has fewer.
    """
    try:
        if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        pass  # JAX is in use; it may have enough of them
    there = jax.devices("cpu")
    if len(there) < count:
        raise ConfigError(
            f"a plan for {count} devices needs so many simulated ones, and JAX, which is in use "
            f"in this process already, has {len(there)}: plan in a process of its own, and let "
            "the config file use no device when it is imported"
        )
    return there[:count]
