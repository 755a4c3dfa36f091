"""Simulated devices: one CPU that JAX shows as many."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

from lora_jax.training.config import ConfigError

# XLA's host platform takes 4,096 devices for those of two processes, and refuses to compile.
LIMIT = 2048


def devices(count: int) -> list[Any]:
    """`count` simulated devices. They must be made before JAX is used for anything else.

    Raises:
      ConfigError: JAX has been used already, and has fewer.
    """
    with contextlib.suppress(RuntimeError):  # JAX is in use; it may have enough of them
        if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    there = jax.devices("cpu")
    if len(there) < count:
        raise ConfigError(
            f"a plan for {count} devices needs so many simulated ones, and JAX, which is in use "
            f"in this process already, has {len(there)}: plan in a process of its own, and let "
            "the config file use no device when it is imported"
        )
    return there[:count]
