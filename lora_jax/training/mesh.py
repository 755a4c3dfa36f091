"""The device mesh, and the placement of each array of a run on it.

The axes are `data`, `fsdp` and `tensor`. The batch is sharded over `data` and `fsdp`. The frozen
weights are sharded over `fsdp` and `tensor` as the rules of their model say (`Workload.placement`).
The adapters are sharded like their weights (`lora_jax.partition_specs`), and the optimizer state
like the adapters. On one device nothing is sharded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import sharding
from lora_jax.data.process_slice import Shard
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.paths import Tree
from lora_jax.system import devices
from lora_jax.training.config import ConfigError, MeshConfig, require
from lora_jax.training.workload import Batch, Workload

AXES = ("data", "fsdp", "tensor")
# The sharding of the leading dimension of every array of a batch. `fsdp` must come first: XLA's
# partitioner (JAX 0.10.2 and 0.12.0, Shardy and GSPMD alike) silently changes the order of the rows
# in a product with a weight that is sharded over the second of these axes, so that gradients are
# wrong (docs/partitioner.md). No weight is sharded over `data`.
BATCH = P(("fsdp", "data"))
BASE_AXES = ("fsdp", "tensor")  # a weight may be sharded over these


def sizes(config: MeshConfig, count: int | None) -> dict[str, int]:
    """Return the size of each mesh axis.

    >>> sizes(MeshConfig(data=-1, fsdp=4, tensor=2), 32)
    {'data': 4, 'fsdp': 4, 'tensor': 2}
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
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes(config, len(devices)).values())
    # Auto axes let the partitioner choose shardings that the specs leave open. JAX's default is
    # Explicit.
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    return Mesh(hybrid(shape, slices, devices), AXES, axis_types=types)


def hybrid(shape: tuple[int, ...], slices: int, devices: Sequence[Any]) -> Any:
    """Return an array of the devices of several slices, which `jax.make_mesh` refuses.

    Only the slow network connects slices, so the first axis that can is divided over them.
    """
    axis = next((n for n, size in enumerate(shape) if size % slices == 0), None)
    require(axis is not None, "mesh", shape, f"divisible by the {slices} slices on one axis")
    outer = tuple(slices if n == axis else 1 for n in range(len(shape)))
    inner = tuple(size // many for size, many in zip(shape, outer, strict=True))
    return create_hybrid_device_mesh(inner, outer, devices)


def shard_of(mesh: Mesh) -> Shard:
    """Return which rows of each global batch the devices of this process hold.

    If `tensor` spans processes, these hold the same rows and have the same shard.
    """
    parts = mesh.shape["fsdp"] * mesh.shape["data"]
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((parts,)).values()
    own = {number for index in held if index for number in range(parts)[index[0]]}
    return Shard(tuple(sorted(own)), parts) if len(own) < parts else Shard()


@dataclasses.dataclass(frozen=True)
class Placement:
    """The placement of every array on the mesh.

    specs: path -> PartitionSpec of each base parameter.
    params: a tree of NamedShardings with the structure of the parameters; a quantised weight has
      one for each of its arrays.
    """

    mesh: Mesh
    specs: Mapping[str, P]
    params: Tree

    def named(self, specs: Tree) -> Tree:
        """Turn a tree of PartitionSpecs into NamedShardings on the mesh."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
        )

    @property
    def whole(self) -> NamedSharding:
        """The sharding of an array that every device holds completely."""
        return NamedSharding(self.mesh, P())

    def trained(self, layout: Layout, base: Mapping[str, Any]) -> Tree:
        """Return shardings of `{"adapters": ..., "base": ...}`; they follow the weights."""
        adapters = sharding.partition_specs(layout, self.specs)
        return self.named({"adapters": adapters, "base": {p: self.specs[p] for p in base}})

    def following(self, state: Tree, trained: Tree, where: Tree) -> Tree:
        """Return shardings of a state that contains trees like the trained one, as Adam's moments.

        A leaf is sharded like a trained array if its path ends in that array's path and it has the
        same shape. Other leaves (counters, factored moments) are replicated.
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
        """Combine this process's rows of a batch with the other processes' rows."""
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
        """The number of parts that the rows of a batch are divided into."""
        return self.mesh.shape["fsdp"] * self.mesh.shape["data"]

    @property
    def peak(self) -> float:
        """The peak FLOPs a second of all devices; 0 if the table of devices does not have them."""
        known = devices.known(self.mesh.devices.flat[0].device_kind)
        return 0.0 if known is None else known.flops * self.mesh.size

    @property
    def shard(self) -> Shard:
        """The part of each batch that this process holds."""
        return shard_of(self.mesh)


def check_rows(name: str, rows: int, parts: int) -> None:
    """Raise `ConfigError` unless the rows of an array of a batch divide into `parts`."""
    if rows % parts:
        raise ConfigError(
            f"the batch's {name!r} has {rows} rows, which mesh.data x mesh.fsdp = {parts} devices "
            f"do not divide; take a batch size that is a multiple of {parts}, or a larger "
            "mesh.tensor"
        )


def described(mesh: Mesh) -> str:
    """Return a line about the devices, their processes and the mesh, for the start of a run.

    >>> described(make(MeshConfig(), jax.devices()[:1]))
    '1 device (cpu)'
    """
    devices = list(mesh.devices.flat)
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    processes = len({device.process_index for device in devices})
    if len(devices) == 1:
        return f"1 device ({kinds})"
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    several = "es" if processes > 1 else ""
    return f"{len(devices)} devices ({kinds}) in {processes} process{several}, as {axes}"


def divided(rows: int, accumulate: int, place: Placement) -> str:
    """Return the rows of a step, and how devices, processes and parts divide them."""
    text = f"{rows} rows a step"
    if place.mesh.size > 1:
        text += f", {rows / place.parts:g} on each device (mesh.data x mesh.fsdp = {place.parts})"
    if place.shard.share < 1:
        text += f", {round(rows * place.shard.share)} read by each process"
    if accumulate > 1:
        text += f", in {accumulate} parts one after the other"
    waiting = idle(rows, accumulate, place.parts)
    return f"{text}\n{waiting}" if waiting else text


def idle(rows: int, accumulate: int, parts: int) -> str:
    """Return a note if a part of a batch has fewer rows than devices that divide them; or "".

    >>> idle(8, 2, 4)
    ''
    """
    each = rows // accumulate
    if each >= parts or not rows:
        return ""
    return (
        f"--accumulate {accumulate} makes parts of {each} of the {rows} rows, fewer than the "
        f"{parts} devices (mesh.data x mesh.fsdp) that divide them, so devices wait for each "
        f"other. Take --accumulate {max(1, rows // parts)}, or larger batches"
    )


def place(workload: Workload, config: MeshConfig, mesh: Mesh, example: Any) -> Placement:
    """Choose the placement of each parameter: by `config.rules`, then by the workload's rules.

    If the workload has no rules, a parameter is placed by its Flax partitioning metadata if it has
    any, or else by the automatic rule (`lora_jax.sharding.automatic`), which traces the workload.
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
            "for a dimension that is not sharded"
        ) from error
    unplaced = Placement(mesh, specs, None)
    for name, rows in example.items():
        if rows.ndim:
            check_rows(name, round(len(rows) / unplaced.shard.share), unplaced.parts)
    return dataclasses.replace(unplaced, params=unplaced.named(tree))


def _rule(text: str) -> sharding.ShardingRule:
    """Read a rule of `mesh.rules`, `pattern=axes`.

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
