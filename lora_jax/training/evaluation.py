"""Evaluate a split, and check that merged and unmerged weights agree."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import merge
from lora_jax.frozen import join
from lora_jax.layout import Layout
from lora_jax.paths import Tree
from lora_jax.training.mesh import Placement
from lora_jax.training.state import Trained
from lora_jax.training.workload import Batch, Loss, Workload
from lora_jax.transform import adapt

# The host may be ahead of the devices by this many batches. They take memory on the device, and
# JAX 0.10.2 hangs on CPU with several processes if more than 32 programs are in flight.
AHEAD = 4


def evaluate(
    batch_loss: Callable[[Any], Loss],
    workload: Workload,
    place: Placement,
    batches: Iterable[Batch],
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the scores of all batches, and their sums, taken in float64 on the host."""
    losses, under_way = list[Loss](), deque[Loss]()
    for batch in batches:
        under_way.append(batch_loss(place.batch(batch)))
        if len(under_way) > AHEAD:
            losses.append(jax.device_get(under_way.popleft()))
    losses += jax.device_get(list(under_way))
    add = lambda *xs: np.sum(xs, axis=0, dtype=np.float64).tolist()  # noqa: E731
    total, weight, sums = jax.tree.map(add, *losses) if losses else (0.0, 0.0, {})
    return {"loss": total / max(weight, 1e-9), **workload.scores(sums, weight)}, dict(sums)


def first_batch(workload: Workload, place: Placement, otherwise: Batch) -> Batch:
    """Return the first evaluation batch, or `otherwise` if the workload has no evaluation."""
    splits = workload.evaluation.values()
    return next((b for split in splits for b in split(place.shard)), otherwise)


def merged_difference(
    workload: Workload, layout: Layout
) -> Callable[[Trained, Tree, Any], jax.Array]:
    """Return `difference(trained, frozen, batch)`, to be compiled by the caller.

    It returns the largest |output with merged weights - output with base and adapters|, [] float32.
    """

    def outputs(trained: Trained, frozen: Tree, batch: Any) -> jax.Array:
        params, adapters = join(trained["base"], frozen), trained["adapters"]
        adapted = adapt(layout, workload.apply)
        unmerged = adapted(params, adapters, batch, train=False, key=None)
        merged = workload.apply(merge(layout, params, adapters), batch, train=False, key=None)
        pairs = zip(jax.tree.leaves(unmerged), jax.tree.leaves(merged), strict=True)
        gaps = [jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max() for x, y in pairs]
        return jnp.max(jnp.stack(gaps))

    return outputs
