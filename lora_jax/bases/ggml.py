"""The block formats of GGUF files, Q4_0, Q4_1, Q8_0, Q4_K and Q6_K, with the file's own values.

A row of a tensor consists of blocks of 32 or 256 numbers. Here each field of a block is an array
of its own, because a device cannot read a record of 18 or 20 bytes quickly. Source: ggml's
`ggml-quants.c`, and `quants.py` of the gguf package, which the tests compare with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.base import QuantisedMatrix

Fields: TypeAlias = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """One kind of block.

    Attributes:
      size: the number of elements in a block.
      record: the bytes of a block, as a NumPy structure.
      numbers: maps the fields, [..., blocks, *field], to float32 [..., blocks, size].
    """

    size: int
    record: np.dtype
    numbers: Callable[[Fields], jax.Array]


@dataclasses.dataclass(frozen=True)
class GgmlBlocks(QuantisedMatrix):
    """A weight in the blocks of a GGUF file. Rows are outputs; blocks run along the inputs.

    Attributes:
      fields: name of a block's field -> its values, [*lead, rows, blocks, *field].
      kind: GGUF's name of the format, a key of `FORMATS`.
    """

    fields: Fields
    kind: str

    def numbers(self) -> jax.Array:
        return FORMATS[self.kind].numbers(self.fields)


jax.tree_util.register_dataclass(GgmlBlocks, ["fields"], ["sizes", "order", "float_dtype", "kind"])


def _nibbles(bytes_: jax.Array) -> jax.Array:
    """Return the low four bits of all bytes, then the high four bits, in float32."""
    return jnp.concatenate([bytes_ & 15, bytes_ >> 4], axis=-1).astype(jnp.float32)


def _scale(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)[..., None]


def _q4_0(f: Fields) -> jax.Array:
    return _scale(f["d"]) * (_nibbles(f["qs"]) - 8)


def _q4_1(f: Fields) -> jax.Array:
    return _scale(f["d"]) * _nibbles(f["qs"]) + _scale(f["m"])


def _q8_0(f: Fields) -> jax.Array:
    return _scale(f["d"]) * f["qs"].astype(jnp.float32)


def _q4_k(f: Fields) -> jax.Array:
    """Decode eight groups of 32, whose 6-bit scales and minima are packed into 12 bytes."""
    packed = f["scales"].reshape(*f["scales"].shape[:-1], 3, 4)
    scale, minimum, both = packed[..., 0, :], packed[..., 1, :], packed[..., 2, :]
    high_scale = (both & 15) | ((scale >> 2) & 48)
    high_minimum = (both >> 4) | ((minimum >> 2) & 48)
    scales = jnp.concatenate([scale & 63, high_scale], axis=-1).astype(jnp.float32)
    minima = jnp.concatenate([minimum & 63, high_minimum], axis=-1).astype(jnp.float32)
    codes = f["qs"].reshape(*f["qs"].shape[:-1], 4, 32)
    codes = _nibbles(codes).reshape(*codes.shape[:-2], 8, 32)
    values = _scale(_scale(f["d"]) * scales) * codes - _scale(_scale(f["dmin"]) * minima)
    return values.reshape(*f["d"].shape, 256)


def _q6_k(f: Fields) -> jax.Array:
    """Decode sixteen groups of 16; a code has four low bits in `ql` and two high bits in `qh`."""
    start = f["d"].shape
    low = f["ql"].reshape(*start, 2, 64)
    low = jnp.concatenate([low & 15, low >> 4], axis=-1)
    high = f["qh"].reshape(*start, 2, 32)
    high = jnp.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    codes = (low | (high << 4)).astype(jnp.float32) - 32
    scales = _scale(f["d"]) * f["scales"].astype(jnp.float32)
    return (_scale(scales) * codes.reshape(*start, 16, 16)).reshape(*start, 256)


def _record(*fields: tuple[str, str, int]) -> np.dtype:
    return np.dtype([(name, dtype, (count,) if count > 1 else ()) for name, dtype, count in fields])


FORMATS = {
    "Q4_0": BlockFormat(32, _record(("d", "<f2", 1), ("qs", "u1", 16)), _q4_0),
    "Q4_1": BlockFormat(32, _record(("d", "<f2", 1), ("m", "<f2", 1), ("qs", "u1", 16)), _q4_1),
    "Q8_0": BlockFormat(32, _record(("d", "<f2", 1), ("qs", "i1", 32)), _q8_0),
    "Q4_K": BlockFormat(
        256,
        _record(("d", "<f2", 1), ("dmin", "<f2", 1), ("scales", "u1", 12), ("qs", "u1", 128)),
        _q4_k,
    ),
    "Q6_K": BlockFormat(
        256,
        _record(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2", 1)),
        _q6_k,
    ),
}
