"""Where each tensor lies in a safetensors file, out of a header that is not believed.

The format: 8 bytes hold the header's length N (little endian), N bytes of JSON say each tensor's
dtype, shape and place in the bytes that follow. The safetensors package reads it too, but keeps the
whole file mapped while it is open, see `lora_jax.models.weights.memory_mapped`; and its errors name no file.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.models.weights.memory_mapped import Region, check_inside, shown, unsound

_HEADER_LIMIT = 100_000_000  # bytes: the format's own
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}


def regions(path: Path) -> dict[str, Region]:
    """Tensor name -> its place in the file. No tensor is read.

    Raises:
        lora_jax.models.WeightsError: a header that is no JSON of the format, is longer than the
            file or the format's limit, or describes tensors that the file cannot hold.
    """
    size = path.stat().st_size
    header, start = _header(path, size)
    header.pop("__metadata__", None)
    found = {name: _region(path, name, entry, start, size) for name, entry in header.items()}
    check_inside(path, found, size)
    return found


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON object, and the byte at which the tensors begin."""
    if size < 8:
        raise unsound(path, "a file of", f"{size} bytes", "at least 8, the header's length")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _HEADER_LIMIT):
            limit = f"{size - 8} bytes (what the file has) and {_HEADER_LIMIT} (the format's)"
            raise unsound(path, "the header's length is", f"{length} bytes", limit)
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise unsound(path, f"the header is no JSON: {error}", text[:40], "JSON") from error
    if not isinstance(header, dict):
        raise unsound(path, "the header is a", type(header).__name__, "a JSON object")
    return header, 8 + length


def _region(path: Path, name: str, entry: Any, start: int, size: int) -> Region:
    what = f"tensor {shown(name)} is described by"
    if not isinstance(entry, dict):
        raise unsound(path, what, entry, "a JSON object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    place: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise unsound(path, what, f"dtype {dtype}", f"one of {', '.join(_DTYPES)}")
    for field, value in (("shape", shape), ("data_offsets", place)):
        if not _counts(value, size):
            limit = f"a list of integers from 0 to {size}, the size of the file"
            raise unsound(path, what, f"{field} {shown(value)}", limit)
    if len(place) != 2:
        raise unsound(path, what, f"data_offsets {shown(place)}", "two numbers")
    region = Region(path, start + place[0], tuple(shape), np.dtype(_DTYPES[dtype]))
    if region.end != start + place[1]:
        need = f"{math.prod(shape) * region.dtype.itemsize} bytes, for {dtype} {shown(shape)}"
        raise unsound(path, what, f"{place[1] - place[0]} bytes", need)
    return region


def _counts(value: Any, most: int) -> bool:
    """Whether a value is a list of integers from 0 to `most` (true and false are none)."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= most for n in value)
