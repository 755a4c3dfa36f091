"""A run before its first step: its layout, its base and its adapters.

The adapters are drawn at random, taken from the base or from the first batches, or restored from an
earlier adapter (`train.py --from`).
"""

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
from lora_jax.frozen import split
from lora_jax.layout import Layout
from lora_jax.paths import Tree
from lora_jax.resolve import resolve
from lora_jax.training import earlier_adapter, step
from lora_jax.training.config import Config, ConfigError, LoraConfig
from lora_jax.training.mesh import Placement
from lora_jax.training.quantised import float_shardings
from lora_jax.training.workload import Batch, Workload

BATCHES = 8  # batches of training data that EVA reads


class Initial(NamedTuple):
    """A run before its first step.

    workload: the workload; its `about` names the method if the method changes the base.
    base: path -> parameter that is trained in full.
    frozen: the other parameters of the model.
    adapters: the adapters; None if they are drawn at random (`lora_jax.init`).
    earlier: a text about the adapter that the run starts from; "" if it starts from none.
    """

    workload: Workload
    layout: Layout
    base: dict[str, Any]
    frozen: Tree
    adapters: Tree | None
    earlier: str


def initial(
    config: Config, workload: Workload, params: Tree, place: Placement, example: Any, key: jax.Array
) -> Initial:
    """Return the run before its first step, from the loaded `params` and an example of a batch.

    Equal arguments give equal arrays, so that a run can be continued. With an earlier adapter the
    base is changed as that of the earlier adapter was, and `lora.init` is not used.
    """
    saved, layout, patterns = resolved(config, workload, params, example, key)
    lora = config.adaptation
    if saved is not None:
        lora = dataclasses.replace(lora, init=earlier_adapter.base_method(saved) or "gaussian")
    workload, params, adapters = changed_base(lora, workload, layout, params, place, key)
    text = ""
    if saved is not None:
        adapters, params = earlier_adapter.restore(saved, config, workload, layout, params, place)
        text = earlier_adapter.described(saved, workload)
    base, frozen = split(params, patterns)
    step.check_apart(layout, base)
    return Initial(workload, layout, base, frozen, adapters, text)


def resolved(
    config: Config, workload: Workload, params: Tree, example: Any, key: jax.Array
) -> tuple[SavedAdapter | None, Layout, tuple[str, ...]]:
    """Return the adapter that a run starts from, its layout, and the patterns of what it trains in
    full, from arrays or shapes."""
    saved = earlier_adapter.find(config, workload)
    spec = config.adaptation.spec if saved is None else earlier_adapter.spec_of(saved.layout)
    layout = resolve(spec, workload.apply, params, example, train=True, key=key)
    return saved, layout, earlier_adapter.patterns(config, workload, saved)


def changed_base(
    lora: LoraConfig,
    workload: Workload,
    layout: Layout,
    params: Tree,
    place: Placement,
    key: jax.Array,
) -> tuple[Workload, Tree, Tree | None]:
    """Return the workload, the base and the adapters that the method `lora.init` begins with."""
    if lora.init == "eva":
        return workload, params, _from_inputs(workload, layout, params, place, key)
    if not lora.changes_base:
        return workload, params, None
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
    return dataclasses.replace(workload, about=about), new, start.adapters


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
