"""NF4, the 4-bit NormalFloat of QLoRA, byte for byte as bitsandbytes stores it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.base import QuantisedMatrix
from lora_jax.bases import dynamic
from lora_jax.errors import LoraError

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# arXiv 2305.14314, appendix E: quantiles of a normal distribution, with an exact zero.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclasses.dataclass(frozen=True)
class FourBit(QuantisedMatrix):
    """A weight in 4-bit codes of a table, with one scale for each block of numbers.

    `w = table[code] * scale`, in float32, then cast. A row holds whole blocks: it is one output if
    `block` divides the number of inputs, and otherwise a whole slice. In the second case blocks
    continue across the ends of the outputs, and the last one may be short.

    Attributes:
      codes: uint8 [*lead, rows, bytes], two codes a byte, the first in the high four bits.
      scales: float32 [*lead, rows, blocks], or the same as `Dynamic`.
      block: the number of elements that share a scale.
      table: the 16 values.
    """

    codes: jax.Array
    scales: jax.Array | dynamic.Dynamic
    block: int
    table: tuple[float, ...] = NF4

    def numbers(self) -> jax.Array:
        codes = jnp.stack([self.codes >> 4, self.codes & 15], axis=-1)
        codes = codes.reshape(*self.codes.shape[:-1], -1)
        table = jnp.asarray(self.table, jnp.float32)
        found = table.at[codes].get(mode="promise_in_bounds")
        scales = self.scales.dense() if isinstance(self.scales, dynamic.Dynamic) else self.scales
        return scaled(found, scales, self.block, math.prod(self.sizes))


def scaled(values: jax.Array, scales: jax.Array, block: int, size: int) -> jax.Array:
    """Return each block of `values` [*lead, rows, columns] times its scale [*lead, rows, blocks].

    The columns may end with padding of half a byte; `size` is the number of elements of a slice
    without it.
    """
    *start, blocks = scales.shape
    missing = blocks * block - values.shape[-1]  # the last block may be short
    if missing:
        values = jnp.pad(values, [(0, 0)] * len(start) + [(0, missing)])
    product = values.reshape(*start, blocks, block) * scales[..., None]
    return product.reshape(*start, blocks * block)[..., : size // start[-1]]


jax.tree_util.register_dataclass(
    FourBit, ["codes", "scales"], ["sizes", "order", "float_dtype", "block", "table"]
)


def quantise(
    x: jax.Array, block: int, double: bool
) -> tuple[jax.Array, jax.Array | dynamic.Dynamic]:
    """Return the codes and scales of one slice, float32 [fan_out, fan_in].

    A number is multiplied by `1 / absmax`, the reciprocal rounded to float32, and gets the nearest
    value of the table. A tie takes the lower value: a number must exceed the midpoint. `double`
    asks to quantise the scales as well.
    """
    rows = x.shape[0] if x.shape[1] % block == 0 else 1
    x = x.reshape(rows, x.size // rows)
    columns = x.shape[1]
    blocks = -(-columns // block)
    x = jnp.pad(x, [(0, 0), (0, blocks * block - columns)]).reshape(rows, blocks, block)
    scales = jnp.max(jnp.abs(x), axis=-1)
    x = x * dynamic.reciprocal(scales)[..., None]
    values = np.array(NF4, np.float32)
    codes = jnp.zeros(x.shape, jnp.uint8)
    for middle in (values[:-1] + values[1:]) * np.float32(0.5):
        codes += (x > middle).astype(jnp.uint8)
    pairs = codes.reshape(rows, -1, 2)[:, : -(-columns // 2)]
    packed = pairs[..., 0] * np.uint8(16) + pairs[..., 1]
    return packed, dynamic.quantise(scales) if double else scales


def check_block(block: int, path: str) -> None:
    """Raise `LoraError` unless bitsandbytes has blocks of this size."""
    if block not in BLOCKS:
        sizes = ", ".join(map(str, BLOCKS))
        raise LoraError(f"{path!r}: nf4 has no blocks of {block} numbers; a block has {sizes}")
