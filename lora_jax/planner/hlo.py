"""Read compiled HLO, and find the matrix products in it.

No library that JAX installs reads HLO: its Python API gives the text, or a protobuf whose classes
are in TensorFlow. `memory_analysis` has only totals.

XLA's own `cost_analysis` counts the body of a loop once; here every instruction counts as often as
its loop runs. All sizes are per device, because a partitioned program is one device's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

LORA = "/lora/"  # in the origin of operations of `lora_jax.updates.lowrank`, in both directions
VIEWS = ("bitcast", "copy", "reshape", "transpose", "convert")  # views of an array, or copies
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of other types the number in the name

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(
    r"(calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_DIMS = r"{}=\{{([\d,]*)\}}"
_NUMBER = re.compile(r"^(\d+)\)")
_FRAME = re.compile(r"stack_frame_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array type, such as f32[8,128]."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The size when packed: two int4 in a byte. All eight-bit floats take one byte."""
        bits = _BITS.get(self.dtype)
        bits = int(re.findall(r"\d+", self.dtype)[0]) if bits is None else bits
        return (self.size * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. `origin` is the name that JAX gave to the operation it comes from."""

    name: str
    kind: str
    results: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    origin: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.results)

    @property
    def called(self) -> Iterator[tuple[str, str]]:
        """Yields (role, computation) of every computation that it calls."""
        for role, names in _CALLS.findall(self.attributes):
            for name in _OPERAND.findall(names):
                yield role, name

    def dims(self, name: str) -> tuple[int, ...]:
        """Return the numbers of an attribute such as lhs_contracting_dims."""
        found = re.search(_DIMS.format(name), self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its computations, with callees before callers and the entry last."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """The number of times that each computation runs in one run of the program."""
        times = dict.fromkeys(self.computations, 0)
        times[self.entry] = 1
        for name in reversed(self.computations):
            for instruction in self.computations[name].values():
                for role, callee in instruction.called:
                    loop = role in ("body", "condition") and instruction.kind == "while"
                    trips = (self.trips(instruction) or 1) if loop else 1
                    times[callee] = times.get(callee, 0) + times[name] * trips
        return times

    @property
    def instructions(self) -> Iterator[Instruction]:
        """All instructions, also in fusions and loops."""
        return (i for c in self.computations.values() for i in c.values())

    @property
    def unknown_loops(self) -> list[str]:
        """The origins of loops whose number of iterations XLA does not know; they count once."""
        loops = (i for i in self.instructions if i.kind == "while")
        return [i.origin or i.name for i in loops if self.trips(i) is None]

    def trips(self, loop: Instruction) -> int | None:
        """Return the number of iterations of a loop, or None if nothing tells it.

        libtpu does not write it. A loop of JAX counts from 0 while its counter is less than a
        number, which is in its condition.
        """
        if written := _TRIPS.search(loop.attributes):
            return int(written[1])
        inside = self.computations[dict(loop.called)["condition"]]
        root = next(i for i in inside.values() if i.root)
        if root.kind != "compare" or "direction=LT" not in root.attributes:
            return None
        limit = inside[root.operands[1]]
        found = _NUMBER.match(limit.attributes) if limit.kind == "constant" else None
        return int(found[1]) if found else None


def parse(text: str) -> Module:
    """Read HLO text, as `compiled.as_text()` returns it.

    >>> lines = ["ENTRY %f (x: f32[4,2]) -> f32[4,4] {",
    ...          "  %x = f32[4,2]{1,0} parameter(0)",
    ...          "  ROOT %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}",
    ...          "}"]
    >>> [(p.flops, p.bytes) for p in products(parse(chr(10).join(lines)))]
    [(64, 128)]
    """
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := _LINE.match(line):
            instruction = _instruction(*found.groups())
            current[instruction.name] = instruction
    devices = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(devices[1]) if devices else 1)


def _instruction(root: str | None, name: str, result: str, kind: str, rest: str) -> Instruction:
    end = closing(rest)
    attributes = rest if kind == "constant" else rest[end + 1 :]  # a constant keeps its value
    origin = _ORIGIN.search(attributes)
    results = tuple(
        Shape(dtype, tuple(int(d) for d in dims.split(",") if d))
        for dtype, dims in _ARRAY.findall(result)
    )
    operands, made = tuple(_OPERAND.findall(rest[:end])), origin[1] if origin else ""
    return Instruction(name, kind, results, operands, attributes, made, bool(root))


def closing(text: str) -> int:
    """Return the index of the parenthesis that closes the one before the text."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i
    return len(text)


@dataclasses.dataclass(frozen=True)
class Product:
    """A dot or a convolution, with the flops and bytes of one run; it runs `times` times."""

    origin: str
    flops: int
    bytes: int
    times: int


def products(module: Module) -> list[Product]:
    """Return every product: 2 FLOPs for each multiply-add; bytes of operands and result."""
    found = []
    for name, computation in module.computations.items():
        for i in computation.values():
            if i.kind in ("dot", "convolution") and module.times[name]:
                lhs, rhs = (computation[o].results[0] for o in i.operands)
                out = i.results[0]
                if i.kind == "dot":
                    each = math.prod(lhs.dims[d] for d in i.dims("lhs_contracting_dims"))
                else:
                    each = rhs.size // max(_outputs(i, rhs), 1)
                moved = lhs.bytes + rhs.bytes + out.bytes
                found.append(Product(i.origin, 2 * out.size * each, moved, module.times[name]))
    return found


def _outputs(convolution: Instruction, kernel: Shape) -> int:
    """Return the output features of a kernel, from `dim_labels=b01f_01io->b01f`."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", convolution.attributes)
    return kernel.dims[labels[1].index("o")] if labels else 1


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large value of a program: its bytes, its type, and the operation and line that make it."""

    bytes: int
    shape: str
    origin: str
    line: str


def largest(module: Module, text: str, count: int = 5) -> tuple[Buffer, ...]:
    """Return the largest values that a program writes to memory, one of each type and origin.

    The values inside a fusion are not written.
    """
    bodies = {module.entry} | {
        callee
        for i in module.instructions
        for role, callee in i.called
        if role in ("body", "branch_computations")
    }
    found: dict[tuple[Any, ...], Buffer] = {}
    frames = _Frames(text)
    for name in bodies:
        for i in module.computations[name].values():
            if i.kind in ("parameter", "tuple", "get-tuple-element", "bitcast", "while"):
                continue
            shape = max(i.results, key=lambda shape: shape.bytes, default=Shape("token", ()))
            written = f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
            frame = _FRAME.search(i.attributes)
            line = frames.line(int(frame[1])) if frame else ""
            found.setdefault((shape, i.origin), Buffer(shape.bytes, written, i.origin, line))
    return tuple(sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count])


class _Frames:
    """The tables at the top of HLO text: which line of Python made an instruction."""

    def __init__(self, text: str) -> None:
        head = text[: text.find("\nStackFrames") + 1]
        self.files = dict(re.findall(r'^(\d+) "(.*)"$', head[: head.find("\nFunctionNames")], re.M))
        self.places = {
            number: (self.files.get(file, ""), line)
            for number, file, line in re.findall(
                r"^(\d+) \{file_name_id=(\d+) .*?line=(\d+)", head, re.M
            )
        }
        found = re.findall(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)", text, re.M)
        self.frames = {int(number): (place, int(parent)) for number, place, parent in found}

    def line(self, frame: int) -> str:
        """Return `file:line` of the innermost frame that is not in an installed library."""
        while frame in self.frames:
            place, parent = self.frames[frame]
            file, line = self.places.get(place, ("", ""))
            if file and "site-packages" not in file and "/lora_jax/primitives/" not in file:
                return f"{file}:{line}"
            frame = parent - 1  # 1 means that there is none
        return ""
