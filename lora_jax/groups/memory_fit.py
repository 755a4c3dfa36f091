"""The number of members that fit into a device's memory, and so the number of groups."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from lora_jax.free_memory import free_memory
from lora_jax.training.config import ConfigError
from lora_jax.training.summary import in_units


@dataclasses.dataclass(frozen=True)
class Fit:
    """Members in as few groups as fit, each of `size` or, the last, of what is left.

    members: how many there are. size: of a group.
    bytes: that a group's step takes on a device. memory: that a device has.
    """

    members: int
    size: int
    bytes: float
    memory: float

    @property
    def groups(self) -> int:
        """How many."""
        return -(-self.members // self.size)

    def __str__(self) -> str:
        members = f"{self.members} member{'s' if self.members > 1 else ''}"
        taken = f"{in_units(self.bytes)} of {in_units(self.memory)}"
        if self.groups == 1:
            return f"{members} in 1 group: {taken}"
        return f"{members} in {self.groups} groups of at most {self.size}: {taken} at a time"


class StepMemory(NamedTuple):
    """Bytes on a device that a compiled step takes.

    bytes: its arguments, its results, and all in between.
    between: of these, what is in between: that is there for the members at once only.
    """

    bytes: float
    between: float = 0.0


def fit(
    needed: StepMemory, shared: float, members: int, memory: float, at_once: int | None = None
) -> Fit:
    """The groups that `members` are trained in.

    Args:
      needed: of the step compiled for `members` of them (`of_step`).
      shared: bytes on a device of what they share, the frozen base.
      members: that the step was compiled for, and that are to be trained.
      memory: bytes that a device has (`available`, or what the user allows).
      at_once: as in `group_step`. None: all.

    Raises:
      ConfigError: not one fits.

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
            "data.batch_size or data.max_length, raise accumulate, set model.remat, or say with "
            "--memory that there is more"
        )
    groups = -(-members // most)
    size = -(-members // groups)
    return Fit(members, size, taken(size), memory)


def of_step(compiled: jax.stages.Compiled) -> StepMemory:
    """What a compiled step says of itself."""
    analysis: Any = compiled.memory_analysis()
    fresh = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    between = float(analysis.temp_size_in_bytes)
    return StepMemory(float(analysis.argument_size_in_bytes + fresh) + between, between)


def available(held: float = 0.0) -> float:
    """Bytes of a device's memory for a step, of which `held` hold its arguments already.

    A CPU's is what the system says is free, divided among the devices that this process simulates.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is not None and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return held + free_memory() / jax.local_device_count()
