"""GGUF files as lists of fields and tensors, so that every part can be made wrong."""

from __future__ import annotations

import dataclasses
import struct
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import mutate

STRING, ARRAY = 8, 9
_PACKED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}
_PACKED |= {11: "<q", 12: "<d"}
COUNTS = (0, 1, 2, 31, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


@dataclasses.dataclass
class Field:
    """One entry of the metadata; `type` is the type of the elements if `value` is a list."""

    name: Any
    type: int
    value: Any


@dataclasses.dataclass
class Tensor:
    """One tensor; the first axis of `shape` is the outermost, as in NumPy."""

    name: Any
    shape: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None


@dataclasses.dataclass
class Gguf:
    """A file; a count that is None is the length of its list."""

    fields: list[Field]
    tensors: list[Tensor]
    version: int = 3
    field_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32

    def dump(self) -> bytes:
        """Return the bytes of the file."""
        counts = (self.tensor_count, len(self.tensors)), (self.field_count, len(self.fields))
        made = b"GGUF" + struct.pack("<I", self.version)
        made += b"".join(struct.pack("<Q", n if said is None else said) for said, n in counts)
        for field in self.fields:
            made += _text(field.name) + _value(field.type, field.value)
        at, data = 0, b""
        for one in self.tensors:
            offset = at if one.offset is None else one.offset
            made += _text(one.name) + struct.pack("<I", len(one.shape))
            made += struct.pack(f"<{len(one.shape)}Q", *(n % 2**64 for n in one.shape[::-1]))
            made += struct.pack("<IQ", one.type, offset % 2**64)
            data += one.data + bytes(-len(one.data) % self.alignment)
            at = len(data)
        return made + bytes(-len(made) % self.alignment) + data


def _text(value: Any) -> bytes:
    """Encode a text, or a pair of a declared length and a text."""
    length, text = value if isinstance(value, tuple) else (None, value)
    data = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data) if length is None else length) + data


def _value(kind: int, value: Any) -> bytes:
    if isinstance(value, list):
        head = struct.pack("<IIQ", ARRAY, kind, len(value))
        return head + b"".join(_element(kind, x) for x in value)
    return struct.pack("<I", kind) + _element(kind, value)


def _element(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    code = _PACKED.get(kind, "<Q")
    number = value if isinstance(value, int | float) and abs(value) < 1e300 else 0
    if code in ("<f", "<d"):
        return np.array(float(number)).astype(code).tobytes()
    size = struct.calcsize(code)
    return (int(number) % 256**size).to_bytes(size, "little")


def change(random: Random, file: Gguf) -> None:
    """Make one change to the file."""
    many: list[Any] = random.choice((file.fields, file.tensors))
    one, what = random.choice(many), random.randrange(8)
    match what:
        case 0:
            many.remove(one)
        case 1:
            many.append(dataclasses.replace(one))
        case 2:
            one.name = random.choice((random.choice(many).name, mutate.near(random, one.name)))
        case 3:
            name = random.choice(("version", "field_count", "tensor_count", "alignment"))
            most = 2**32 if name == "version" else 2**64
            number = random.choice((1, 8, 64)) if name == "alignment" else random.choice(COUNTS)
            setattr(file, name, number % most)
        case _ if isinstance(one, Field):
            _field(random, one)
        case _:
            _tensor(random, one)


def _field(random: Random, field: Field) -> None:
    numbers = (*COUNTS, *range(-2, 40), 0.5, 1e30)
    if isinstance(field.value, list) and field.value and random.random() < 0.7:
        at = random.randrange(len(field.value))
        other = random.choice(field.value)
        changed = random.choice((other, mutate.some_value(random), random.choice(numbers)))
        match random.randrange(4):
            case 0:
                del field.value[at:]
            case 1:
                field.value += [other] * random.choice((1, 50))
            case _:
                field.value[at] = changed if field.type != STRING else str(changed)
    elif random.random() < 0.3:
        field.type = random.choice((*_PACKED, STRING, ARRAY, 13, 2**31))
        texts = isinstance(field.value, str | tuple)
        field.value = random.choice(mutate.TEXTS) if field.type == STRING else field.value
        field.value = 7 if texts and field.type != STRING else field.value
        if isinstance(field.value, list) and field.type == STRING:
            field.value = [str(x) for x in field.value]
    elif field.type == STRING:
        text = str(mutate.near(random, field.value) if random.random() < 0.5 else "")
        field.value = random.choice((text, random.choice(mutate.TEXTS), b"\xff\xfe"))
        if random.random() < 0.2:
            field.value = (random.choice(COUNTS), field.value)
    elif random.random() < 0.1:
        field.value = [random.choice(numbers) for _ in range(3)]
    else:
        field.value = random.choice(numbers)


def _tensor(random: Random, one: Tensor) -> None:
    name = random.choice(("shape", "shape", "type", "offset", "data"))
    if name == "shape" and one.shape:
        at = random.randrange(len(one.shape))
        size = random.choice((*COUNTS, one.shape[at] * 2, one.shape[at] // 2, one.shape[at] + 1))
        changed = (*one.shape[:at], size, *one.shape[at + 1 :])
        one.shape = random.choice((changed, one.shape[::-1], (*one.shape, 1), (1,) * 5, ()))
    elif name == "type":
        one.type = random.choice((0, 1, 2, 3, 8, 10, 12, 14, 16, 20, 24, 28, 30, 39, 41, 99))
    elif name == "offset":
        one.offset = random.choice((*COUNTS, 32, 64))
    else:
        one.data = one.data[: random.randrange(len(one.data) + 1)]
