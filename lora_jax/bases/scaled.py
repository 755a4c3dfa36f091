"""int8, int4 and float8 weights: a code of few bits times the scale of its group."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.base import QuantisedMatrix
from lora_jax.errors import LoraError


@dataclasses.dataclass(frozen=True)
class ScaledCodes(QuantisedMatrix):
    """A weight as codes of a dtype that the hardware supports: `w = code * scale`, no zero point.

    Attributes:
      codes: int8, int4 or float8_e4m3fn [*lead, fan_out, fan_in]. An int4 takes half a byte on
        the device, although `nbytes` counts a whole one (`bytes_of` does not).
      scales: float32 [*lead, fan_out, groups]. With one group, there is one scale per output.
    """

    codes: jax.Array
    scales: jax.Array

    def numbers(self) -> jax.Array:
        codes = self.codes.astype(jnp.float32)
        groups = self.scales.shape[-1]
        if groups == 1:  # a plain broadcast, which XLA fuses into a product on a GPU
            return codes * self.scales
        grouped = codes.reshape(*codes.shape[:-1], groups, codes.shape[-1] // groups)
        return (grouped * self.scales[..., None]).reshape(codes.shape)


jax.tree_util.register_dataclass(
    ScaledCodes, ["codes", "scales"], ["sizes", "order", "float_dtype"]
)


def quantise(x: jax.Array, block: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Return the codes and scales of one slice, float32 [fan_out, fan_in].

    A scale is the absmax of `block` elements along the inputs, divided by the largest code.
    Integers are symmetric (-127 to 127, -7 to 7) and rounded to the nearest, ties to even.
    """
    groups = x.reshape(x.shape[0], -1, block)
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = np.float32(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    scales = jnp.max(jnp.abs(groups), axis=-1) / largest
    divisors = jnp.where(scales == 0, jnp.ones_like(scales), scales)  # zeros stay zeros
    codes = jnp.clip(groups / divisors[..., None], -largest, largest)
    codes = jnp.round(codes) if integer else codes
    return codes.astype(dtype).reshape(x.shape), scales


def check_block(block: int, fan_in: int, path: str) -> None:
    """Raise `LoraError` unless the groups divide the inputs."""
    if block < 1 or fan_in % block:
        fit = [size for size in range(2, fan_in + 1) if fan_in % size == 0]
        near = sorted(fit, key=lambda size: abs(size - block))[:6]
        raise LoraError(
            f"{path!r}: groups of {block} numbers do not divide its {fan_in} inputs; "
            f"block={' or '.join(map(str, sorted(near)))} would, and so does block='channel', "
            "one scale for each output"
        )


def check_float8() -> None:
    """Raise `LoraError` if this device does not support float8_e4m3fn."""
    try:
        jax.block_until_ready(jnp.ones(1).astype(jnp.float8_e4m3fn).astype(jnp.float32))
    except jax.errors.JaxRuntimeError as error:
        raise LoraError(
            f"scheme 'fp8' needs float8_e4m3fn, which {jax.devices()[0].device_kind} does not "
            f"have ({error}); use 'int8', which takes the same memory"
        ) from error
