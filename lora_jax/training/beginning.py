"""How the adapters of a run begin: by chance, by the base, by its first batches, or as saved."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.bases.recipe import BEGUN
from lora_jax.beginnings import init_from_base, init_from_inputs
from lora_jax.layout import Layout
from lora_jax.training.config import ConfigError, LoraConfig
from lora_jax.training.earlier_adapter import EarlierAdapter, restore
from lora_jax.training.mesh import Placement
from lora_jax.training.quantised import float_shardings
from lora_jax.training.workload import Batch, Workload

Tree = Any  # a pytree

BATCHES = 8  # of the training data, that EVA looks at


class Beginning(NamedTuple):
    """The base and the adapters before the first step.

    workload: with what others must know of the base.
    params: the frozen base; another one where the method changes it.
    adapters: None where they are drawn by chance (`lora_jax.init`).
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
    earlier: EarlierAdapter | None = None,
) -> Beginning:
    """Return how a run begins; the same arguments give the same, so that a run can go on.

    Args:
      layout: of the adapters; with an earlier adapter what its spec resolves to.
      params: the arrays that the workload loaded.
      key: of the run.
      earlier: the adapter to begin with. `lora` does not say how then; the base is changed as that
        of the adapter was.

    Raises:
      ConfigError: a method that does not go with the base.
      lora_jax.LoraError: a method that does not go with the kind of update.
    """
    if earlier is not None:
        return _as_saved(earlier, lora, workload, layout, params, place, key)
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


def _as_saved(
    earlier: EarlierAdapter,
    lora: LoraConfig,
    workload: Workload,
    layout: Layout,
    params: Tree,
    place: Placement,
    key: jax.Array,
) -> Beginning:
    """The earlier adapter, on its base as that was changed before it was trained."""
    how = dataclasses.replace(lora, init=earlier.begun or "gaussian")
    found = begin(how, workload, layout, params, place, key)
    adapters, params = restore(earlier, workload, layout, found.params, place)
    return Beginning(found.workload, params, adapters)


def _from_inputs(
    workload: Workload, layout: Layout, params: Tree, place: Placement, key: jax.Array
) -> Tree:
    """EVA, from the first training batches that have the shapes of the first one."""
    rows = list(itertools.islice(workload.train(place.shard), 4 * BATCHES))
    alike = [batch for batch in rows if _shapes(batch) == _shapes(rows[0])][:BATCHES]
    f = functools.partial(workload.apply, train=False, key=None)
    batches = ((place.batch(batch),) for batch in alike)
    return init_from_inputs(key, layout, f, params, batches)


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in batch.items()}
