"""The mesh of devices, and the place of each array of a run on it.

Axes: `data`, `fsdp` and `tensor`. The batch is divided over `data` and `fsdp`; the frozen weights
over `fsdp` and `tensor`, by the table of their model (`Workload.placement`); the adapters follow
them (`lora_jax.partition_specs`), the optimizer's state follows the adapters. On one device all of
this is the identity.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import sharding
from lora_jax.data.process_slice import Shard
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.training.config import ConfigError, MeshConfig, require
from lora_jax.training.workload import Batch, Workload

Tree = Any  # a pytree

AXES = ("data", "fsdp", "tensor")
# Of the leading dimension of every array of a batch. `fsdp` comes first for a reason: XLA's
# partitioner (JAX 0.10.2 and 0.12.0, Shardy and GSPMD alike) loses the order of the rows where a
# product meets a weight that is divided over the second of these axes, and gradients are wrong
# without a word (docs/partitioner.md). No weight is divided over `data`.
BATCH = P(("fsdp", "data"))
BASE_AXES = ("fsdp", "tensor")  # what a weight may be divided over


def sizes(config: MeshConfig, count: int | None) -> dict[str, int]:
    """The size of each axis over `count` devices; without a count, -1 stands for 1.

    >>> sizes(MeshConfig(data=-1, fsdp=4, tensor=2), 32)
    {'data': 4, 'fsdp': 4, 'tensor': 2}

    Raises:
      ConfigError: the sizes do not multiply to the count.
    """
    asked = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in asked.values() if size != -1)
    count = fixed if count is None else count
    found = {axis: count // fixed if size == -1 else size for axis, size in asked.items()}
    if math.prod(found.values()) != count:
        named = ", ".join(f"{axis} {size}" for axis, size in asked.items())
        raise ConfigError(
            f"mesh ({named}) does not use {count} devices: the sizes must "
            f"multiply to {count}; -1 on one axis takes what the others leave"
        )
    return found


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (None: all devices of all processes).

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes(config, len(devices)).values())
    # Auto: the partitioner decides what the specs below leave open. (JAX's default is Explicit.)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shard_of(mesh: Mesh) -> Shard:
    """The rows of each global batch that the devices of this process hold.

    Processes that hold the same rows (where `tensor` spans processes) have the same shard.
    """
    parts = mesh.shape["fsdp"] * mesh.shape["data"]
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((parts,)).values()
    own = {number for index in held if index for number in range(parts)[index[0]]}
    return Shard(tuple(sorted(own)), parts) if len(own) < parts else Shard()


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where everything lies.

    specs: path -> PartitionSpec of each base parameter.
    params: a tree like the parameters, of NamedShardings; a quantised weight has one for each of
      its arrays.
    """

    mesh: Mesh
    specs: Mapping[str, P]
    params: Tree

    def named(self, specs: Tree) -> Tree:
        """A tree of PartitionSpecs as NamedShardings on the mesh."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
        )

    @property
    def whole(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self.mesh, P())

    def trained(self, layout: Layout, base: Mapping[str, Any]) -> Tree:
        """Shardings of `{"adapters": ..., "base": ...}`: those of the weights they belong to."""
        specs = {
            "adapters": sharding.partition_specs(layout, self.specs),
            "base": {path: self.specs[path] for path in base},
        }
        return self.named(specs)

    def following(self, state: Tree, trained: Tree, where: Tree) -> Tree:
        """Shardings of a state that holds trees like the trained one, such as Adam's moments.

        A leaf whose path ends in the path of a trained array, and has its shape, lies where that
        lies. Every other lies whole on all devices (counters, factored moments).

        Args:
          state: any tree of arrays or ShapeDtypeStructs.
          trained: the trained arrays or ShapeDtypeStructs.
          where: their shardings, as `trained` gives them.
        """
        keyed = jax.tree_util.tree_flatten_with_path(trained)[0]
        places = jax.tree.leaves(where)
        known = {key: (x.shape, place) for (key, x), place in zip(keyed, places, strict=True)}

        def find(key: tuple[Any, ...], leaf: Any) -> NamedSharding:
            for start in range(len(key)):
                shape, place = known.get(key[start:], (None, self.whole))
                if shape == leaf.shape:
                    return place
            return self.whole

        return jax.tree_util.tree_map_with_path(find, state)

    def batch(self, rows: Batch) -> dict[str, jax.Array]:
        """This process's rows of a batch, put together with those of the others.

        Raises:
          ConfigError: the devices do not divide the batch.
        """
        return {name: self._entry(name, value) for name, value in rows.items()}

    def _entry(self, name: str, value: Any) -> jax.Array:
        value, shard = np.asarray(value), self.shard
        if value.ndim == 0:
            return jax.device_put(value, self.whole)
        parts, total = self.parts, round(len(value) / shard.share)
        check_rows(name, total, parts)
        where = NamedSharding(self.mesh, BATCH)
        if shard.share == 1:
            return jax.device_put(value, where)
        place = {int(row): i for i, row in enumerate(shard.rows(total))}

        def rows(index: Any) -> Any:
            start = place[index[0].start or 0]
            return value[start : start + total // parts]

        return jax.make_array_from_callback((total, *value.shape[1:]), where, rows)

    @property
    def parts(self) -> int:
        """In how many the rows of a batch are divided."""
        return self.mesh.shape["fsdp"] * self.mesh.shape["data"]

    @property
    def shard(self) -> Shard:
        """This process's part of each batch."""
        return shard_of(self.mesh)


