"""The step of a group: the step of one run, vmapped over the members.

What a member's step would do alone it does here, on its own slice: its loss is its own mean, its
gradient is clipped by its own norm, its Adam counts its own steps. Only the base has no axis of
members, so each product with a base weight is one product for all.

A device that is kept busy by some members gains nothing from more of them, and a CPU loses: what
they compute outgrows its caches. So the members may go through the step a few at a time, one after
the other within the one program (`at_once`): the same numbers, and less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.layout import Layout
from lora_jax.multi.stack import union
from lora_jax.training.config import ConfigError
from lora_jax.training.optimizer import Hyper, adamw
from lora_jax.training.state import State
from lora_jax.training.step import train_step
from lora_jax.training.workload import Workload

Tree = Any  # a pytree
# path -> alpha / rank; 0 where a member does not adapt the path. {}: they are the layout's.
Scales = dict[str, Any]


class Settings(NamedTuple):
    """What differs between members and does not change; each leaf is [N] for N of them.

    hyper: of the optimizer.
    scales: of the adapters.
    skip: bool; whether a step that is not finite is passed over, or is the last that counts.
    """

    hyper: Hyper
    scales: Scales
    skip: Any


def is_plain(layout: Layout) -> bool:
    """Whether every update is LoRA of a whole weight, whose ranks can be filled up with zeros."""
    return all(target.kind == "lora" and not target.parts for target in layout.targets)


def common_layout(layouts: Iterable[Layout]) -> Layout:
    """The layout of a group: that in which all ranks have room, the members' scales being data.

    Raises:
      ConfigError: members of another kind than LoRA that have not the same layout.
    """
    found = list(layouts)
    if all(map(is_plain, found)):
        return union(found)
    if any(layout != found[0] for layout in found):
        raise ConfigError(
            "members with another kind of update than lora, or with parts, train at once only if "
            "they have the same layout: the same lora.kind, rank, alpha, scaling and targets"
        )
    return found[0]


CPU_MEMBERS = 4
"""Members at once on a CPU: `python -m benchmarks.sweep --crossing` has found none better."""


def group_step(
    workload: Workload,
    layout: Layout,
    parts: int = 1,
    at_once: int | None = None,
    rate: float = 0.0,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """`step(state, settings, active, frozen, batch) -> (state, metrics)` for N members.

    Args of the step: all but `frozen` have a leading axis of members.
      state: in the common shapes (`lora_jax.groups.padded_state`).
      settings: `Settings`.
      active: [N] bool. Of a member that is not, nothing changes: no count, no decay, no key.
      frozen: the base that all share.
      batch: each member's, padded to common shapes.

    Args:
      workload: joined (`Workload.join`), so that its parameters have the common shapes.
      layout: the union of the members' layouts.
      parts, rate: as in `train_step`.
      at_once: members that are stepped as one, after which the next are. None: all.
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
