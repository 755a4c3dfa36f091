"""The training step: the parameters that it changes or leaves, and numbers that are not finite."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import lora_jax
from lora_jax.training import mesh, step
from lora_jax.training.config import MeshConfig
from lora_jax.training.state import State
from lora_jax.training.workload import Loss, Workload, ratios
from tests import programs

BATCH = {"x": np.ones((6, 5), np.float32), "weight": np.ones(6, np.float32)}


def apply(params: Any, batch: Any, *, train: bool, key: Any) -> jax.Array:
    return jnp.tanh(batch["x"] @ params["body"]["kernel"]) @ params["head"]["kernel"]


def loss(outputs: jax.Array, batch: Any) -> Loss:
    each = jnp.square(outputs[:, 0] - 1) * batch["weight"]
    return Loss(each.sum(), batch["weight"].sum())


def parts(targets: tuple[str, ...] = ("body/kernel",), trainable: tuple[str, ...] = ("head/**",)):
    keys = jax.random.split(jax.random.key(0))
    params = {
        "body": {"kernel": jax.random.normal(keys[0], (5, 4))},
        "head": {"kernel": jax.random.normal(keys[1], (4, 1))},
    }
    workload = Workload(
        apply=apply, loss=loss, params=params, train=lambda shard: None, trainable=trainable
    )
    spec = lora_jax.LoraSpec(rank=2, targets=targets)
    layout = lora_jax.resolve(spec, apply, params, BATCH, train=True, key=None)
    base, frozen = lora_jax.frozen.split(params, trainable)
    return workload, layout, base, frozen


def start(layout: lora_jax.Layout, base: Any, tx: Any) -> State:
    """A state before the first step, on one device."""
    grid = mesh.make(MeshConfig(), jax.devices()[:1])
    specs = {path: PartitionSpec() for path in ("body/kernel", "head/kernel")}
    return step.create(layout, base, tx, jax.random.key(2), mesh.Placement(grid, specs, None))


def run(count: int, tx: Any, batches: Any = None, on_nonfinite: Any = "stop", **kwargs: Any):
    workload, layout, base, frozen = parts(**kwargs)
    take = jax.jit(step.train_step(workload, layout, tx, on_nonfinite))
    state, found = start(layout, base, tx), []
    trained = state.trained
    for i in range(count):
        state, metrics = take(state, frozen, BATCH if batches is None else batches[i])
        found.append(jax.device_get(metrics))
    return trained, state, found


def same(x: Any, y: Any) -> bool:
    return all(
        np.array_equal(p, q) for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )


def test_it_learns_and_moves_adapters_and_head() -> None:
    before, state, metrics = run(30, optax.adamw(1e-2))
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert not same(before["base"], state.trained["base"])
    for old, new in zip(
        jax.tree.leaves(before["adapters"]), jax.tree.leaves(state.trained["adapters"]), strict=True
    ):
        assert not np.array_equal(old, new)


def test_the_step_computes_no_gradient_of_a_frozen_weight() -> None:
    """No product in the step has the shape of a frozen W0 [5, 4]; if W0 is trained, one has."""

    def shapes(targets: tuple[str, ...], trainable: tuple[str, ...]) -> set[tuple[int, ...]]:
        workload, layout, base, frozen = parts(targets, trainable)
        tx = optax.sgd(1e-2)
        take = step.train_step(workload, layout, tx, "stop")
        jaxpr = jax.make_jaxpr(take)(start(layout, base, tx), frozen, BATCH)
        return {tuple(v.aval.shape) for e in programs.equations(jaxpr) for v in e.outvars
                if e.primitive.name == "dot_general"}  # fmt: skip

    assert not shapes(("body/kernel",), ("head/**",)) & {(5, 4), (4, 5)}
    assert shapes((), ("**",)) & {(5, 4), (4, 5)}


def test_a_padded_row_without_weight_changes_nothing() -> None:
    padded = {
        "x": np.concatenate([BATCH["x"], np.full((3, 5), 7, np.float32)]),
        "weight": np.concatenate([BATCH["weight"], np.zeros(3, np.float32)]),
    }
    _, plain, _ = run(1, optax.sgd(0.1))
    _, other, _ = run(1, optax.sgd(0.1), [padded])
    for x, y in zip(jax.tree.leaves(plain.trained), jax.tree.leaves(other.trained), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_each_part_draws_from_a_key_of_its_own() -> None:
    workload, layout, base, frozen = parts()

    def noise(params: Any, batch: Any, *, train: bool, key: Any) -> jax.Array:
        outputs = apply(params, batch, train=train, key=key)
        return 0 * outputs + jax.random.uniform(key, outputs.shape)

    drawn = dataclasses.replace(
        workload, apply=noise, loss=lambda out, _: Loss(out.sum(), jnp.float32(len(out)))
    )
    tx = optax.sgd(0.1)
    state = start(layout, base, tx)
    _, metrics = jax.jit(step.train_step(drawn, layout, tx, "stop", parts=2))(state, frozen, BATCH)
    key = jax.random.fold_in(state.key, state.step)
    each = [jax.random.uniform(jax.random.fold_in(key, i), (3, 1)) for i in range(2)]
    np.testing.assert_allclose(metrics["loss"], np.mean(each), rtol=1e-6)


def poisoned(at: int, count: int) -> list[dict[str, np.ndarray]]:
    bad = {**BATCH, "x": np.where(np.arange(5) == 2, np.nan, BATCH["x"]).astype(np.float32)}
    return [bad if i == at else BATCH for i in range(count)]


def test_skip_passes_over_the_step_and_counts_it() -> None:
    """Steps with a poisoned batch among them end in the same state as the steps without it."""
    tx = optax.sgd(0.1, momentum=0.9)
    _, clean, _ = run(3, tx, [BATCH] * 3, "skip")  # the same program, so the same bits
    _, state, metrics = run(4, tx, poisoned(1, 4), "skip")
    assert [bool(m["finite"]) for m in metrics] == [True, False, True, True]
    assert (int(state.step), int(state.skipped)) == (4, 1)
    assert same(clean.trained, state.trained)
    assert same(clean.optimizer, state.optimizer)


def test_stop_freezes_the_state_at_the_last_good_step() -> None:
    """The state does not change after a bad step, so that metrics can be read a few steps late."""
    tx = optax.sgd(0.1, momentum=0.9)
    _, good, _ = run(1, tx)
    _, state, _ = run(4, tx, poisoned(1, 4), "stop")
    assert same(good.trained, state.trained)
    assert same(good.optimizer, state.optimizer)


def test_a_gradient_that_is_not_finite_counts_as_well() -> None:
    workload, layout, base, frozen = parts()
    rooted = dataclasses.replace(
        workload, loss=lambda out, _: Loss(jnp.sqrt(0.0 * out).sum(), jnp.float32(1))
    )
    tx = optax.sgd(0.1)
    take = jax.jit(step.train_step(rooted, layout, tx, "skip"))
    before = start(layout, base, tx)
    state, metrics = take(before, frozen, BATCH)
    assert metrics["loss"] == 0.0
    assert not metrics["finite"]
    assert same(before.trained, state.trained)


def test_everything_beside_and_no_targets_is_full_fine_tuning() -> None:
    """With all weights in `trainable` and none adapted, a step is plain gradient descent."""
    workload, _, _, _ = parts()
    _, state, _ = run(1, optax.sgd(0.1), targets=(), trainable=("**",))

    def plain(params: Any) -> jax.Array:
        found = loss(apply(params, BATCH, train=True, key=None), BATCH)
        return found.total / found.weight

    grads = jax.grad(plain)(workload.params)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, workload.params, grads)
    for path, value in lora_jax.paths.flatten(wanted).items():
        np.testing.assert_allclose(state.trained["base"][path], value, rtol=1e-6)


def test_a_parameter_both_adapted_and_trained_is_an_error() -> None:
    _, layout, base, _ = parts(trainable=("**",))
    with pytest.raises(lora_jax.LoraError, match="'body/kernel' is both adapted"):
        step.check_apart(layout, base)


def test_ratios_divide_each_sum_by_the_weight() -> None:
    assert ratios({"correct": 3.0}, 4.0) == {"correct": 0.75}
