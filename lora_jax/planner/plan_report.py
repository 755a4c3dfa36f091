"""Write the plan of a run as text for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from lora_jax.planner.collectives import Collective
from lora_jax.planner.measure import StepCosts, Traffic
from lora_jax.planner.plan import FULL, LORA, Plan
from lora_jax.planner.weights import FLOATS, by_part
from lora_jax.system.devices import DEVICES
from lora_jax.system.table import aligned
from lora_jax.system.whole_files import write_json
from lora_jax.training import mesh
from lora_jax.training.sizes import in_units

FORMAT = 1
CAUSES = {
    "base": "of the frozen model",
    "adapters": "added by LoRA",
    "update": "of the gradient's norm and the optimizer",
}


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values; bytes, FLOPs and seconds are per device and step."""
    return {
        "format": FORMAT,
        "config": plan.name,
        "mesh": plan.sizes,
        "devices": plan.devices,
        "compiler": plan.compiler,
        "compiled_for": list(plan.compiled),
        "extrapolated": plan.extrapolated,
        "first_batch": plan.first_batch,
        "batch": {name: list(shape) for name, shape in plan.batch.items()},
        "accumulate": plan.parts,
        "device": {"name": plan.device, **dataclasses.asdict(DEVICES[plan.device])},
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
        "program": None if found.program is None else dataclasses.asdict(found.program),
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
        "asynchronous": c.asynchronous,
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
    rows = max((shape[0] for shape in plan.batch.values() if shape), default=0)
    if waiting := mesh.idle(rows, plan.parts, plan.sizes["data"] * plan.sizes["fsdp"]):
        out.append(f"{waiting}.")
    if plan.first_batch:
        out.append("The batch is the first one of the data; a longer batch needs more.")
    simulated = [
        "Weights, adapters and optimizer are exact. Activations (values that the forward pass "
        "keeps) and temporaries are from XLA's program for a CPU; a program for an accelerator "
        "fuses and orders operations differently. bfloat16 is compiled as float16, because XLA "
        "would widen it on a CPU.",
        "XLA has no reduce-scatter on a CPU. If each device needs only its part of a sum, such as "
        "the gradients of full fine-tuning under fsdp, the all-reduce counts twice the bytes that "
        "an accelerator sends.",
    ]
    real = [
        "Weights, adapters and optimizer are exact. The compiler's memory, collectives and kernels "
        "are those of the program that the device would run, without autotuning. FLOPs are counted "
        "in a program for a CPU, because custom kernels hide theirs.",
    ]
    out += [
        *(simulated if plan.runs[LORA].program is None else real),
        "The roofline is the longest of three times at the device's peaks for bfloat16, and takes "
        "the other two as hidden behind it; a run at half of this speed is a good one.",
    ]
    if loops := {loop for found in plan.runs.values() for loop in found.unknown_loops}:
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
        f"Compiled by {plan.compiler}",
        f"Plan of {plan.name} on {plan.devices} x {plan.device}{marked}: {grid}",
        f"a batch of {' x '.join(map(str, shape))}{parts}",
        "",
        *_table(plan),
        "",
        *_collectives(plan.runs[LORA]),
        "",
        *_kernels(plan.runs[LORA]),
        *(_verdict(plan, run) for run in plan.runs),
        "",
        *_cure(plan),
        *(f"- {note}" for note in notes(plan)),
    ]
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    n, copy = plan.devices, plan.devices // plan.sizes["data"]
    state = lambda m: m.bytes.weights + m.bytes.adapters + m.bytes.optimizer  # noqa: E731
    real = plan.runs[LORA].program is not None
    activations = lambda m: in_units(m.bytes.activations)  # noqa: E731
    temporaries = lambda m: in_units(m.bytes.temporaries + m.bytes.batch)  # noqa: E731
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
        ("  activations (estimate)" if real else "  activations", activations),
        ("  temporaries (estimate)" if real else "  temporaries", temporaries),
        ("  total (estimate)" if real else "  total", lambda m: in_units(m.bytes.total)),
        *(_COMPILED if real else ()),
        (f"one copy of the model, on {copy} devices together", lambda m: ""),
        ("  weights, adapters, optimizer", lambda m: in_units(state(m) * copy)),
        ("all devices", lambda m: ""),
        ("  FLOPs of a step", lambda m: in_units(m.flops * n, "FLOP")),
        ("    of the adapters", lambda m: in_units(m.flops_adapters * n, "FLOP")),
        ("  against full", lambda m: f"{m.flops / plan.runs[FULL].flops:.3f}"),
    ]
    rows = [[name, *(said(plan.runs[run]) for run in (LORA, FULL))] for name, said in lines]
    return aligned([["", "this run", "full fine-tuning"], *rows])


