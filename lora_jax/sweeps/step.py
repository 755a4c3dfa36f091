"""The step of a group: the step of one run, vmapped over the members.

On its own slice, a member does the same as in a step alone: its loss is its own mean, its gradient
is clipped by its own norm, and its Adam counts its own steps. Only the base has no axis of members,
so each product with a base weight is one product for all members.

A device that some members keep busy gains nothing from more of them, and a CPU loses: their values
no longer fit into its caches. So the members may go through the step a few at a time, one after the
other within one program (`at_once`), with the same results and less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.layout import Layout
from lora_jax.multi.stack import union
from lora_jax.paths import Tree
from lora_jax.training.config import ConfigError
from lora_jax.training.optimizer import Hyper, adamw
from lora_jax.training.state import State
from lora_jax.training.step import train_step
from lora_jax.training.workload import Workload
from lora_jax.updates.kind import kind_of

# path -> alpha / rank; 0 if a member does not adapt the path. {}: the scales of the layout.
Scales = dict[str, Any]


class Settings(NamedTuple):
    """The constants that differ between members; each leaf is [N] for N members.

    skip: bool; True skips a step that is not finite, False stops the member there.
    """

    hyper: Hyper
    scales: Scales
    skip: Any


def is_plain(layout: Layout) -> bool:
    """Return whether every update is LoRA of a whole weight, whose ranks can be zero-padded."""
    return all(kind_of(target).is_plain and not target.parts for target in layout.targets)


def common_layout(layouts: Iterable[Layout]) -> Layout:
    """Return the layout of a group, which has room for all ranks; the scales are arguments."""
    found = list(layouts)
    if all(map(is_plain, found)):
        return union(found)
    if any(layout != found[0] for layout in found):
        raise ConfigError(
            "members with a kind of update other than lora, or with parts, can train at once only "
            "if they have the same layout: the same lora.kind, rank, alpha, scaling and targets"
        )
    return found[0]


CPU_MEMBERS = 4
"""Members at once on a CPU: `python -m benchmarks.sweep --crossing` found no better number."""


def group_step(
    workload: Workload,
    layout: Layout,
    parts: int = 1,
    at_once: int | None = None,
    rate: float = 0.0,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """Return the step of a group, `step(state, settings, active, frozen, batch)`.

    All arguments of the step but `frozen` have a leading axis of N members:

      state: the states in the common shapes (`lora_jax.sweeps.padded_state`).
      settings: `Settings`.
      active: [N] bool. Nothing of a member that is not active changes: no count, decay or key.
      frozen: the base that all share.
      batch: the batches, padded to common shapes.
    """

    def step(
        state: State, settings: Settings, active: jax.Array, frozen: Tree, batch: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        def member(own: Any) -> tuple[State, dict[str, jax.Array]]:
            state, settings, active, batch = own
            tx = adamw(settings.hyper)
            scales = settings.scales or None
            take = train_step(workload, layout, tx, "skip", parts, scales, rate)
            new, metrics = take(state, frozen, batch)
            go = active & (settings.skip | (state.skipped == 0))
            return jax.tree.map(lambda x, old: jnp.where(go, x, old), new, state), metrics

        own = (state, settings, active, batch)
        if at_once is None or at_once >= len(active):
            return jax.vmap(member)(own)
        return jax.lax.map(member, own, batch_size=at_once)

    return step
