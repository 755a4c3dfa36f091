"""Quantise the weights of a parameter tree, and turn them back into floats."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.base import Array, Base, is_base
from lora_jax.bases import nf4, scaled
from lora_jax.errors import LoraError, near_paths, nearest
from lora_jax.layout import Layout

Tree = Any  # a pytree
CHANNEL = "channel"

# Scheme -> the number of elements that share a scale, unless `block` says otherwise.
SCHEMES: dict[str, int | str] = {"nf4": 64, "int4": 64, "int8": CHANNEL, "fp8": CHANNEL}
_DTYPES = {"int4": jnp.int4, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


@dataclasses.dataclass(frozen=True)
class StoredAxes:
    """The axes of one weight in storage: leading stack axes, then rows, then columns.

    Attributes:
      lead: the number of leading stack axes.
      rows: the axes of W that are rows.
      columns: the axes of W that are columns.
    """

    lead: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def quantize(
    params: Tree,
    scheme: str,
    targets: Layout | str | Iterable[str],
    *,
    block: int | str | None = None,
    double: bool = False,
) -> Tree:
    """Return the parameters with the targets quantised: as codes and scales instead of floats.

    Every function of the library takes such a tree. A quantised weight is one leaf at the path of
    W. It is frozen, and adapters are trained on top of it (QLoRA, arXiv 2305.14314).

    Stacked weights (scanned layers, experts) are quantised slice by slice, so that a slice of the
    quantised weight is the quantised slice. For nf4, each slice has the bytes that bitsandbytes
    would write for the torch weight [out, in].

    Args:
      params: a parameter tree of floating-point arrays.
      scheme: "nf4", "int4", "int8" or "fp8" (float8_e4m3fn).
      targets: a layout, which knows the axes of each target, or patterns, which may match only
        matrices [in, out]. The layout need not be the adapters' own: use any spec that names the
        weights.
      block: the number of elements along the input axes that share a scale, or "channel" for one
        scale per output. None: 64 for nf4 and int4, "channel" for int8 and fp8.
      double: quantise the scales of nf4 too, which takes them from 0.5 to 0.127 bits a weight.

    Returns:
      A tree like `params`, with a `Base` in place of each target.

    Raises:
      LoraError: an unknown scheme or block size, a pattern that matches nothing or a leaf whose
        axes are not known, or a leaf that is not a float array.

    >>> params = {"q": {"kernel": jnp.ones((128, 32))}}
    >>> q = quantize(params, "nf4", "**/kernel")["q"]["kernel"]
    >>> q.shape, q.codes.shape, q.scales.shape
    ((128, 32), (32, 64), (32, 2))
    """
    if scheme not in SCHEMES:
        raise LoraError(
            f"no scheme {scheme!r}; nearest: {nearest(scheme, SCHEMES, 1)[0]!r}, of "
            f"{', '.join(SCHEMES)}"
        )
    if double and scheme != "nf4":
        raise LoraError(f"double=True quantises the scales of 'nf4'; {scheme!r} keeps its own")
    if scheme == "fp8":
        scaled.check_float8()
    leaves = paths.flatten(params)
    found = (
        _of_layout(targets, leaves)
        if isinstance(targets, Layout)
        else _of_patterns(targets, leaves)
    )
    chosen = {}
    for path, axes in found.items():
        _check_floats(path, leaves[path])
        fan_in = math.prod(leaves[path].shape[axis] for axis in axes.columns)
        size = _block(path, scheme, block, fan_in)
        chosen[path] = _quantised(leaves[path], axes, scheme, size, double)
    return paths.replace(params, chosen)


class Scheme(NamedTuple):
    """The arguments of `quantize` that decide how a weight is stored.

    Attributes:
      scheme: "nf4", "int4", "int8" or "fp8".
      block: the number of elements that share a scale.
      double: whether the scales are quantised too.
    """

    scheme: str
    block: int
    double: bool


def scheme_of(base: Base, path: str) -> Scheme:
    """Return the scheme of a quantised weight, with which another can be quantised.

    Raises:
      LoraError: a base that `quantize` does not make, such as one read from a GGUF file.

    >>> scheme_of(quantize({"w": jnp.ones((64, 2))}, "nf4", "w")["w"], "w")
    Scheme(scheme='nf4', block=64, double=False)
    """
    if isinstance(base, nf4.FourBit) and base.table == nf4.NF4:
        return Scheme("nf4", base.block, not isinstance(base.scales, jax.Array))
    if isinstance(base, scaled.ScaledCodes):
        names = {jnp.dtype(dtype): name for name, dtype in _DTYPES.items()}
        block = base.codes.shape[-1] // base.scales.shape[-1]
        return Scheme(names[jnp.dtype(base.codes.dtype)], block, False)
    raise LoraError(
        f"{path!r} is a {type(base).__name__}, which can be read but not written: only weights "
        f"that lora_jax.quantize makes ({', '.join(SCHEMES)}) can be quantised again. Start from "
        "lora_jax.quantize(lora_jax.dequantize(params), scheme, layout)"
    )


def dequantize(params: Tree) -> Tree:
    """Return the parameters with each quantised weight as the float array that it stands for.

    Args:
      params: a parameter tree.

    Returns:
      A tree like `params` in which every leaf is an array.

    >>> params = {"w": jnp.eye(64)}
    >>> bool((dequantize(quantize(params, "int8", "w"))["w"] == params["w"]).all())
    True
    """
    return jax.tree.map(lambda x: _dense(x) if is_base(x) else x, params, is_leaf=is_base)


def bytes_of(tree: Tree) -> int:
    """Return the number of bytes that the arrays (or shapes) of a tree take on a device.

    Two int4 share a byte, which `nbytes` does not know.

    >>> bytes_of({"w": jnp.zeros((3, 4), jnp.int4), "b": jnp.zeros(4)})
    22
    """
    return sum(_bytes(x) for x in jax.tree.leaves(tree))


def _bytes(x: Array) -> int:
    if jnp.issubdtype(x.dtype, jnp.integer):
        bits = jnp.iinfo(x.dtype).bits
    elif jnp.issubdtype(x.dtype, jnp.floating):
        bits = jnp.finfo(x.dtype).bits
    else:
        bits = 8 * jnp.dtype(x.dtype).itemsize
    return -(-math.prod(x.shape) * bits // 8)


_dense = jax.jit(lambda base: base.dense())


def _of_layout(layout: Layout, leaves: dict[str, Any]) -> dict[str, StoredAxes]:
    layout.check_params(leaves)
    found = {}
    for target in layout.targets:
        lead = 0
        while lead in target.stack:
            lead += 1
        inner = tuple(axis for axis in target.stack if axis >= lead)
        found[target.path] = StoredAxes(lead, (*inner, *target.outputs), target.inputs)
    return found


def _of_patterns(patterns: str | Iterable[str], leaves: dict[str, Any]) -> dict[str, StoredAxes]:
    found = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        hits = paths.matching(pattern, leaves)
        if not hits:
            raise LoraError(
                f"the pattern {pattern!r} matches no parameter{near_paths(pattern, leaves)}"
            )
        for path in hits:
            shape = tuple(leaves[path].shape)
            if len(shape) != 2:
                raise LoraError(
                    f"{path!r} has shape {shape}; a pattern says only of matrices [in, out] which "
                    "axes are inputs. Pass a layout, which knows: "
                    f"lora_jax.resolve(LoraSpec(targets=({pattern!r},)), f, params, x)"
                )
            found[path] = StoredAxes(0, (1,), (0,))
    return found


def _check_floats(path: str, leaf: Any) -> None:
    if isinstance(leaf, Base):
        raise LoraError(
            f"{path!r} is quantised already ({type(leaf).__name__}); lora_jax.dequantize first "
            "if another scheme is meant"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.dtype(leaf.dtype).itemsize < 2:
        raise LoraError(
            f"{path!r} has dtype {leaf.dtype}; a weight to be quantised has floats of at least 16 "
            "bits. Codes of another library have scales somewhere: build its Base from both"
        )


def _block(path: str, scheme: str, block: int | str | None, fan_in: int) -> int:
    """Return the number of elements that share a scale, checked against the weight."""
    block = SCHEMES[scheme] if block is None else block
    if isinstance(block, str):
        if block != CHANNEL or scheme == "nf4":
            raise LoraError(f"{scheme!r} has no block={block!r}; give a number of inputs")
        return fan_in
    if scheme == "nf4":
        nf4.check_block(block, path)
    else:
        scaled.check_block(block, fan_in, path)
    return block


@functools.partial(jax.jit, static_argnames=("axes", "scheme", "block", "double"))
def _quantised(w: jax.Array, axes: StoredAxes, scheme: str, block: int, double: bool) -> Base:
    """Quantise one weight, slice by slice: at most one slice is in float32 at a time."""
    stored = (*axes.rows, *axes.columns)
    order = tuple(stored.index(axis) for axis in range(axes.lead, w.ndim))
    sizes = tuple(w.shape[axis] for axis in stored)
    fan_in = math.prod(w.shape[axis] for axis in axes.columns)

    def one(x: jax.Array) -> Base:
        x = jnp.transpose(x, [axis - axes.lead for axis in stored]).astype(jnp.float32)
        x = x.reshape(-1, fan_in)
        if scheme == "nf4":
            codes, scales = nf4.quantise(x, block, double)
            return nf4.FourBit(sizes, order, str(w.dtype), codes, scales, block)
        return scaled.ScaledCodes(
            sizes, order, str(w.dtype), *scaled.quantise(x, block, _DTYPES[scheme])
        )

    lead = w.shape[: axes.lead]
    slices = jax.lax.map(one, w.reshape(-1, *w.shape[axes.lead :]))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), slices)