def _compiled(name: str) -> Callable[[StepCosts], str]:
    """Return a function that writes a number of bytes of the compiled program, if there is one."""

    def said(costs: StepCosts) -> str:
        program = costs.program
        if program is None or (program.refused and name != "needs"):
            return "-"
        return in_units(getattr(program, name))

    return said


_COMPILED: list[tuple[str, Callable[[StepCosts], str]]] = [
    ("each device, by its compiler", lambda m: ""),
    ("  arguments", _compiled("arguments")),
    ("  outputs", _compiled("outputs")),
    ("  outputs in the place of arguments", _compiled("aliased")),
    ("  temporaries, activations among them", _compiled("temporaries")),
    ("  code", _compiled("code")),
    ("  total", _compiled("needs")),
    ("  peak", _compiled("peak")),
    ("  seconds to compile", lambda m: f"{m.program.seconds:.0f}" if m.program else "-"),
]


def _parts(plan: Plan) -> list[tuple[str, Callable[[StepCosts], str]]]:
    """Return lines for the codes, scales and floats of the weights, if some are quantised."""

    def line(part: str) -> tuple[str, Callable[[StepCosts], str]]:
        return f"    {part}", lambda m: in_units(by_part(m.weights).get(part, 0))

    found = by_part(plan.runs[LORA].weights)
    return [] if set(found) <= {FLOATS} else [line(part) for part in found]


def _collectives(found: StepCosts) -> list[str]:
    head = ["collectives of this run", "times", "bytes", "seconds", "asynchronous", "dtype"]
    real = found.program is not None and not found.program.refused
    rows = [head if real else head[:4]]
    for cause, meaning in CAUSES.items():
        there = [t for t in found.traffic if t.of == cause]
        rows += [[meaning, *[""] * (len(rows[0]) - 1)]] if there else []
        for t in there:
            row = [f"  {t.kind}", f"{t.times:,.0f}", in_units(t.bytes), f"{t.seconds:.3g}"]
            rows.append([*row, *_details(found, t)] if real else row)
    if len(rows) == 1:
        return ["no collectives"]
    return aligned(rows)


def _details(found: StepCosts, traffic: Traffic) -> tuple[str, str]:
    """Return the share of the bytes that move asynchronously, and the dtypes with their groups."""
    arrays = [a for a in found.arrays if (a.kind, a.of) == (traffic.kind, traffic.of)]
    apart = sum(a.operand.bytes * a.times for a in arrays if a.asynchronous)
    kinds = sorted({f"{a.operand.dtype} over {len(a.group)}" for a in arrays})
    return f"{apart / max(traffic.bytes, 1):.0%}", ", ".join(kinds)


def _kernels(found: StepCosts) -> list[str]:
    if found.program is None or not found.program.kernels:
        return []
    rows = [[name, f"{times:,}"] for name, times in sorted(found.program.kernels.items())]
    return [*aligned([["custom kernels", "calls"], *rows]), ""]


def _cure(plan: Plan) -> list[str]:
    """Return the largest values of a run that does not fit, and options that make it smaller."""
    if plan.fits(LORA):
        return []
    costs = plan.runs[LORA]
    buffers = (costs.program and costs.program.buffers) or costs.buffers
    rows = [[in_units(b.bytes), b.shape, b.line or b.origin] for b in buffers]
    state = costs.bytes.weights + costs.bytes.adapters + costs.bytes.optimizer
    cures = [
        f"--accumulate {2 * plan.parts} (smaller parts), --model.remat full or --model.loss_chunk "
        "where the model has them"
    ]
    if state > DEVICES[plan.device].memory / 2:
        cures = ["--mesh.fsdp with more --plan-devices (each holds a part of the weights)",
                 "--model.quantize nf4 where the model has it"] + cures  # fmt: skip
    return [*aligned([["largest values", "", "made in"], *rows]), f"Try {'; '.join(cures)}.", ""]


def _verdict(plan: Plan, run: str) -> str:
    device, costs, roof = DEVICES[plan.device], plan.runs[run], plan.roofline(run)
    total, limit = costs.needs, costs.program.limit if costs.program else None
    name = "this run" if run == LORA else "full fine-tuning"
    fits = "fits" if plan.fits(run) else "does NOT fit"
    share, compiler = total / device.memory, ""
    if limit is not None:
        compiler = f" ({in_units(limit)} for programs, its compiler says)"
    hint = ""
    if device.is_gpu and 0.75 < share <= 1:
        hint = " (JAX takes 75 % of a GPU: XLA_PYTHON_CLIENT_MEM_FRACTION=.95)"
    return (
        f"{name} {fits} {plan.device}: {in_units(total)} of "
        f"{in_units(device.memory)}, {share:.0%}{hint}{compiler}, with the optimizer's floats in "
        f"{costs.moments}; "
        f"a step takes at least {roof.seconds:.3g} s, bound by {roof.bound} (compute "
        f"{roof.compute:.3g}, memory {roof.memory:.3g}, communication {roof.communication:.3g})"
    )
