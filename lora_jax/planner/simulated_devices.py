"""Simulate devices: JAX shows one CPU as many."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

from lora_jax.training.config import ConfigError

# XLA's host platform believes that 4,096 devices are of two processes, and refuses to compile.
LIMIT = 2048


def devices(count: int) -> list[Any]:
    """Return simulated devices. Call this before JAX is used for anything else."""
    with contextlib.suppress(RuntimeError):  # JAX is in use, but may have enough devices
        if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    there = jax.devices("cpu")
    if len(there) < count:
        raise ConfigError(
            f"a plan for {count} devices needs as many simulated ones, but JAX is in use in this "
            f"process already and has {len(there)}: plan in a process of its own, and let "
            "the config file use no device when it is imported"
        )
    return there[:count]
