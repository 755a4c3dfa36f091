"""The answer of a device's compiler to a step: memory and kernels, or why it does not fit."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from typing import Any

import jax

from lora_jax.planner import hlo
from lora_jax.planner.hlo import Buffer

# Calls that XLA makes for itself: they compute nothing.
_INTERNAL = re.compile(
    "AllocateBuffer|Assume|AsyncCollective|ConcatBitcast|GatherScatterIndices|Sharding|x.device"
    "|annotate_device|TopK|SPMD|Barrier"
)
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_FUSION = re.compile(r'"kind":"(__(?:triton|cublas|cudnn|cutlass)[\w$]*)"')
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)(?:i?B)?"
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_ALLOCATION = re.compile(
    rf"^ *\d+\. Size: {_SIZE}\n(?: *Operator: (.*)\n)?(?:.*\n)??  *Shape: (\w+\[[\d,]*\])", re.M
)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A step as the compiler of the device made it, or refused to; in bytes of one device.

    needs: arguments, outputs that alias none of them, temporaries and code.
    limit: the bytes that the compiler has for a program. None: it sets no limit (CUDA).
    peak: the most bytes in use at a time, by the compiler's count. It leaves out the gaps between
      temporaries, which the device allocates as well.
    kernels: name of a custom kernel -> how many calls of it a step makes.
    buffers: the largest values, if the program does not fit.
    refused: whether the compiler gave an error; then only `needs`, `limit` and `buffers` are known.
    """

    compiler: str
    needs: int
    limit: int | None = None
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    peak: int = 0
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    buffers: tuple[Buffer, ...] = ()
    refused: bool = False
    seconds: float = 0.0


def compiled(lowered: Any, compiler: str, memory: int) -> tuple[CompiledProgram, Any]:
    """Compile a lowered step; return what the compiler says, and its HLO, or None if it refuses.

    `memory` is that of the device.
    """
    start = time.monotonic()
    try:
        made = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error), compiler)
        if refused is None:
            raise
        return dataclasses.replace(refused, seconds=time.monotonic() - start), None
    seconds, text = time.monotonic() - start, made.as_text()
    module = hlo.parse(text)
    program = measured(made, module, compiler, seconds)
    buffers = hlo.largest(module, text) if program.needs > memory else ()
    return dataclasses.replace(program, buffers=buffers), module


def measured(made: Any, module: hlo.Module, compiler: str, seconds: float) -> CompiledProgram:
    """Return the memory and the kernels of a compiled program, whose HLO is `module`."""
    said = made.memory_analysis()
    sizes = {
        "arguments": said.argument_size_in_bytes,
        "outputs": said.output_size_in_bytes,
        "aliased": said.alias_size_in_bytes,
        "temporaries": said.temp_size_in_bytes,
        "code": said.generated_code_size_in_bytes,
    }
    needs = sum(sizes.values()) - 2 * sizes["aliased"]
    peak = getattr(said, "peak_memory_in_bytes", 0)
    return CompiledProgram(
        compiler, needs, **sizes, peak=peak, kernels=kernels(module), seconds=seconds
    )


def kernels(module: hlo.Module) -> dict[str, int]:
    """Return how often a step calls each custom kernel: Mosaic, Triton, cuBLAS, cuDNN."""
    found = Counter[str]()
    for name, computation in module.computations.items():
        for i in computation.values():
            if i.kind in ("custom-call", "fusion") and module.times[name]:
                target = (_TARGET if i.kind == "custom-call" else _FUSION).search(i.attributes)
                if target and not _INTERNAL.search(target[1]):
                    found[target[1]] += module.times[name]
    return dict(found)


def refusal(error: str, compiler: str) -> CompiledProgram | None:
    """Read the error of libtpu for a program that does not fit; None if it is another error.

    Its "HLO temporaries" include the arguments.

    >>> refusal("HLO temporaries (2.50G) exceeds available HBM (1.50G).", "libtpu").needs
    2684354560
    """
    used = _USED.search(error) or _TEMPORARIES.search(error)
    if used is None:
        return None
    needs, limit = _bytes(used[1], used[2]), _bytes(used[3], used[4])
    buffers = []
    for size, unit, operator, shape in _ALLOCATION.findall(error):
        name, file, line = (
            found[1] if (found := re.search(f'{key}="?([^" ]+)', operator)) else ""
            for key in ("op_name", "source_file", "source_line")
        )
        buffers.append(Buffer(_bytes(size, unit), shape, name, f"{file}:{line}" if file else ""))
    return CompiledProgram(compiler, needs, limit, buffers=tuple(buffers[:5]), refused=True)


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])
