"""Compute how many members fit into a device's memory, and so the number of groups."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from lora_jax.system import host_memory
from lora_jax.training.config import ConfigError
from lora_jax.training.sizes import in_units


@dataclasses.dataclass(frozen=True)
class Fit:
    """A division of members into as few groups as fit, of equal size except for the last.

    The step of a group of `size` members takes `bytes` on a device.
    """

    members: int
    size: int
    bytes: float
    memory: float

    @property
    def groups(self) -> int:
        return -(-self.members // self.size)

    def __str__(self) -> str:
        members = f"{self.members} member{'s' if self.members > 1 else ''}"
        taken = f"{in_units(self.bytes)} of {in_units(self.memory)}"
        if self.groups == 1:
            return f"{members} in 1 group: {taken}"
        return f"{members} in {self.groups} groups of at most {self.size}: {taken} at a time"


class StepMemory(NamedTuple):
    """The bytes on a device that a compiled step takes.

    bytes: its arguments, its results and its temporaries.
    between: the temporaries, which exist only for members that are computed at the same time.
    """

    bytes: float
    between: float = 0.0


def fit(
    needed: StepMemory, shared: float, members: int, memory: float, at_once: int | None = None
) -> Fit:
    """Divide members into groups that fit into memory.

    >>> print(fit(StepMemory(9e9), 1e9, members=16, memory=8e9))
    16 members in 2 groups of at most 8: 5.00 GB of 8.00 GB at a time
    """
    at_once = members if at_once is None else at_once
    own = max(needed.bytes - needed.between - shared, 0) / members

    def taken(size: int) -> float:
        return shared + size * own + needed.between * min(size, at_once) / at_once

    most = max((size for size in range(1, members + 1) if taken(size) <= memory), default=0)
    if most < 1:
        raise ConfigError(
            f"one member needs {in_units(taken(1))}, and there are {in_units(memory)}. Lower "
            "data.batch_size or data.max_length, raise accumulate, set model.remat, or give a "
            "larger --memory"
        )
    groups = -(-members // most)
    size = -(-members // groups)
    return Fit(members, size, taken(size), memory)


def of_step(compiled: jax.stages.Compiled) -> StepMemory:
    """Return the memory of a compiled step, as XLA reports it."""
    analysis: Any = compiled.memory_analysis()
    fresh = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    between = float(analysis.temp_size_in_bytes)
    return StepMemory(float(analysis.argument_size_in_bytes + fresh) + between, between)


def available(held: float = 0.0) -> float:
    """Return the bytes of a device's memory for a step.

    On a CPU it is the memory that is free, divided among the devices that this process simulates.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is not None and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return held + host_memory.free() / jax.local_device_count()
