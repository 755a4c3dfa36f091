"""Read safetensors files, which may come from a stranger: the one reader of them.

The format: eight bytes that hold the length of a JSON header, the header
`{name: {"dtype", "shape", "data_offsets"}}`, and the numbers. Every size is compared with the size
of the file before memory is allocated for it. There is no code in such a file. The safetensors
package would replace 100 of these lines, but adapters are read without extras; and it takes a key
that is there twice, and 597 MB and 14 s for a header of 53 MB (version 0.8).

The file is mapped again for each slice. While it is mapped, every page that was read counts as
memory of this process.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.errors import shown
from lora_jax.system import json_file, regular_files
from lora_jax.system.regular_files import MakeError

# Axes of an array, arrays in a file, bytes of their descriptions.
DIMENSIONS, MOST, MOST_BYTES = 8, 100_000, 2**24
FLOATS: dict[str, np.dtype] = {
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (8, 4, 2)},
    "BF16": np.dtype(jnp.bfloat16),
}
DTYPES = FLOATS | {
    "BOOL": np.dtype(bool),
    **{f"{kind}{8 * n}": np.dtype(f"<{kind.lower()}{n}") for kind in "IU" for n in (1, 2, 4, 8)},
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; `dtype` is the format's name, `offset` its first byte in the file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def part(self, index: tuple[slice, ...]) -> np.ndarray:
        """Return a copy of the part at `index`, a slice with start and stop for each axis."""
        return np.array(self._mapped()[index])

    def whole(self) -> np.ndarray:
        return np.array(self._mapped())

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def _mapped(self) -> np.ndarray:
        if not self.nbytes:  # nothing can be mapped
            return np.empty(self.shape, DTYPES[self.dtype])
        stored = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        return stored.view(DTYPES[self.dtype]).reshape(self.shape)


class Contents(NamedTuple):
    """The metadata of a file, and its tensors by name."""

    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]


def read(path: Path, error: MakeError) -> Contents:
    """Return the contents of a file, without reading a tensor.

    `error`: the file is not in the format, or it cannot hold the tensors that it describes.
    """
    with regular_files.opened(path, error) as file:
        size, first = os.fstat(file.fileno()).st_size, file.read(8)
        if len(first) < 8:
            raise error(f"{path} has {size} bytes, too few for a safetensors file")
        (length,) = struct.unpack("<Q", first)
        known = length <= min(MOST_BYTES, size - 8)
        header = json_file.parse_object(file.read(length), str(path), error) if known else {}
    if not known or len(header) > MOST:
        raise error(
            f"{path} declares a header of {length:,} bytes, but the file has {size:,} and a header "
            f"may have {MOST_BYTES:,} and {MOST:,} arrays: it is not a safetensors file, or it is "
            "damaged"
        )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(x, str) for x in metadata.values()):
        raise error(f"{path}: __metadata__ must map names to texts, got {shown(metadata)}")
    place = 8 + length, size
    found = {name: _tensor(path, name, entry, place, error) for name, entry in header.items()}
    _check_places(path, found, place, error)
    return Contents(metadata, found)


def _tensor(
    path: Path, name: str, entry: Any, place: tuple[int, int], error: MakeError
) -> StoredTensor:
    what = f"{path}: {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{what} is described by {shown(entry)}; expected dtype, shape, data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise error(f"{what} is stored as {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _sizes(shape) or len(shape) > DIMENSIONS or not _sizes(span) or len(span) != 2:
        raise error(f"{what} has no shape and place that can be: {shown(entry)}")
    size, available = math.prod(shape) * DTYPES[dtype].itemsize, place[1] - place[0]
    if not span[0] <= span[1] <= available or span[1] - span[0] != size:
        raise error(
            f"{what} of shape {shown(shape)} takes {size:,} bytes; its place is {span[0]:,} to "
            f"{span[1]:,} of {available:,}"
        )
    return StoredTensor(path, name, tuple(shape), dtype, place[0] + span[0])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_places(
    path: Path, tensors: Mapping[str, StoredTensor], place: tuple[int, int], error: MakeError
) -> None:
    """Raise unless the tensors are one after the other, and fill the file."""
    end = place[0]
    for x in sorted(tensors.values(), key=lambda x: (x.offset, x.nbytes)):
        if x.offset != end:
            raise error(f"{path}: {shown(x.name)} begins at byte {x.offset:,}, expected {end:,}")
        end += x.nbytes
    if end != place[1]:
        raise error(f"{path} has {place[1]:,} bytes, its header speaks of {end:,}")
