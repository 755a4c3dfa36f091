"""A reader of compiled HLO text: which collectives and products a program has."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

Shape = tuple[str, tuple[int, ...]]  # dtype and dimensions

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_LINE = re.compile(r"^\s*(?:ROOT )?(%[\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_NAME = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"%[\w.\-]+")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: what it is, the arrays it takes and gives, and where it comes from."""

    kind: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    origin: str

    @property
    def bytes(self) -> int:
        """Of the operands: what one device puts in."""
        return sum(BYTES[dtype] * math.prod(dims) for dtype, dims in self.operands)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of elements of the results and the operands."""
        return tuple(math.prod(dims) for _, dims in (*self.results, *self.operands))


def instructions(text: str) -> Iterator[Instruction]:
    """All instructions of `compiled.as_text()`, in order; fused ones too."""
    shapes: dict[str, tuple[Shape, ...]] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if not found:
            continue
        name, result, kind, rest = found.groups()
        results = tuple(_shapes(result))
        shapes[name] = results
        inner = rest.split("), ")[0]
        operands = tuple(s for o in _OPERAND.findall(inner) for s in shapes.get(o, ()))
        origin = _NAME.search(rest)
        yield Instruction(kind, operands, results, origin[1] if origin else "")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims in _ARRAY.findall(text):
        yield dtype, tuple(int(d) for d in dims.split(",") if d)


def collectives(text: str) -> list[Instruction]:
    """The collectives, each once (an asynchronous one by its start)."""
    return [
        dataclasses.replace(i, kind=i.kind.removesuffix("-start"))
        for i in instructions(text)
        if i.kind.removesuffix("-start") in COLLECTIVES
    ]


def counted(found: list[Instruction]) -> Counter[tuple[str, tuple[Shape, ...]]]:
    """How often each (kind, operands) occurs; an all-reduce of several counts as several."""
    return Counter((i.kind, (operand,)) for i in found for operand in i.operands)
