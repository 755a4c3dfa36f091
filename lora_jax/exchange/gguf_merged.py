"""A GGUF model with an adapter merged into it: the base's file with some other weights.

The metadata, the tokenizer and the tensors that the adapter leaves alone are copied byte for byte.
The merged ones are floats, since quantising them again would undo a part of the training. Vectors
are float32, as llama.cpp has them.
"""

from __future__ import annotations

import math
import pathlib
import struct
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from lora_jax.errors import LoraError
from lora_jax.exchange.merged_weights import MergedWeights
from lora_jax.serving.served_adapters import Served

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_AT_ONCE = 2**24  # bytes that are copied at once


def write(run: Served, dtype: str, path: pathlib.Path, *, check_base: bool = True) -> None:
    """Write the base's file with the adapter merged in.

    Args:
      run: the adapter and its base.
      dtype: of the merged matrices, a name in `DTYPES`.
      path: the file to write.
      check_base: raise if the adapter was trained on another base.

    Raises:
      LoraError: the base is not a GGUF file, or another one, or `dtype` cannot hold a number.
    """
    from lora_jax.models.weights.gguf_file import GgufFile

    source = run.source
    if not isinstance(source, GgufFile):
        raise LoraError(
            f"the base {run.reference} is not a GGUF file: --format hf writes the merged model, "
            "and llama.cpp's convert_hf_to_gguf.py turns that folder into a GGUF file"
        )
    weights, header = MergedWeights(run), source.header
    merged, places, at = weights.changed(), {}, 0
    with open(source.path, "rb") as base, open(path, "wb") as file:
        _copy(base, file, 0, header.end)
        for name, tensor in header.tensors.items():
            kind, size = tensor.kind, tensor.end - tensor.offset
            if name in merged:
                wide = len(tensor.shape) == 1
                kind = type(kind)[DTYPES["float32" if wide else dtype]]
                size = math.prod(tensor.shape) * _dtype(kind).itemsize
            text, shape = name.encode(), tensor.shape[::-1]
            file.write(struct.pack("<Q", len(text)) + text + struct.pack("<I", len(shape)))
            file.write(struct.pack(f"<{len(shape)}QIQ", *shape, kind, at))
            places[name], at = (kind, at), _aligned(at + size, header.alignment)
        start = _aligned(file.tell(), header.alignment)
        file.truncate(start + at)
        for name, tensor in header.tensors.items():
            if name not in merged:
                file.seek(start + places[name][1])
                _copy(base, file, tensor.offset, tensor.end)
        for name, (parameter, made) in merged.items():  # in the order in which they can be made
            kind, place = places[name]
            hf, value = made.make(), np.empty(made.shape, np.float32)
            value[source.order(name, parameter.row, run.config)] = hf
            with np.errstate(over="ignore"):
                cast = value.astype(_dtype(kind))
            if not np.isfinite(cast.astype(np.float32)).all():
                raise LoraError(f"{name} has numbers that {dtype} cannot hold: --dtype bfloat16")
            file.seek(start + place)
            file.write(cast.tobytes())
    if check_base:
        weights.check_base()


def _dtype(kind: Any) -> np.dtype[Any]:
    return np.dtype({"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}[kind.name])


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _copy(base: BinaryIO, file: BinaryIO, first: int, end: int) -> None:
    base.seek(first)
    for at in range(first, end, _AT_ONCE):
        file.write(base.read(min(_AT_ONCE, end - at)))
