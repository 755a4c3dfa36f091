"""Measure the costs of a run's step, compiled for a mesh. Nothing is computed or loaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import count
from lora_jax.bases.quantise import bytes_of
from lora_jax.data.process_slice import Shard
from lora_jax.frozen import split
from lora_jax.paths import Tree
from lora_jax.planner import bf16_lowering, collectives, hlo, program, residuals
from lora_jax.planner.collectives import Cause, Collective
from lora_jax.planner.program import CompiledProgram
from lora_jax.planner.real_compiler import RealDevices
from lora_jax.planner.weights import WeightBytes, weight_bytes
from lora_jax.sharding import gathered
from lora_jax.system.devices import Device
from lora_jax.training import initial, mesh, optimizer, step
from lora_jax.training.config import Config
from lora_jax.training.sizes import on_each_device, parameters
from lora_jax.training.state import State
from lora_jax.training.workload import Workload

# Some passes of XLA for CPUs would hide what an accelerator does: they compute 16-bit products in
# float32, and use a library for reductions that keeps its results in float32. The scheduler should
# order the program by memory, not by parallelism.
OPTIONS: dict[str, str | bool] = {
    "xla_disable_hlo_passes": "change-op-data-type",
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """The memory of one device in bytes, by use.

    activations: values that the forward pass keeps for the backward pass.
    temporaries: everything else that the step needs while it runs: gathered weights, gradients.
    """

    weights: float
    adapters: float
    optimizer: float
    batch: float
    activations: float
    temporaries: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a kind and a cause, in one step of one device.

    of: "base" (also there without LoRA), "adapters" (added by LoRA) or "update" (the norm of the
      gradient, the optimizer).
    bytes: of all their operands.
    seconds: at the speed of the device's links, one after the other.
    """

    kind: str
    of: Cause
    times: float
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """The costs of one step, on one device.

    checkpoint_full, checkpoint_trained: bytes of a checkpoint of all parameters, and of the
      trained ones.
    flops, flops_adapters: of all products, and of the low-rank ones among them.
    moved: bytes that these products read and write.
    arrays: every array that a collective moves.
    unknown_loops: loops that count once, because XLA does not know their number of iterations.
    buffers: the largest values of the simulated program.
    program: the program of the device's own compiler. Where there is one, `traffic` and `arrays`
      are its collectives; `bytes` stays the estimate by the simulated program.
    """

    parameters: int
    adapter_parameters: int
    base_parameters_trained: int
    checkpoint_full: int
    checkpoint_trained: int
    bytes: DeviceBytes
    flops: float
    flops_adapters: float
    moved: float
    traffic: tuple[Traffic, ...]
    arrays: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]
    weights: tuple[WeightBytes, ...]
    moments: str
    buffers: tuple[hlo.Buffer, ...]
    program: CompiledProgram | None = None

    @property
    def needs(self) -> float:
        """The bytes that a device must have: as its compiler says, or else the estimate."""
        return self.bytes.total if self.program is None else self.program.needs


