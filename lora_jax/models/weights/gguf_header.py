"""Read the header of an untrusted GGUF file: the metadata and the place of each tensor.

The format is in ggml's docs/gguf.md. The gguf package's own reader is not used: it loops over any
length that a file declares, and takes 6.5 s for SmolLM2's header against 0.35 s here. Its tables of
types are used.
"""

import dataclasses
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from lora_jax.models.weights.memory_mapped import Region, check_inside, shown, unsound

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_AXES = 4  # ggml's own
# Bytes of metadata and names. The largest vocabularies need about 10 MB of it.
_HEADER_LIMIT = 100_000_000
_FIELD_LEAST, _TENSOR_LEAST, _TEXT_LEAST = 13, 24, 8  # bytes of the shortest there can be
_DTYPES = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}
_PLAIN = {GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.F32: np.float32}


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A tensor: `shape` numbers, of which each row is cut into blocks of one kind.

    Attributes:
        kind: how a block of numbers is stored.
        region: the stored rows: the numbers themselves for float16 and float32, else bytes.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    region: Region


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        fields: the metadata: numbers, texts, booleans and lists of them.
        tensors: every tensor by name.
    """

    fields: dict[str, Any]
    tensors: dict[str, Quantised]


def read(path: Path) -> Header:
    """The header of a GGUF file. No tensor is read.

    Raises:
        FileNotFoundError: no file.
        lora_jax.models.WeightsError: another format or version; counts, lengths or shapes that
            the file cannot hold.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    size = path.stat().st_size
    if size < 24:
        raise unsound(path, "a file of", f"{size} bytes", "at least 24, GGUF's first fields")
    length = min(size, _HEADER_LIMIT)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ) as data,
    ):
        return _parse(path, _Cursor(path, data, length), size)


def _parse(path: Path, cursor: "_Cursor", size: int) -> Header:
    magic = cursor.take(4, "magic number")
    if magic != _MAGIC:
        raise unsound(path, "the first bytes are", magic, _MAGIC)
    version = cursor.number("<u4", "version")
    if version not in _VERSIONS:
        raise unsound(path, "its version is", version, f"{_VERSIONS}, little endian")
    tensors = cursor.count(_TENSOR_LEAST, "tensors")
    fields: dict[str, Any] = {}
    for _ in range(cursor.count(_FIELD_LEAST, "fields")):
        name = cursor.text("name of a field")
        if name in fields:
            raise unsound(path, "a field that is there twice:", name, "one of each name")
        fields[name] = cursor.value(name)
    infos = [_info(path, cursor) for _ in range(tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise unsound(path, "general.alignment is", alignment, "a power of two")
    start = -(-cursor.at // alignment) * alignment
    found: dict[str, Quantised] = {}
    for name, shape, kind, offset in infos:
        if name in found:
            raise unsound(path, "a tensor that is there twice:", name, "one of each name")
        found[name] = Quantised(kind, shape, _region(path, name, shape, kind, start + offset))
    check_inside(path, {name: tensor.region for name, tensor in found.items()}, size)
    return Header(fields, found)


def _info(path: Path, cursor: "_Cursor") -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, shape (outermost axis first), kind and offset of the next tensor."""
    name = cursor.text("name of a tensor")
    axes = cursor.number("<u4", "number of axes")
    if axes > _MOST_AXES:
        raise unsound(path, f"axes of tensor {shown(name)}:", axes, _MOST_AXES)
    shape = tuple(cursor.number("<u8", "size of an axis") for _ in range(axes))[::-1]
    kind = cursor.number("<u4", "kind of a tensor")
    try:
        known = GGMLQuantizationType(kind)
    except ValueError as error:
        last = max(GGMLQuantizationType)
        raise unsound(path, f"the kind of tensor {shown(name)} is", kind, f"{last:d}") from error
    return name, shape, known, cursor.number("<u8", "offset of a tensor")


def _region(
    path: Path, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
) -> Region:
    if kind in _PLAIN:
        return Region(path, offset, shape, np.dtype(_PLAIN[kind]))
    block, stored = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        what = f"the rows of tensor {shown(name)} of shape {shape}"
        raise unsound(path, what, f"{shape[-1:]} numbers", f"multiples of {kind.name}'s {block}")
    return Region(path, offset, (*shape[:-1], shape[-1] // block * stored), np.dtype(np.uint8))


class _Cursor:
    """Takes values off the front of some bytes, and never more than there are."""

    def __init__(self, path: Path, data: mmap.mmap, length: int) -> None:
        self.at = 0
        self._path, self._data, self._length = path, data, length

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        left = self._length - self.at
        if count > left:
            limit = f"{left} (left of the header's {self._length})"
            raise unsound(self._path, f"{shown(what)} at byte {self.at}: bytes", count, limit)
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, dtype: str, what: str) -> Any:
        """The next number."""
        return self._numbers(dtype, 1, what)[0]

    def count(self, least: int, what: str) -> int:
        """The number of the things that follow, each of at least so many bytes."""
        number: int = self.number("<u8", f"number of {what}")
        most = (self._length - self.at) // least
        if number > most:
            raise unsound(self._path, f"{shown(what)} at byte {self.at}:", number, most)
        return number

    def text(self, what: str) -> str:
        """The next text."""
        data = self.take(self.number("<u8", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise unsound(self._path, what, data[:40], "UTF-8") from error

    def value(self, name: str) -> Any:
        """The next value of the metadata, whose kind stands before it."""
        kind = self._kind(name)
        if kind != GGUFValueType.ARRAY:
            return self._values(kind, 1, name)[0]
        inner = self._kind(name)
        if inner == GGUFValueType.ARRAY:
            raise unsound(self._path, f"field {shown(name)} is", "lists in a list", "one list")
        least = _TEXT_LEAST if inner == GGUFValueType.STRING else np.dtype(_DTYPES[inner]).itemsize
        return self._values(inner, self.count(least, f"values of {name}"), name)

    def _kind(self, name: str) -> GGUFValueType:
        number = self.number("<u4", name)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            last = max(GGUFValueType)
            raise unsound(
                self._path, f"the kind of field {name} is", number, f"{last:d}"
            ) from error

    def _values(self, kind: GGUFValueType, count: int, name: str) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.text(name) for _ in range(count)]
        return self._numbers(_DTYPES[kind], count, name)

    def _numbers(self, dtype: str, count: int, what: str) -> list[Any]:
        data = self.take(count * np.dtype(dtype).itemsize, what)
        numbers: list[Any] = np.frombuffer(data, dtype).tolist()
        return numbers
