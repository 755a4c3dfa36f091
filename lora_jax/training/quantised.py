"""Quantise a workload's frozen weights while they are loaded (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import paths
from lora_jax.base import QuantisedMatrix, is_base
from lora_jax.bases.quantise import quantize
from lora_jax.bases.recipe import ABOUT, STORED, recipe
from lora_jax.data.process_slice import Shard
from lora_jax.layout import Layout
from lora_jax.paths import Tree
from lora_jax.resolve import resolve
from lora_jax.spec import LoraSpec
from lora_jax.training.workload import Common, Workload


def quantised(
    workload: Workload,
    scheme: str,
    *,
    block: int | None = None,
    double: bool = False,
    trainable: Sequence[str] | None = None,
) -> Workload:
    """Return the workload with the weights of all matrix products but the output head quantised.

    Embeddings, norms, biases, the head and parameters trained in full stay as they are. The loader
    loads floats into host memory; then one weight after the other is moved to the devices and
    quantised there.
    """
    patterns = workload.trainable if trainable is None else tuple(trainable)
    layout = _quantised_layout(workload, patterns)
    quantise = functools.partial(quantize, scheme=scheme, block=block, double=double)
    params = jax.eval_shape(functools.partial(quantise, targets=layout), workload.params)

    def load(shardings: Tree) -> Tree:
        loaded = paths.flatten(workload.arrays(float_shardings(params, shardings)))
        placed = paths.flatten(shardings)
        for target in layout.targets:
            path = target.path
            one = functools.partial(quantise, targets=Layout((target,)))
            # Popped, so that the floats are freed when the codes exist.
            floats = loaded.pop(path)
            floats = jax.device_put(floats, floats.sharding.with_memory_kind("device"))
            found = jax.jit(one, out_shardings={path: placed[path]})({path: floats})
            loaded[path] = found[path]
        return paths.replace(params, loaded)

    how = recipe(scheme, layout, block, double)
    new = dataclasses.replace(workload, params=params, load=load, floats=workload)
    return as_stored(new, how)


def as_stored(workload: Workload, how: dict[str, Any] | None = None) -> Workload:
    """Return a workload with quantised parameters that says so in `about` and `common`."""
    how, common = how or {"scheme": STORED}, workload.common
    named = None if common is None else _common(common, workload.params, json.dumps(how))
    about = ChainMap({ABOUT: how}, workload.about)  # type: ignore[arg-type]  # it is only read
    return dataclasses.replace(workload, about=about, common=named)


def _quantised_layout(workload: Workload, trainable: Sequence[str]) -> Layout:
    """Resolve the axes of the weights that will be quantised."""
    batch = next(workload.train(Shard())) if workload.example is None else workload.example
    f = functools.partial(workload.apply, train=False, key=None)
    found = resolve(LoraSpec(rank=1), f, workload.params, batch)
    known = [target.path for target in found.targets]
    trained = {path for pattern in trainable for path in paths.matching(pattern, known)}
    return Layout(tuple(t for t in found.targets if t.path not in trained))


def float_shardings(params: Tree, shardings: Tree) -> Tree:
    """Return the shardings with which the floats of quantised parameters are loaded."""
    return jax.tree.map(_float_sharding, params, shardings, is_leaf=is_base)


def _float_sharding(leaf: Any, where: Any) -> Any:
    """Return the sharding for loading a parameter; weights to be quantised go to the host."""
    if not is_base(leaf):
        return where
    mesh = jax.tree.leaves(where)[0].mesh
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return NamedSharding(
        mesh, weight_spec(leaf, where), memory_kind=None if on_cpu else "pinned_host"
    )


def weight_spec(base: QuantisedMatrix, where: QuantisedMatrix) -> PartitionSpec:
    """Return the PartitionSpec of the float array: the inverse of `bases.placement.placed`."""
    lead, pairs = len(base.lead), zip(jax.tree.leaves(base), jax.tree.leaves(where), strict=True)
    codes, place = max(pairs, key=lambda pair: math.prod(pair[0].shape))
    whole = (*place.spec, *[None] * (lead + 2))
    count = next(n for n in range(9) if math.prod(base.sizes[:n]) == codes.shape[lead])
    stored: list[Any] = [None] * len(base.sizes)
    for entry, axes in ((whole[lead], range(count)), (whole[lead + 1], range(count, len(stored)))):
        for axis in [axis for axis in axes if base.sizes[axis] > 1][:1]:
            stored[axis] = entry
    return PartitionSpec(*whole[:lead], *(stored[axis] for axis in base.order))


def _common(common: Common, params: Tree, how: str) -> Common:
    """Combine quantised workloads: the joined one has the quantised weights of the first."""
    join, base = common.join, f"{common.base} {how}"
    if join is None:
        return dataclasses.replace(common, base=base)
    held = {path: leaf for path, leaf in paths.flatten(params).items() if is_base(leaf)}

    def joined(workloads: Sequence[Workload]) -> Workload:
        whole = join(workloads)
        return dataclasses.replace(whole, params=paths.replace(whole.params, held))

    return dataclasses.replace(common, base=base, join=joined)
