"""Quantised weights whose codes, and not their floats, go from device to device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.base import Array, Base, QuantisedMatrix
from lora_jax.bases.placement import names_of


@dataclasses.dataclass(frozen=True)
class Gathered(Base):
    """A base whose arrays are gathered at each use, before they become floats.

    inner: the base.
    places: the placement of the last two axes of each of its arrays at a use.
    parts: for each array, into how many parts its columns are cut before a use. 1: they are not.
    """

    inner: QuantisedMatrix
    mesh: Mesh
    places: tuple[PartitionSpec, ...]
    parts: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> np.dtype:
        return self.inner.dtype

    def dense(self) -> Array:
        arrays, tree = jax.tree.flatten(self.inner)
        return jax.tree.unflatten(tree, map(self._whole, arrays, self.places, self.parts)).dense()

    def _whole(self, x: Array, place: PartitionSpec, parts: int) -> Array:
        lead, shape = len(self.inner.lead), x.shape
        free = [PartitionSpec.UNCONSTRAINED] * lead
        if parts == 1:
            return self._constrained(x, *free, *place)
        # A GPU gathers along the first axis. To gather along another one, XLA would transpose the
        # codes of all layers before it begins, and keep them.
        cut = jnp.moveaxis(x.reshape(*shape[:-1], parts, -1), -2, lead)
        return jnp.moveaxis(self._constrained(cut, *free, None, *place), lead, -2).reshape(shape)

    def _constrained(self, x: Array, *axes: Any) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


jax.tree_util.register_dataclass(Gathered, ["inner"], ["mesh", "places", "parts"])


def gathered(params: Any, axes: Sequence[str] = ("fsdp",)) -> Any:
    """Return parameters whose quantised weights are gathered as codes over some mesh axes.

    XLA's partitioner gathers a sharded operand where a product needs it, and there the codes have
    become floats: in bfloat16 four times the bytes of NF4, twice the bytes of int8. The weights
    that this function returns are gathered first, and every device then forms the floats of the
    whole weight. The arrays are the same, so they take no more memory.

    On a TPU nothing changes. Its compiler passes the floats of a large weight from device to device
    in small pieces while it multiplies, and whole weights made of codes would take more memory: for
    layers of 8192 x 28672 in NF4 on 16 v5e 7.2 GiB of temporaries in the place of 1.6.

    Call it outside of `jax.jit`, where arrays know their shardings. Training does.

    Args:
      params: a tree of arrays (or shapes) with NamedShardings.
      axes: the names of the mesh axes that the rows of a batch are sharded over.

    Returns:
      A tree like `params`. Quantised weights that `axes` shard are another kind of `Base`; all
      other leaves are the same.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"w": jnp.ones((64, 64))}
    >>> gathered(params) is params, gathered(params)["w"] is params["w"]
    (False, True)
    """
    is_matrix = lambda x: isinstance(x, QuantisedMatrix)  # noqa: E731
    return jax.tree.map(
        lambda x: _gathered(x, axes) if is_matrix(x) else x, params, is_leaf=is_matrix
    )


def _gathered(base: QuantisedMatrix, axes: Sequence[str]) -> Base:
    own, lead = [x.sharding for x in jax.tree.leaves(base)], len(base.lead)
    if not all(isinstance(where, NamedSharding) for where in own):
        return base
    mesh = own[0].mesh
    wide = [axis for axis in axes if mesh.shape.get(axis, 1) > 1]
    places = [[names_of(entry) for entry in where.spec[lead:]] for where in own]
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    if on_tpu or not any(name in wide for place in places for names in place for name in names):
        return base
    kept = [[tuple(n for n in names if n not in wide) or None for names in p] for p in places]
    parts = [
        math.prod(mesh.shape[name] for name in names) if names and new is None else 1
        for names, new in (
            (p[-1], k[-1]) if p else ((), None) for p, k in zip(places, kept, strict=True)
        )
    ]
    return Gathered(base, mesh, tuple(PartitionSpec(*place) for place in kept), tuple(parts))
