"""The options of `--plan`, and `--dry-run`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from lora_jax.system.checked import Checked, require
from lora_jax.system.devices import DEVICES


@dataclasses.dataclass(frozen=True)
class PlanOptions(Checked):
    """The options of a plan, which replaces the run."""

    _bounds: ClassVar = {"at least 1": ("plan_devices", "plan_slices")}

    dry_run: bool = False
    """Take one step on the first batch, print its shapes, memory and time, and leave no file."""
    plan: bool = False
    """Plan the run instead of running it: compile its step for the devices of `mesh`, which need
    not exist here, and print the memory, time and network traffic that it needs. No weight is
    read. `--model NAME` plans a well-known model by its shape, such as llama3-8b, with the settings
    of configs/known_shape.py."""
    plan_device: str = "h100-80gb"
    """The device to plan for: a100-40gb, a100-80gb, h100-80gb, h200-141gb, b200-180gb, l4-24gb,
    l40s-48gb, rtx4090-24gb, tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e or tpu-v7x."""
    plan_devices: int | None = None
    """The number of devices. None: the product of the mesh's sizes."""
    plan_slices: int = 1
    """Slices of a pod of TPUs that the devices are divided into; only the data-centre network
    connects them."""
    plan_compiler: Literal["real", "simulated"] | None = None
    """real: the device's own compiler, which runs without the device (pip install
    'lora-jax[plan-tpu]' or 'lora-jax[plan-cuda]'). simulated: XLA's for a CPU. None: real if it is
    installed."""
    plan_file: str | None = None
    """The JSON file for the plan. None: the path of the run directory, followed by .plan.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        device, slices = self.plan_device, self.plan_slices
        require(device in DEVICES, "plan_device", device, f"one of {', '.join(DEVICES)}")
        require(slices == 1 or not DEVICES[device].is_gpu, "plan_slices", slices, "1 for GPUs")
