"""Write the plan of a run as text for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from lora_jax.planner.collectives import Collective
from lora_jax.planner.devices import DEVICES
from lora_jax.planner.measure import StepCosts
from lora_jax.planner.plan import FULL, LORA, Plan
from lora_jax.planner.weights import FLOATS, by_part
from lora_jax.system.table import aligned
from lora_jax.system.whole_files import write_json
from lora_jax.training.sizes import in_units

FORMAT = 1
CAUSES = {
    "base": "of the frozen model",
    "adapters": "added by LoRA",
    "update": "of the update",
}


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values; bytes, FLOPs and seconds are per device and step."""
    device = DEVICES[plan.device]
    return {
        "format": FORMAT,
        "config": plan.name,
        "mesh": plan.sizes,
        "devices": plan.devices,
        "compiled_for": list(plan.compiled),
        "extrapolated": plan.extrapolated,
        "first_batch": plan.first_batch,
        "batch": {name: list(shape) for name, shape in plan.batch.items()},
        "accumulate": plan.parts,
        "device": {"name": plan.device, **dataclasses.asdict(device)},
        "runs": {run: _run(plan, run) for run in plan.runs},
        "notes": notes(plan),
    }


def write(plan: Plan, path: pathlib.Path) -> None:
    """Write the plan as a JSON file, completely or not at all.

    Args:
      plan: the plan.
      path: the file, whose folder is made.
    """
    write_json(path, to_json(plan))


def _run(plan: Plan, run: str) -> dict[str, Any]:
    found, roof = plan.runs[run], plan.roofline(run)
    return {
        "parameters": found.parameters,
        "adapter_parameters": found.adapter_parameters,
        "base_parameters_trained": found.base_parameters_trained,
        "checkpoint_bytes": found.checkpoint_trained,
        "full_checkpoint_bytes": found.checkpoint_full,
        "bytes": {**dataclasses.asdict(found.bytes), "total": found.bytes.total},
        "weights": [dataclasses.asdict(weight) for weight in found.weights],
        "flops": found.flops,
        "flops_adapters": found.flops_adapters,
        "flops_all_devices": found.flops * plan.devices,
        "collectives": [dataclasses.asdict(t) for t in found.traffic],
        "arrays": list(map(_array, found.arrays)),
        "fits": plan.fits(run),
        "roofline": {**dataclasses.asdict(roof), "seconds": roof.seconds, "bound": roof.bound},
    }


def _array(c: Collective) -> dict[str, Any]:
    return {
        "kind": c.kind,
        "of": c.of,
        "dtype": c.operand.dtype,
        "shape": list(c.operand.dims),
        "bytes": c.operand.bytes,
        "group": len(c.group),
        "times": c.times,
        "origin": c.origin,
    }


def notes(plan: Plan) -> list[str]:
    """Return what a reader must know to trust the numbers."""
    out = []
    if plan.extrapolated:
        out.append(
            f"extrapolated: {plan.devices} devices are too many to compile for. Every number is "
            f"a + b / devices, fitted to {plan.compiled[0]} and {plan.compiled[1]} devices."
        )
    if plan.first_batch:
        out.append("The batch is the first one of the data; a longer batch needs more.")
    out += [
        "Weights, adapters and optimizer are exact. Activations (values that the forward pass "
        "keeps) and temporaries are from XLA's program for a CPU; a program for an accelerator "
        "fuses and orders operations differently. bfloat16 is compiled as float16, because XLA "
        "would widen it on a CPU.",
        "XLA has no reduce-scatter on a CPU. If each device needs only its part of a sum, such as "
        "the gradients of full fine-tuning under fsdp, the all-reduce counts twice the bytes that "
        "an accelerator sends.",
        "The roofline is the longest of three times at the device's peaks for bfloat16, and takes "
        "the other two as hidden behind it; a run at half of this speed is a good one.",
    ]
    loops = {loop for found in plan.runs.values() for loop in found.unknown_loops}
    if loops:
        out.append(f"Loops of unknown length count once: {', '.join(sorted(loops))}.")
    return out


