"""The optimizer has its settings as data, and equals optax with the same settings as constants."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.training import optimizer
from lora_jax.training.config import Config, ConfigError, LoraConfig, OptimizerConfig
from lora_jax.updates import Directed, Shift, Vectors
from lora_jax.updates.factors import Factors

CONFIGS = (
    OptimizerConfig(learning_rate=3e-3, schedule="linear", weight_decay=0.1, clip=0.5),
    OptimizerConfig(learning_rate=1e-2, schedule="cosine", clip=None, b1=0.8, b2=0.95, warmup=0),
    OptimizerConfig(learning_rate=2e-3, schedule="constant", head_learning_rate=8e-3, eps=1e-5),
    OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup=0.5, clip=100.0),
    OptimizerConfig(1e-3, 3e-3, loraplus_lr_ratio=16.0, weight_decay=0.3, no_decay=("bias",)),
    OptimizerConfig(1e-3, weight_decay=0.3, no_decay=("norm", "magnitude")),
)
STEPS = 30


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule made of optax's own parts."""
    peak, rise = config.learning_rate, round(config.warmup * steps)
    rest = max(steps - rise, 1)
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    warmup = optax.linear_schedule(peak / (rise + 1), peak, max(rise, 1))
    return optax.join_schedules([warmup, decay], [rise])


def reference(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    rate = schedule(config, steps)
    mask = lambda like: jax.tree.map(lambda x: x not in config.no_decay, optimizer.labels(like))  # noqa: E731
    adamw = optax.adamw(
        rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=mask
    )
    ratio = (config.head_learning_rate or config.learning_rate) / config.learning_rate
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    base = {"adapters": False, "base": True}
    of_b = lambda like: jax.tree.map(lambda x: x == "b", optimizer.labels(like))  # noqa: E731
    plus = optax.masked(optax.scale(config.loraplus_lr_ratio), of_b)
    return optax.chain(clip, adamw, optax.masked(optax.scale(ratio), base), plus)


def trained(dtype: Any = jnp.float32) -> Any:
    draw = np.random.default_rng(0).standard_normal
    one = lambda *shape: jax.device_put(draw(shape).astype(np.float32))  # noqa: E731
    base = {"head/kernel": (4, 3), "head/bias": (3,), "norm/scale": (4,)}
    return {
        "adapters": {"w": Factors(one(5, 2), one(2, 4))},
        "base": {path: jax.device_put(draw(s).astype(dtype)) for path, s in base.items()},
    }


def gradients(like: Any) -> Any:
    """Return one gradient for each step; some of the configs clip gradients of this norm."""
    draw = np.random.default_rng(2).standard_normal
    return jax.tree.map(lambda x: (draw((STEPS, *x.shape)) / 4).astype(x.dtype), like)


def first_step(tx: optax.GradientTransformation, like: Any) -> Any:
    first = jax.tree.map(lambda x: x[0], gradients(like))
    return jax.jit(lambda like: tx.update(first, tx.init(like), like)[0])(like)


def run(tx: optax.GradientTransformation, like: Any) -> Any:
    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (like, tx.init(like)), gradients(like))
    return params


@pytest.mark.parametrize("kind", optimizer.KINDS)
@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 40), (0.1, 40), (0.06, 7), (0.99, 40)])
def test_the_rates_are_those_of_optax(kind: Any, warmup: float, steps: int) -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule=kind, warmup=warmup)
    counts = np.arange(steps + 3)
    wanted = jax.jit(jax.vmap(schedule(config, steps)))(counts)
    settings = optimizer.hyper(config, steps)
    np.testing.assert_allclose(jax.jit(optimizer.rate)(settings, counts), wanted, atol=1e-6)
    np.testing.assert_allclose(optimizer.rate(settings, counts, np), wanted, atol=1e-6)


def test_all_kinds_in_one_program_are_adamw_of_optax() -> None:
    """One vmapped program for all configs equals the AdamW of optax for each of them."""
    settings = [optimizer.hyper(config, STEPS) for config in CONFIGS]
    stacked = jax.tree.map(lambda *x: np.stack(x), *settings)
    one = jax.jit(lambda h, like: run(optimizer.adamw(h), like))
    together = jax.jit(jax.vmap(one, (0, None)))(stacked, trained())
    for i, config in enumerate(CONFIGS):
        wanted = jax.jit(lambda like, c=config: run(reference(c, STEPS), like))(trained())
        alone = one(settings[i], trained())
        for x, y, z in zip(*map(jax.tree.leaves, (together, alone, wanted)), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(x[i], z, rtol=1e-4, atol=1e-5)


def test_the_state_has_one_structure_whatever_the_settings() -> None:
    states = [optimizer.adamw(optimizer.hyper(c, STEPS)).init(trained()) for c in CONFIGS]
    assert len({str(jax.tree.map(lambda x: (x.shape, x.dtype), s)) for s in states}) == 1


def test_bfloat16_parameters_are_clipped_and_moved() -> None:
    """bfloat16 parameters are clipped and moved."""
    config = dataclasses.replace(CONFIGS[0], clip=1e-3, learning_rate=0.5)
    tx, like = optimizer.adamw(optimizer.hyper(config, STEPS)), trained(jnp.bfloat16)
    updates = first_step(tx, like)
    moved = optax.apply_updates(like, updates)
    for path, before in like["base"].items():
        assert moved["base"][path].dtype == jnp.bfloat16
        assert not np.array_equal(moved["base"][path], before)


def test_loraplus_moves_b_so_many_times_as_far_as_a() -> None:
    """LoRA+ multiplies the rate of B alone; Adam's first step has the size of the rate."""
    config = OptimizerConfig(1e-3, schedule="constant", warmup=0.0, loraplus_lr_ratio=16.0)
    tx, like = optimizer.adamw(optimizer.hyper(config, STEPS)), trained()
    updates = first_step(tx, like)
    np.testing.assert_allclose(np.abs(updates["adapters"]["w"].a), 1e-3, rtol=1e-4)
    np.testing.assert_allclose(np.abs(updates["adapters"]["w"].b), 16e-3, rtol=1e-4)
    np.testing.assert_allclose(np.abs(updates["base"]["head/kernel"]), 1e-3, rtol=1e-4)


def test_a_parameter_named_b_is_no_factor() -> None:
    assert optimizer.labels({"base": {"b": 0, "a": 0}}) == {"base": {"b": "weight", "a": "weight"}}


def test_labels_of_other_kinds() -> None:
    kinds = {"w": Directed(0, 0, 0), "v": Vectors(0, 0), "c": Shift(0)}
    assert optimizer.labels(kinds) == {
        "w": Directed("a", "b", "magnitude"),
        "v": Vectors("lambda_d", "lambda_b"),
        "c": Shift("bias"),
    }
    with pytest.raises(ConfigError, match=r"loraplus_lr_ratio must be 1 with lora.kind vera"):
        Config(
            workload=lambda config: None,
            lora=LoraConfig(kind="vera"),
            optimizer=OptimizerConfig(loraplus_lr_ratio=4.0),
        )


def test_labels_partition_an_optimizer() -> None:
    adapters = trained()["adapters"]
    rates = {"a": optax.sgd(1.0), "b": optax.sgd(2.0)}
    tx = optax.partition(rates, optimizer.labels)
    updates, _ = tx.update(adapters, tx.init(adapters))
    np.testing.assert_allclose(updates["w"].a, -adapters["w"].a)
    np.testing.assert_allclose(updates["w"].b, -2 * adapters["w"].b)
