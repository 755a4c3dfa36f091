"""One optimizer step and one evaluation step, as pure functions to be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lora_jax
from lora_jax.training.workload import Loss, Workload

Tree = Any  # a pytree
Trained = dict[str, Any]  # {"adapters": {path: Factors}, "base": {path: array}}


class State(NamedTuple):
    """All that a step changes, and nothing of the frozen base: this is what a checkpoint holds.

    trained: {"adapters": {path: Factors(a, b)}, "base": {path: parameter trained in full}}.
    optimizer: the optax state of `trained`.
    step: [] int32, steps taken, skipped ones included.
    skipped: [] int32, steps whose loss or gradient was not finite.
    key: the PRNG key of the run; step i uses it folded with i.
    """

    trained: Trained
    optimizer: Any
    step: jax.Array
    skipped: jax.Array
    key: jax.Array


def create(trained: Trained, tx: optax.GradientTransformation, key: jax.Array) -> State:
    """The state before the first step."""
    return State(trained, tx.init(trained), jnp.int32(0), jnp.int32(0), key)


def check_apart(layout: lora_jax.Layout, base: dict[str, Any]) -> None:
    """Raise unless no parameter is both adapted and trained in full.

    An update beside W moves nothing that W itself does not move when it is trained too.
    """
    both = [target.path for target in layout.targets if target.path in base]
    if both:
        raise lora_jax.LoraError(
            f"{both[0]!r} is both adapted (lora.targets) and trained in full (lora.beside), as are "
            f"{len(both) - 1} more; narrow one of the two, for instance --lora.targets to the "
            "encoder's part of the tree"
        )


def mean(loss: Loss) -> jax.Array:
    """Total / weight; zero for a batch without weight, whose gradient is zero too."""
    return loss.total / jnp.where(loss.weight > 0, loss.weight, 1)


def train_step(
    workload: Workload,
    layout: lora_jax.Layout,
    tx: optax.GradientTransformation,
    on_nonfinite: Literal["stop", "skip"],
) -> Callable[[State, Tree, Any], tuple[State, dict[str, jax.Array]]]:
    """`step(state, frozen, batch) -> (state, metrics)`.

    The gradient is taken with respect to `state.trained` alone; `frozen` is another argument and
    gets none. A step whose loss or gradient is not finite changes no parameter and no optimizer
    state. With "stop" no later step does either, so that the host may read the metrics late and
    still finds the state as it was before the step that `metrics["finite"]` names.
    """
    adapted = lora_jax.adapt(layout, workload.apply)

    def objective(trained: Trained, frozen: Tree, batch: Any, key: jax.Array) -> Any:
        params = lora_jax.frozen.combine(trained["base"], frozen)
        outputs = adapted(params, trained["adapters"], batch, train=True, key=key)
        loss = workload.loss(outputs, batch)
        return mean(loss), loss.weight

    def step(state: State, frozen: Tree, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, weight), grads = gradient(state.trained, frozen, batch, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        go = finite if on_nonfinite == "skip" else finite & (state.skipped == 0)
        updates, optimizer = tx.update(grads, state.optimizer, state.trained)
        taken = (optax.apply_updates(state.trained, updates), optimizer)
        kept = (state.trained, state.optimizer)
        chosen = jax.tree.map(lambda new, old: jnp.where(go, new, old), taken, kept)
        skipped = state.skipped + ~finite
        metrics = {"loss": loss, "weight": weight, "gradient_norm": norm, "finite": finite}
        return State(chosen[0], chosen[1], state.step + 1, skipped, state.key), metrics

    return step


def evaluation_step(
    workload: Workload, layout: lora_jax.Layout
) -> Callable[[Trained, Tree, Any], Loss]:
    """`evaluate(trained, frozen, batch) -> Loss`, without dropout."""
    adapted = lora_jax.adapt(layout, workload.apply)

    def evaluate(trained: Trained, frozen: Tree, batch: Any) -> Loss:
        params = lora_jax.frozen.combine(trained["base"], frozen)
        outputs = adapted(params, trained["adapters"], batch, train=False, key=None)
        return workload.loss(outputs, batch)

    return evaluate
