"""The adapter of a run over the base as it is stored: the base that other tools load."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from lora_jax.adapters import Adapter
from lora_jax.analysis.from_base import init_from_base
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.models.weights.assemble import load_one
from lora_jax.models.weights.stored import parameters
from lora_jax.serving.served_adapters import Served
from lora_jax.spec import Target
from lora_jax.updates import Factors, kind_of


def over_stored_base(run: Served) -> Adapter:
    """Return an adapter with the same effect on the stored base as the run's has on its own base.

    The two bases differ only for a run that started with a part of W (PiSSA, OLoRA). Its base is
    `W - s a0 b0`, so over W its update is `s a b - s a0 b0`, of twice the rank. The first factors
    are computed again.
    """
    if run.changed_by is None:
        return run.member.adapter
    dora = [t.path for t in run.member.layout.targets if kind_of(t).rescales]
    if run.recipe is not None or dora:
        what = "quantised base" if run.recipe is not None else f"base under {dora[0]!r}"
        raise LoraError(
            f"{run.member.folder} began by {run.changed_by}, which left a {what} that no other "
            "tool has: an adapter alone cannot say it. Merge it: --format hf"
        )
    config = run.config
    stored = run.source.stored(config)
    known = {run.root + p.path: p for p in parameters(stored, config, None)}
    targets: list[Target] = []
    adapters: dict[str, Any] = {}
    for target in run.member.layout.targets:
        w = load_one(stored, known[target.path], config)
        initial = init_from_base(Layout((target,)), {target.path: w}, run.changed_by)
        first, now = initial.adapters[target.path], run.member.parameters[target.path]
        more = 2 if target.scaling == "alpha/r" else math.sqrt(2)  # keeps the scale
        targets.append(dataclasses.replace(target, rank=2 * target.rank, alpha=target.alpha * more))
        rank_axis = len(target.stack)  # b is [*stack, rank, *outputs]
        a = jnp.concatenate([now.a, first.a], axis=-1)
        b = jnp.concatenate([now.b, -first.b], axis=rank_axis)
        adapters[target.path] = Factors(a, b)
    return Adapter(Layout(tuple(targets)), adapters, dict(run.member.trainable))
