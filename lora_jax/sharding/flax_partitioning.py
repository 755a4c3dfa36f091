"""Placements that a Flax model brings with it: Linen's partitioning boxes, NNX's variables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax import paths
from lora_jax.errors import LoraError, listed, nearest

AxisRules = Iterable[tuple[str, Any]]  # Flax's: logical name -> mesh axis, several, or None


def named(params: Any, mesh_axes: Sequence[str], rules: AxisRules = ()) -> dict[str, PartitionSpec]:
    """Return the placement of the parameters that carry Flax partitioning metadata, by path.

    For Linen, `params` are variables that contain `nn.Partitioned` or `nn.LogicallyPartitioned`
    boxes (the result of `init`, or `jax.eval_shape` of it), and the paths are those in this tree
    (`kernel/value`). For NNX, they are a module or a state whose variables carry `out_sharding`,
    and the paths are as `lora_jax.from_nnx` returns them. A name that is a mesh axis is used as
    it is; `rules` are (logical name, mesh axis | tuple of them | None), as in Flax, and come before
    the rules that the metadata itself may carry. A name that is neither is an error.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> kernel = nn.with_partitioning(nn.initializers.zeros, ("embed", "tensor"))
    >>> model = nn.Dense(8, kernel_init=kernel)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4)))
    >>> named(variables, ("data", "fsdp", "tensor"), [("embed", "fsdp")])
    {'params/kernel/value': P('fsdp', 'tensor')}
    """
    from flax import nnx  # imported here so that `import lora_jax` stays fast
    from flax.core import meta

    if isinstance(params, nnx.Module | nnx.State):
        flat = nnx.to_flat_state(nnx.state(params) if isinstance(params, nnx.Module) else params)
        found = {
            "/".join(map(str, path)): tuple(
                value.get_metadata(key, None) for key in ("out_sharding", "sharding_rules")
            )
            for path, value in flat
            if isinstance(value, nnx.Variable)
        }
    else:
        boxed = jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
        )
        found = {
            paths.path_of((*path, *inner)): (
                getattr(box, "names", None),
                getattr(box, "rules", None),
            )
            for path, box in boxed
            if isinstance(box, meta.AxisMetadata)
            for inner, _ in jax.tree_util.tree_leaves_with_path(box)
        }
    rules = list(rules)
    return {
        path: _translated(path, spec, mesh_axes, [*rules, *(own or ())])
        for path, (spec, own) in found.items()
        if spec is not None
    }


def _translated(
    path: str, spec: Iterable[Any], mesh_axes: Sequence[str], rules: AxisRules
) -> PartitionSpec:
    """Translate each name by its first rule whose mesh axes this parameter does not use yet."""
    table: dict[str, list[Any]] = {}
    for logical, axis in rules:
        table.setdefault(logical, []).append(axis)
    used: set[str] = set()

    def on_mesh(name: str) -> tuple[str, ...]:
        if name in mesh_axes:
            return (name,)
        if name not in table:
            raise LoraError(
                f"{path!r}: its Flax metadata divides an axis over {name!r}, which is neither an "
                f"axis of the mesh nor in the axis rules; the nearest are:\n"
                f"{listed(nearest(name, [*mesh_axes, *table]))}\n"
                f"Add an axis rule: ({name!r}, 'tensor'), or ({name!r}, None) to leave it whole."
            )
        free = (_tuple(axis) for axis in table[name])
        return next((axes for axes in free if not used & set(axes)), ())

    entries: list[Any] = []
    for entry in spec:
        names = tuple(axis for name in _tuple(entry) for axis in on_mesh(name))
        used.update(names)
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def _tuple(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
