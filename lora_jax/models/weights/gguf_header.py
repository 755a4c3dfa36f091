"""Read the header of an untrusted GGUF file: the metadata and the place of each tensor.

The format is described in ggml's docs/gguf.md. The gguf package's own reader is not used: it loops
over any length that a file declares, and takes 6.5 s for SmolLM2's header instead of 0.35 s here.
Its tables of types and its code for quantised numbers are used.
"""

import dataclasses
import enum
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quant_shape_to_byte_shape

from lora_jax.errors import WeightsError, damaged, shown
from lora_jax.models.weights.disk_arrays import Index
from lora_jax.system import regular_files

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_AXES = 4  # ggml's limit
# Limit for the bytes of metadata and names. The largest vocabularies need about 10 MB.
_HEADER_LIMIT = 100_000_000
K = TypeVar("K", bound=enum.IntEnum)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A tensor of a GGUF file, whose rows are divided into blocks of one kind; `offset` is its
    first byte."""

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        """The position in the file after its last byte."""
        return self.offset + math.prod(quant_shape_to_byte_shape(self.shape, self.kind))

    def read(self, index: Index) -> np.ndarray:
        """Read a part of the tensor as floats, from the blocks that contain it.

        The file is mapped for each call, and as long as the result is in use: pages of a file that
        stays mapped would count as memory of this process.
        """
        block, size = GGML_QUANT_SIZES[self.kind]
        *outer, last = index
        first, end = last.start // block, -(-last.stop // block)
        shape = quant_shape_to_byte_shape(self.shape, self.kind)
        stored = np.memmap(self.path, np.uint8, "r", self.offset, shape)
        try:
            part = dequantize(stored[(*outer, slice(first * size, end * size))], self.kind)
        except NotImplementedError as error:
            raise WeightsError(
                f"{self.path}: tensor {self.name} is quantised as {self.kind.name}, which the gguf "
                "package cannot expand"
            ) from error
        numbers: np.ndarray = part[..., last.start - first * block : last.stop - first * block]
        return numbers

    def blocks(self, record: np.dtype) -> np.ndarray:
        """Return the blocks of a matrix as in the file: `record` [rows, blocks], mapped."""
        rows, columns = self.shape
        shape = (rows, columns // GGML_QUANT_SIZES[self.kind][0])
        return np.memmap(self.path, record, "r", self.offset, shape)


@dataclasses.dataclass(frozen=True)
class Header:
    """The metadata of a GGUF file (numbers, texts, booleans and lists of them), and every
    tensor. `end` is the position after the metadata, `alignment` that of the tensors."""

    fields: dict[str, Any]
    tensors: dict[str, Quantised]
    end: int
    alignment: int


def read(path: Path) -> Header:
    """Read the header of a GGUF file, but no tensor.

    `WeightsError`: the format or version is another one; the file cannot hold the declared counts,
    lengths or shapes.
    """
    with regular_files.opened(path, WeightsError, given=True) as file:
        size = os.fstat(file.fileno()).st_size
        cursor = _Cursor(path, file, min(size, _HEADER_LIMIT))
        magic = cursor.take(4, "magic number")
        if magic != _MAGIC:
            raise _unsound(path, "the first bytes are", magic, _MAGIC)
        version = cursor.number("uint32", "version")
        if version not in _VERSIONS:
            raise _unsound(path, "its version is", version, f"{_VERSIONS}, little endian")
        tensors = cursor.number("uint64", "number of tensors")
        fields: dict[str, Any] = {}
        # The count may be any number; the loop ends when the bytes run out.
        for _ in range(cursor.number("uint64", "number of fields")):
            name = cursor.text("name of a field")
            if name in fields:
                raise _unsound(path, "a field that is there twice:", name, "one of a name")
            fields[name] = cursor.value(f"field {name}")
        end, found = cursor.at, dict[str, Quantised]()
        for _ in range(tensors):
            tensor = _tensor(path, cursor)
            if tensor.name in found:
                raise _unsound(path, "a tensor that is there twice:", tensor.name, "one of a name")
            found[tensor.name] = tensor
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise _unsound(path, "general.alignment is", alignment, "a power of two")
    start = -(-cursor.at // alignment) * alignment
    found = {n: dataclasses.replace(t, offset=start + t.offset) for n, t in found.items()}
    _check_inside(path, found.values(), size)
    return Header(fields, found, end, alignment)


def _tensor(path: Path, cursor: "_Cursor") -> Quantised:
    """Read the next tensor, with an offset from the end of the header."""
    name = cursor.text("name of a tensor")
    what = f"tensor {shown(name)}"
    axes = cursor.number("uint32", what)
    if not 0 < axes <= _MOST_AXES:
        raise _unsound(path, f"axes of {what}:", axes, f"1 to {_MOST_AXES}")
    shape = tuple(cursor.numbers("uint64", what, axes))[::-1]  # ours has the outermost axis first
    kind = cursor.member(GGMLQuantizationType, what)
    block = GGML_QUANT_SIZES[kind][0]
    if 0 in shape:
        raise _unsound(path, what, f"the shape {shape}", "at least one number")
    if shape[-1] % block:
        what = f"the rows of {what} of shape {shape}"
        raise _unsound(path, what, f"{shape[-1]} numbers", f"multiples of {kind.name}'s {block}")
    return Quantised(path, name, kind, shape, cursor.number("uint64", what))


def _check_inside(path: Path, tensors: Iterable[Quantised], size: int) -> None:
    """Raise unless every tensor is within the file's `size` bytes, and none overlaps another.

    So the tensors together are not larger than the file, even if their shapes say otherwise.
    """
    before, taken = "the header", 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.end)):
        what = f"tensor {shown(tensor.name)}"
        if tensor.end > size:
            what = f"{what} of shape {tensor.shape}, {tensor.kind.name}, ends at"
            raise _unsound(path, what, f"byte {tensor.end}", f"the file's {size} bytes")
        if tensor.offset < taken:
            what = f"{what} overlaps {shown(before)}: it begins at"
            raise _unsound(path, what, f"byte {tensor.offset}", f"not before byte {taken}")
        before, taken = tensor.name, tensor.end


def _unsound(path: Path, what: str, got: object, limit: object) -> WeightsError:
    """Return the error for a file whose header is impossible."""
    return damaged(path, f"{shown(what)}\n  got    {shown(got)}\n  limit  {limit}")


class _Cursor:
    """Takes values from the front of a file, and never more than its first `length` bytes."""

    def __init__(self, path: Path, file: BinaryIO, length: int) -> None:
        self.at = 0
        self._path, self._file, self._length = path, file, length

    def take(self, count: int, what: str) -> bytes:
        """Take the next `count` bytes."""
        left = self._length - self.at
        if count > left:
            limit = f"{left} (left of the header's {self._length})"
            raise _unsound(self._path, f"{shown(what)} at byte {self.at}: bytes", count, limit)
        self.at += count
        return self._file.read(count)

    def numbers(self, dtype: str, what: str, count: int) -> list[Any]:
        """Take the next `count` numbers."""
        little = np.dtype(dtype).newbyteorder("<")
        found: list[Any] = np.frombuffer(self.take(count * little.itemsize, what), little).tolist()
        return found

    def number(self, dtype: str, what: str) -> Any:
        """Take the next number."""
        return self.numbers(dtype, what, 1)[0]

    def text(self, what: str) -> str:
        """Take the next text."""
        data = self.take(self.number("uint64", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _unsound(self._path, what, data[:40], "UTF-8") from error

    def member(self, kinds: type[K], what: str) -> K:
        """Take the next number, which must be one of `kinds`."""
        number = self.number("uint32", what)
        if number not in list(kinds):
            raise _unsound(self._path, f"the kind of {what} is", number, f"{max(kinds):d}")
        return kinds(number)

    def value(self, what: str) -> Any:
        """Take the next value of the metadata, after its kind."""
        kind = self.member(GGUFValueType, what)
        if kind != GGUFValueType.ARRAY:
            return self._values(kind, 1, what)[0]
        kind = self.member(GGUFValueType, what)
        if kind == GGUFValueType.ARRAY:
            raise _unsound(self._path, f"{what} is", "lists in a list", "one list")
        return self._values(kind, self.number("uint64", what), what)

    def _values(self, kind: GGUFValueType, count: int, what: str) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.text(what) for _ in range(count)]
        return self.numbers(kind.name.lower(), what, count)  # GGUF's names are NumPy's