def check_rows(name: str, rows: int, parts: int) -> None:
    """Raise `ConfigError` unless the rows of a batch's entry can be divided over the devices."""
    if rows % parts:
        raise ConfigError(
            f"the batch's {name!r} has {rows} rows, which mesh.data x mesh.fsdp = {parts} devices "
            f"do not divide; take a batch size that is a multiple of {parts}, or a larger "
            "mesh.tensor"
        )


def place(workload: Workload, config: MeshConfig, mesh: Mesh, example: Any) -> Placement:
    """Decide where each parameter lies: `config.rules`, then the workload's own table.

    A workload without a table is placed by its parameters' Flax metadata where they have some, and
    else by the automatic rule (`lora_jax.sharding.automatic`), which traces it on `example`.

    Args:
      example: this process's rows of a batch, or their ShapeDtypeStructs.

    Raises:
      ConfigError: the devices do not divide the rows.
      lora_jax.LoraError: a parameter with no rule or several, or one that an axis does not divide.
    """

    def use(params: Tree, batch: Any) -> Any:
        return workload.apply(params, batch, train=False, key=None)

    own, given = [_rule(text) for text in config.rules], workload.placement
    try:
        specs = sharding.place(
            workload.params,
            dict(mesh.shape),
            own=own,
            table=given if isinstance(given, tuple) else None,
            named=given if isinstance(given, Mapping) else None,
            call=(use, (example,)),
        )
        tree = sharding.tree_of(specs, workload.params, dict(mesh.shape))
    except LoraError as error:
        raise LoraError(
            f"{error}\nFor train.py a rule is written --mesh.rules 'pattern=axis,axis', with `-` "
            "for a dimension that is to stay whole"
        ) from error
    unplaced = Placement(mesh, specs, None)
    for name, rows in example.items():
        if rows.ndim:
            check_rows(name, round(len(rows) / unplaced.shard.share), unplaced.parts)
    return dataclasses.replace(unplaced, params=unplaced.named(tree))


def _rule(text: str) -> sharding.ShardingRule:
    """`pattern=axes` of `mesh.rules`.

    >>> _rule("**/embedding=-,fsdp+tensor")
    ('**/embedding', P(None, ('fsdp', 'tensor')))
    """
    pattern, equals, axes = text.rpartition("=")
    entries = []
    for entry in axes.split(","):
        names = () if entry.strip() == "-" else tuple(n.strip() for n in entry.split("+"))
        known = all(name in BASE_AXES for name in names)
        form = f"pattern=axis,axis with axes of {BASE_AXES}, `-` or `fsdp+tensor`"
        require(bool(equals) and bool(pattern) and known, "mesh.rules", text, form)
        entries.append(names[0] if len(names) == 1 else names or None)
    return pattern, P(*entries)
