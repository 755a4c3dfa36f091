"""Start the adapters of a run: at random, from the base, from its first batches, or as saved."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.analysis.from_base import init_from_base
from lora_jax.analysis.from_inputs import init_from_inputs
from lora_jax.bases.recipe import BEGUN
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.layout import Layout
from lora_jax.training.config import ConfigError, LoraConfig
from lora_jax.training.earlier_adapter import changed_by, restore
from lora_jax.training.mesh import Placement
from lora_jax.training.quantised import float_shardings
from lora_jax.training.workload import Batch, Workload

Tree = Any  # a pytree

BATCHES = 8  # batches of training data that EVA reads


class Beginning(NamedTuple):
    """The base and the adapters before the first step.

    workload: the workload; its `about` names the method if the method changes the base.
    params: the frozen base, which some methods change.
    adapters: the adapters; None if they are drawn at random (`lora_jax.init`).
    """

    workload: Workload
    params: Tree
    adapters: Tree | None


def begin(
    lora: LoraConfig,
    workload: Workload,
    layout: Layout,
    params: Tree,
    place: Placement,
    key: jax.Array,
    earlier: SavedAdapter | None = None,
) -> Beginning:
    """Return the base and the adapters of a run before its first step.

    Equal arguments give equal arrays, so that a run can be continued. With an earlier adapter
    the base is changed as that of the earlier adapter was, and `lora.init` is not used.
    """
    if earlier is not None:
        # On its base, with the changes made before it was trained.
        how = dataclasses.replace(lora, init=changed_by(earlier) or "gaussian")
        found = begin(how, workload, layout, params, place, key)
        adapters, params = restore(earlier, workload, layout, found.params, place)
        return Beginning(found.workload, params, adapters)
    if lora.init == "eva":
        return Beginning(workload, params, _from_inputs(workload, layout, params, place, key))
    if not lora.changes_base:
        return Beginning(workload, params, None)
    if lora.init == "loftq" and workload.floats is None:
        raise ConfigError("lora.init 'loftq' corrects a quantised base: give --model.quantize nf4")
    method: Any = lora.init
    if workload.floats is None:
        start = init_from_base(layout, params, method)
    else:
        floats = workload.floats.arrays(float_shardings(workload.params, place.params))
        start = init_from_base(layout, floats, method, quantised=params)
    about = {**workload.about, BEGUN: method}
    new = jax.device_put(start.params, place.params)
    return Beginning(dataclasses.replace(workload, about=about), new, start.adapters)


def _from_inputs(
    workload: Workload, layout: Layout, params: Tree, place: Placement, key: jax.Array
) -> Tree:
    """Initialize by EVA from the first training batches that have the shape of the first batch."""
    rows = list(itertools.islice(workload.train(place.shard), 4 * BATCHES))
    alike = [batch for batch in rows if _shapes(batch) == _shapes(rows[0])][:BATCHES]
    f = functools.partial(workload.apply, train=False, key=None)
    batches = ((place.batch(batch),) for batch in alike)
    return init_from_inputs(key, layout, f, params, batches)


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in batch.items()}
