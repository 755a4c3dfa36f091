"""The devices of XLA's compilers for TPU and CUDA, which need neither a TPU nor a GPU to compile.

The numbers of `_GPUS` are NVIDIA's, as XLA's own descriptions of its targets have them
(xla/backends/gpu/target_config/specs, Apache-2.0); L4, L40S and RTX 4090 are from NVIDIA's papers
on the Ada architecture. Memory and bandwidth are in `DEVICES`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import math
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from lora_jax.system import extras
from lora_jax.system.devices import DEVICES
from lora_jax.training.config import ConfigError

# Name in DEVICES -> libtpu's name, dimensions of its network, devices that JAX shows for a chip.
_TPUS = {
    "tpu-v4": ("v4", 3, 1),
    "tpu-v5e": ("v5e", 2, 1),
    "tpu-v5p": ("v5p", 3, 1),
    "tpu-v6e": ("v6e", 2, 1),
    "tpu-v7x": ("tpu7x", 3, 2),
}
# libtpu asks for its host, takes a lock as if it drove a chip, and warns about the absence of both.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class _Gpu(NamedTuple):
    capability: tuple[int, int]
    cores: int
    units: int  # float32 units of a core
    threads: int  # of a core
    shared: int  # bytes of a core
    cache: int  # bytes
    clock: float  # GHz


_GPUS = {
    "a100-40gb": _Gpu((8, 0), 108, 64, 2048, 167_936, 41_943_040, 1.41),
    "a100-80gb": _Gpu((8, 0), 108, 64, 2048, 167_936, 41_943_040, 1.41),
    "h100-80gb": _Gpu((9, 0), 132, 128, 2048, 233_472, 52_428_800, 1.98),
    "h200-141gb": _Gpu((9, 0), 132, 128, 2048, 233_472, 52_428_800, 1.98),
    "b200-180gb": _Gpu((10, 0), 148, 128, 2048, 233_472, 132_644_864, 1.965),
    "l4-24gb": _Gpu((8, 9), 58, 128, 1536, 102_400, 50_331_648, 2.04),
    "l40s-48gb": _Gpu((8, 9), 142, 128, 1536, 102_400, 100_663_296, 2.52),
    "rtx4090-24gb": _Gpu((8, 9), 128, 128, 1536, 102_400, 75_497_472, 2.52),
}


@dataclasses.dataclass(frozen=True)
class RealDevices:
    """The devices to compile for; `compiler` names the compiler and the devices for a reader."""

    platform: str
    compiler: str
    devices: tuple[Any, ...]


def missing(device: str) -> str:
    """Return what the compiler of a device lacks here, with the command that installs it, or ""."""
    extra = "plan-tpu" if device in _TPUS else "plan-cuda"
    return extras.missing(extra, f"--plan-compiler real for {device}")


def target(device: str, count: int, slices: int) -> RealDevices:
    """Return `count` devices of a kind, in `slices` that only the data-centre network connects."""
    # A machine with a GPU or TPU of its own is not asked for it: only compilers are needed.
    jax.config.update("jax_platforms", "cpu")
    if device in _TPUS:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        name, options = tpu_topology(device, count, slices)
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        several = f" x {slices} slices" if slices > 1 else ""
        version = importlib.metadata.version("libtpu")
        return RealDevices("tpu", f"libtpu {version} for {name}{several}", tuple(found.devices))
    grid, text = gpu_topology(device, count)
    found = topologies.get_topology_desc(platform="cuda", topology=grid, target_config=text)
    capability = ".".join(map(str, _GPUS[device].capability))
    version = importlib.metadata.version("jax-cuda12-plugin")
    compiler = f"jax-cuda12-plugin {version} for {grid} GPUs of compute capability {capability}"
    return RealDevices("cuda", compiler, tuple(found.devices))


def tpu_topology(device: str, count: int, slices: int) -> tuple[str, dict[str, Any]]:
    """Return libtpu's name of a slice, and the options that it needs.

    >>> tpu_topology("tpu-v5e", 16, 1)[0], tpu_topology("tpu-v5p", 4, 1)[0]
    ('v5e:4x4', 'v5p:2x2x1')
    >>> tpu_topology("tpu-v7x", 64, 2)
    ('tpu7x:2x2x4', {'chips_per_host_bounds': (2, 2, 1), 'num_slices': 2})
    """
    name, dimensions, shown = _TPUS[device]
    chips, rest = divmod(count, slices * shown)
    most = DEVICES[device].domain // shown
    if rest or chips > most:
        raise ConfigError(
            f"--plan-devices {count} --plan-slices {slices}: {device} has slices of at most {most} "
            f"chips, of {shown} devices each; take a multiple of {slices * shown} devices, or set "
            f"--plan-slices to {max(1, math.ceil(count / most / shown))}"
        )
    shape = _grid(chips, dimensions)
    hosts = tuple(2 if size % 2 == 0 else 1 for size in shape[:2])
    options: dict[str, Any] = {"chips_per_host_bounds": (*hosts, 1)}
    if device == "tpu-v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip as one device
    if slices > 1:
        options["num_slices"] = slices
    return f"{name}:{'x'.join(map(str, shape))}", options


def _grid(chips: int, dimensions: int) -> tuple[int, ...]:
    """Return the most compact grid of a number of chips; sizes of 1 come last.

    >>> _grid(8, 2), _grid(4, 3), _grid(128, 3)
    ((2, 4), (2, 2, 1), (4, 4, 8))
    """
    sizes = [n for n in range(1, chips + 1) if chips % n == 0]
    grids = itertools.combinations_with_replacement(sizes, dimensions)
    best = min((g for g in grids if math.prod(g) == chips), key=sum)
    return tuple(sorted(best, key=lambda size: (size == 1, size)))


def gpu_topology(device: str, count: int) -> tuple[str, str]:
    """Return XLA's name of machines with eight GPUs each, and its description of a GPU."""
    machines, rest = divmod(count, 8)
    if machines and rest:
        raise ConfigError(f"--plan-devices {count}: GPUs come eight in a machine; take 1 to 8, 16")
    gpu, known = _GPUS[device], DEVICES[device]
    major, minor = gpu.capability
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    text = f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared - 1024}
  shared_memory_per_core: {gpu.shared}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {int(known.bandwidth)}
  device_memory_size: {known.memory}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{device}"
"""
    return f"{machines}x1x8" if machines else f"1x1x{count}", text