def example(workload: Workload) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a whole training batch; if the workload has none, of its first batch."""
    first: Mapping[str, Any] | None = workload.example
    batch = next(workload.train(Shard())) if first is None else first
    return {name: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for name, x in batch.items()}


def prepared(
    config: Config, workload: Workload, grid: jax.sharding.Mesh, device: Device
) -> tuple[Callable[..., Any], mesh.Placement, Tree, tuple[State, Tree, Tree]]:
    """Return a run's step on a mesh, its placement, the parameters and its arguments, by shape."""
    batch = example(workload)
    place = mesh.place(workload, config.mesh, grid, batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, layout, patterns = initial.resolved(config, workload, workload.params, batch, key)
    params = jax.tree.map(_placed, workload.params, place.params)
    base, frozen = split(gathered(params) if device.is_gpu else params, patterns)
    step.check_apart(layout, base)
    tx = optimizer.adamw(optimizer.hyper(config.optimizer, config.steps))
    state = step.shapes(layout, base, tx, key, place, step.adapted_weights(layout, params))
    divided = jax.sharding.NamedSharding(grid, mesh.BATCH)  # the same as in `Placement.batch`
    rows = {name: _placed(x, divided if x.shape else place.whole) for name, x in batch.items()}
    rate = config.adaptation.dropout
    take = step.train_step(workload, layout, tx, config.on_nonfinite, config.accumulate, rate=rate)
    take = step.with_reference(take, workload, layout)
    return take, place, params, (state, frozen, rows)


def measure(
    config: Config, workload: Workload, grid: jax.sharding.Mesh, device: Device
) -> StepCosts:
    """Compile the step of `config` for the simulated devices of `grid`, and measure it."""
    take, place, params, arguments = prepared(config, workload, grid, device)
    state = arguments[0]
    compiled, bfloat16 = _compile(take, place, *arguments)
    text = compiled.as_text()
    module = hlo.parse(text)
    found = collectives.collectives(module)
    arrays = tuple(map(_in_bfloat16, found) if bfloat16 else found)
    products = hlo.products(module)
    floats = {x.dtype for x in jax.tree.leaves(state.optimizer)}
    return StepCosts(
        parameters=parameters(params),
        adapter_parameters=count(state.trained["adapters"]),
        base_parameters_trained=count(state.trained["base"]),
        checkpoint_full=bytes_of(params),
        checkpoint_trained=bytes_of(state.trained),
        bytes=_bytes(compiled, residuals.residual_bytes(module), *arguments),
        flops=sum(p.flops * p.times for p in products),
        flops_adapters=sum(p.flops * p.times for p in products if hlo.LORA in p.origin),
        moved=sum(p.bytes * p.times for p in products),
        traffic=_traffic(arrays, device),
        arrays=arrays,
        unknown_loops=tuple(module.unknown_loops),
        weights=weight_bytes(params),
        moments=", ".join(sorted({str(x) for x in floats if jnp.issubdtype(x, jnp.floating)})),
        buffers=hlo.largest(module, text),
    )


def really(
    costs: StepCosts,
    config: Config,
    workload: Workload,
    grid: jax.sharding.Mesh,
    device: Device,
    target: RealDevices,
) -> StepCosts:
    """Return the costs with the memory and the collectives of the device's own compiler.

    FLOPs and the bytes that products move are still counted in the simulated program: in the real
    one they are inside custom kernels. `grid` is a mesh of the devices of `target`.
    """
    take, place, _, arguments = prepared(config, workload, grid, device)
    traced = jax.jit(take, **step.compilation(arguments[0], place)).trace(*arguments)
    lowered = traced.lower(lowering_platforms=(target.platform,))
    found, module = program.compiled(lowered, target.compiler, device.memory)
    if module is None:
        buffers = found.buffers or costs.buffers
        return dataclasses.replace(costs, program=dataclasses.replace(found, buffers=buffers))
    arrays = tuple(collectives.collectives(module))
    traffic = _traffic(arrays, device)
    return dataclasses.replace(costs, program=found, arrays=arrays, traffic=traffic)


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _compile(take: Any, place: mesh.Placement, *arguments: Any) -> tuple[Any, bool]:
    """Compile the step as `Loop` does; bfloat16 becomes float16 (see `bf16_lowering`)."""
    options = step.compilation(arguments[0], place)
    halved = bf16_lowering.in_float16(take, *arguments)
    if halved is None:
        return jax.jit(take, **options).lower(*arguments).compile(OPTIONS), False
    lowered = jax.jit(halved, **options).lower(*bf16_lowering.shapes(arguments))
    return lowered.compile(OPTIONS), True


def _bytes(compiled: Any, held: int, state: State, frozen: Tree, rows: Tree) -> DeviceBytes:
    """Return the memory: shardings give exact sizes, and XLA the temporaries.

    `peak_memory_in_bytes` is not used, because it leaves out the temporaries under sharding.
    """
    analysis = compiled.memory_analysis()
    fresh = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    needed = analysis.temp_size_in_bytes + fresh
    held = min(held, needed)
    return DeviceBytes(
        weights=on_each_device(frozen) + on_each_device(state.trained["base"]),
        adapters=on_each_device(state.trained["adapters"]),
        optimizer=on_each_device(state.optimizer),
        batch=on_each_device(rows),
        activations=held,
        temporaries=needed - held,
    )


def _in_bfloat16(c: Collective) -> Collective:
    """Rename float16, which was compiled, back to bfloat16."""
    dtype = "bf16" if c.operand.dtype == "f16" else c.operand.dtype
    return dataclasses.replace(c, operand=hlo.Shape(dtype, c.operand.dims))


def _traffic(arrays: tuple[Collective, ...], device: Device) -> tuple[Traffic, ...]:
    sums: dict[tuple[str, Cause], list[float]] = {}
    for c in arrays:
        total = sums.setdefault((c.kind, c.of), [0, 0, 0])
        total[0] += c.times
        total[1] += c.operand.bytes * c.times
        total[2] += seconds(c.kind, c.operand.bytes, c.group, device) * c.times
    order = sorted(sums, key=lambda key: -sums[key][1])
    return tuple(Traffic(kind, of, *sums[kind, of]) for kind, of in order)


def seconds(kind: str, operand: int, group: tuple[int, ...], device: Device) -> float:
    """Return the time of one collective done as a ring.

    >>> from lora_jax.system.devices import DEVICES
    >>> seconds("all-gather", 450_000_000, tuple(range(4)), DEVICES["h100-80gb"])
    0.003
    """
    n = len(group)
    if n == 1:
        return 0.0
    passes = {
        "all-gather": n - 1.0,
        "all-reduce": 2 * (n - 1) / n,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }.get(kind, (n - 1) / n)
    return passes * operand / device.rate(group)


def extrapolated(first: StepCosts, second: StepCosts, at: tuple[int, int, int]) -> StepCosts:
    """Extrapolate the costs of more devices from two measured numbers of devices.

    Each cost is taken as a + b / devices. This is exact for everything that the devices share
    evenly or replicate, with the same batch.
    """
    line = functools.partial(_line, at=at)
    pairs: Mapping[Any, Traffic] = {(t.kind, t.of): t for t in first.traffic}
    traffic = []
    for t in second.traffic:
        before = pairs.get((t.kind, t.of), t)
        numbers = (line(getattr(before, n), getattr(t, n)) for n in ("times", "bytes", "seconds"))
        traffic.append(Traffic(t.kind, t.of, *numbers))
    both = zip(dataclasses.astuple(first.bytes), dataclasses.astuple(second.bytes), strict=True)
    return dataclasses.replace(
        second,
        bytes=DeviceBytes(*(line(x, y) for x, y in both)),
        flops=line(first.flops, second.flops),
        flops_adapters=line(first.flops_adapters, second.flops_adapters),
        moved=line(first.moved, second.moved),
        traffic=tuple(traffic),
        arrays=(),
    )


def _line(x: float, y: float, at: tuple[int, int, int]) -> float:
    """Return the value at 1 / at[2] of the line through (1 / at[0], x) and (1 / at[1], y).

    >>> _line(30.0, 20.0, (1, 2, 4))
    15.0
    """
    one, two, asked = (1 / n for n in at)
    return max(0.0, y + (y - x) * (asked - two) / (two - one))
