"""Evaluation over a split, and the check that merged and unmerged weights agree."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.frozen import join
from lora_jax.layout import Layout
from lora_jax.merge import merge
from lora_jax.training.mesh import Placement
from lora_jax.training.state import Trained
from lora_jax.training.workload import Batch, Loss, Workload
from lora_jax.transform import adapt

Tree = Any  # a pytree
# Batches that the host may be ahead of the devices. They take memory there, and with several
# processes JAX 0.10.2 hangs on CPU when more than 32 programs are under way.
AHEAD = 4


def evaluate(
    batch_loss: Callable[[Any], Loss],
    workload: Workload,
    place: Placement,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """`{"loss": mean, **workload.scores(...)}` over all batches, summed in float64 on the host."""
    losses, under_way = list[Loss](), deque[Loss]()
    for batch in batches:
        under_way.append(batch_loss(place.batch(batch)))
        if len(under_way) > AHEAD:
            losses.append(jax.device_get(under_way.popleft()))
    losses += jax.device_get(list(under_way))
    total = float(np.sum([loss.total for loss in losses], dtype=np.float64))
    weight = float(np.sum([loss.weight for loss in losses], dtype=np.float64))
    names = losses[0].sums if losses else ()
    sums = {n: float(np.sum([x.sums[n] for x in losses], dtype=np.float64)) for n in names}
    return {"loss": total / max(weight, 1e-9), **workload.scores(sums, weight)}


def first_batch(workload: Workload, place: Placement, otherwise: Batch) -> Batch:
    """The first evaluation batch, or `otherwise` where the workload has no evaluation."""
    splits = workload.evaluation.values()
    return next((b for split in splits for b in split(place.shard)), otherwise)


def merged_difference(
    workload: Workload, layout: Layout
) -> Callable[[Trained, Tree, Any], jax.Array]:
    """`difference(trained, frozen, batch)`, to be compiled: whether merging changes anything.

    It is the largest |output with merged weights - output with base and adapters|, [] float32.
    """

    def outputs(trained: Trained, frozen: Tree, batch: Any) -> jax.Array:
        params = join(trained["base"], frozen)
        adapters = trained["adapters"]
        adapted = adapt(layout, workload.apply)
        unmerged = adapted(params, adapters, batch, train=False, key=None)
        merged = merge(layout, params, adapters)
        folded = workload.apply(merged, batch, train=False, key=None)
        gaps = jax.tree.map(
            lambda x, y: jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))),
            unmerged,
            folded,
        )
        return jnp.max(jnp.stack(jax.tree.leaves(gaps)))

    return outputs