def text(plan: Plan) -> str:
    """Return the plan as text for a terminal.

    Args:
      plan: the plan.
    """
    grid = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items())
    shape = next(iter(plan.batch.values()), ())
    parts = f" in {plan.parts} parts" if plan.parts > 1 else ""
    marked = " (EXTRAPOLATED)" if plan.extrapolated else ""
    lines = [
        f"Plan of {plan.name} on {plan.devices} x {plan.device}{marked}: {grid}",
        f"a batch of {' x '.join(map(str, shape))}{parts}",
        "",
        *_table(plan),
        "",
        *_collectives(plan.runs[LORA]),
        "",
        *(_verdict(plan, run) for run in plan.runs),
        "",
        *(f"- {note}" for note in notes(plan)),
    ]
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    n, copy = plan.devices, plan.devices // plan.sizes["data"]
    state = lambda m: m.bytes.weights + m.bytes.adapters + m.bytes.optimizer  # noqa: E731
    lines: list[tuple[str, Callable[[StepCosts], str]]] = [
        ("parameters", lambda m: f"{m.parameters:,}"),
        ("  of adapters", lambda m: f"{m.adapter_parameters:,}"),
        ("  trained in full", lambda m: f"{m.base_parameters_trained:,}"),
        ("checkpoint of trained parameters", lambda m: in_units(m.checkpoint_trained)),
        ("checkpoint of everything", lambda m: in_units(m.checkpoint_full)),
        ("each device", lambda m: ""),
        ("  weights", lambda m: in_units(m.bytes.weights)),
        *_parts(plan),
        ("  adapters", lambda m: in_units(m.bytes.adapters)),
        ("  optimizer", lambda m: in_units(m.bytes.optimizer)),
        ("  activations", lambda m: in_units(m.bytes.activations)),
        ("  temporaries", lambda m: in_units(m.bytes.temporaries + m.bytes.batch)),
        ("  total", lambda m: in_units(m.bytes.total)),
        ("one copy, on fsdp x tensor devices", lambda m: ""),
        ("  weights, adapters, optimizer", lambda m: in_units(state(m) * copy)),
        ("all devices", lambda m: ""),
        ("  FLOPs of a step", lambda m: in_units(m.flops * n, "FLOP")),
        ("    of the adapters", lambda m: in_units(m.flops_adapters * n, "FLOP")),
        ("  against full", lambda m: f"{m.flops / plan.runs[FULL].flops:.3f}"),
    ]
    rows = [[name, *(said(plan.runs[run]) for run in (LORA, FULL))] for name, said in lines]
    return aligned([["", "this run", "full fine-tuning"], *rows])


def _parts(plan: Plan) -> list[tuple[str, Callable[[StepCosts], str]]]:
    """Return lines for the codes, scales and floats of the weights, if some are quantised."""

    def line(part: str) -> tuple[str, Callable[[StepCosts], str]]:
        return f"    {part}", lambda m: in_units(by_part(m.weights).get(part, 0))

    found = by_part(plan.runs[LORA].weights)
    return [] if set(found) <= {FLOATS} else [line(part) for part in found]


def _collectives(found: StepCosts) -> list[str]:
    rows = [["collectives of this run", "times", "bytes", "seconds"]]
    for cause, meaning in CAUSES.items():
        there = [t for t in found.traffic if t.of == cause]
        rows += [[f"{meaning}", "", "", ""]] if there else []
        rows += [
            [f"  {t.kind}", f"{t.times:,.0f}", in_units(t.bytes), f"{t.seconds:.3g}"] for t in there
        ]
    if len(rows) == 1:
        return ["no collectives"]
    return aligned(rows)


def _verdict(plan: Plan, run: str) -> str:
    device, total, roof = DEVICES[plan.device], plan.runs[run].bytes.total, plan.roofline(run)
    name = "this run" if run == LORA else "full fine-tuning"
    fits = "fits" if plan.fits(run) else "does NOT fit"
    share = total / device.memory
    hint = ""
    if device.is_gpu and 0.75 < share <= 1:
        hint = " (JAX takes 75 % of a GPU: XLA_PYTHON_CLIENT_MEM_FRACTION=.95)"
    return (
        f"{name} {fits} {plan.device}: {in_units(total)} of "
        f"{in_units(device.memory)}, {share:.0%}{hint}; "
        f"a step takes at least {roof.seconds:.3g} s, bound by {roof.bound} (compute "
        f"{roof.compute:.3g}, memory {roof.memory:.3g}, communication {roof.communication:.3g})"
    )
