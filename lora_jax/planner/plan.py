"""Plan a run: compute the costs of its step on each device, and the same for full fine-tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax

from lora_jax.planner import measure, real_compiler
from lora_jax.planner.measure import StepCosts
from lora_jax.planner.options import PlanOptions
from lora_jax.planner.real_compiler import RealDevices
from lora_jax.system.devices import DEVICES
from lora_jax.training import mesh
from lora_jax.training.config import Config, ConfigError, MeshConfig
from lora_jax.training.config_file import workload_of
from lora_jax.training.sizes import is_quantised
from lora_jax.training.workload import Workload

# XLA's host platform believes that 4,096 devices are of two processes, and refuses to compile.
LIMIT = 2048
SIMULATED = "XLA for a CPU, with simulated devices"
LORA, FULL = "lora", "full"  # the run itself, and the same run with every parameter trained


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The shortest possible time of a step: the longest of three times, which hides the others.

    They are seconds: of the products at the peak of the device, of their reads and writes at the
    bandwidth of its memory, and of the collectives at the speed of the links.
    """

    compute: float
    memory: float
    communication: float

    @property
    def seconds(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """The name of the longest of the three times."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan.

    runs: the costs of the run (`LORA`), and of the same run with full fine-tuning (`FULL`).
    compiled: the numbers of devices that were compiled for; if `devices` is not among them, all
      costs are extrapolated.
    first_batch: whether `batch` is the first of the data, so that others may be longer.
    parts: the number of parts that a batch is split into.
    compiler: the compiler, and what it compiled for.
    """

    name: str
    sizes: dict[str, int]
    device: str
    runs: dict[str, StepCosts]
    compiled: tuple[int, ...]
    batch: dict[str, tuple[int, ...]]
    first_batch: bool
    parts: int
    compiler: str

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def extrapolated(self) -> bool:
        return self.devices not in self.compiled

    def fits(self, run: str) -> bool:
        """Return whether the memory of a device is large enough for the run."""
        found = self.runs[run]
        refused = found.program is not None and found.program.refused
        return not refused and found.needs <= DEVICES[self.device].memory

    def roofline(self, run: str) -> Roofline:
        device, found = DEVICES[self.device], self.runs[run]
        communication = sum(t.seconds for t in found.traffic)
        return Roofline(found.flops / device.flops, found.moved / device.bandwidth, communication)


def make(name: str, config: Config, options: PlanOptions, compare: bool = True) -> Plan:
    """Compile the step for the devices of `options`, or for fewer if there are too many.

    Args:
      name: the name of the config.
      config: the run.
      options: the device, and the number of devices.
      compare: whether full fine-tuning is planned, too.

    Returns:
      The plan.

    Raises:
      ConfigError: the mesh does not fit the devices or the batch, or JAX is in use already.
      lora_jax.LoraError: an error that the run itself would raise.
    """
    try:
        sizes = mesh.sizes(config.mesh, options.plan_devices)
    except ConfigError as error:
        raise ConfigError(f"--plan-devices {options.plan_devices}: {error}") from None
    compiled = _compilable(sizes)
    simulated(max(math.prod(s.values()) for s in compiled))
    workload = workload_of(config)
    batch = {name: tuple(x.shape) for name, x in measure.example(workload).items()}
    for entry, shape in batch.items():  # every device must have its rows, as in a run
        if shape:
            mesh.check_rows(entry, shape[0], sizes["data"] * sizes["fsdp"])
    runs = {LORA: _costs(config, workload, options, compiled, sizes)}
    if compare:
        full = config.full_fine_tuning()
        # Full fine-tuning needs all parameters as floats.
        floats = workload_of(full) if is_quantised(workload.params) else workload
        runs[FULL] = _costs(full, floats, options, compiled, sizes)
    numbers = tuple(math.prod(s.values()) for s in compiled)
    first, parts = workload.example is None, config.accumulate
    program = runs[LORA].program
    compiler = SIMULATED if program is None else program.compiler
    return Plan(name, sizes, options.plan_device, runs, numbers, batch, first, parts, compiler)


def _costs(
    config: Config,
    workload: Workload,
    options: PlanOptions,
    compiled: list[dict[str, int]],
    sizes: dict[str, int],
) -> StepCosts:
    """Return the costs of a run on a mesh of `sizes`, extrapolated if `compiled` lacks it."""
    device, count = DEVICES[options.plan_device], math.prod(sizes.values())
    if options.plan_slices > 1:
        device = dataclasses.replace(device, domain=count // options.plan_slices)
    found = []
    for each in compiled:
        of = dataclasses.replace(config, mesh=MeshConfig(**each, rules=config.mesh.rules))
        grid = mesh.make(of.mesh, simulated(math.prod(each.values())))
        with jax.set_mesh(grid):
            found.append(measure.measure(of, workload, grid, device))
    if compiled != [sizes]:
        one, two = (math.prod(each.values()) for each in compiled)
        return measure.extrapolated(found[0], found[1], (one, two, count))
    real = _real(options, count)
    if real is None:
        return found[0]
    grid = mesh.make(of.mesh, real.devices)
    with jax.set_mesh(grid):
        return measure.really(found[0], of, workload, grid, device, real)


def _real(options: PlanOptions, count: int) -> RealDevices | None:
    """Return the devices of the real compiler; None if it is not installed, or not asked for."""
    lacking = real_compiler.missing(options.plan_device)
    if options.plan_compiler == "real" and lacking:
        raise ConfigError(lacking)
    if options.plan_compiler == "simulated" or lacking:
        return None
    return real_compiler.target(options.plan_device, count, options.plan_slices)


def _compilable(sizes: dict[str, int]) -> list[dict[str, int]]:
    """Return the mesh itself, or the two largest with fewer copies that can be simulated.

    >>> _compilable({"data": 64, "fsdp": 8, "tensor": 8})
    [{'data': 16, 'fsdp': 8, 'tensor': 8}, {'data': 32, 'fsdp': 8, 'tensor': 8}]
    """
    if math.prod(sizes.values()) <= LIMIT:
        return [sizes]
    copy = math.prod(sizes.values()) // sizes["data"]
    smaller = [n for n in range(1, LIMIT // copy + 1) if sizes["data"] % n == 0]
    if len(smaller) < 2:
        raise ConfigError(
            f"--plan-devices {math.prod(sizes.values())}: at most {LIMIT} "
            "devices can be simulated; for more, a plan is extrapolated from two smaller values "
            f"of mesh.data that divide it; with fsdp x tensor = {copy} and data = {sizes['data']} "
            "there are none. Make fsdp x tensor smaller"
        )
    return [{**sizes, "data": n} for n in smaller[-2:]]


def simulated(count: int) -> list[Any]:
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
