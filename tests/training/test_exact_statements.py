"""Exact statements about how LoRA trains: what changes nothing, and what does not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import Factors, Layout, LoraSpec
from lora_jax.training import optimizer
from lora_jax.training.config import OptimizerConfig

RANK, STEPS = 3, 10
draw = np.random.default_rng(0).standard_normal
PARAMS = {name: draw((8, 8)) / 3 for name in ("first", "second")}
X, Y = draw((16, 8)), draw((16, 8))
START = {name: Factors(draw((8, RANK)) / 3, np.zeros((RANK, 8))) for name in PARAMS}


def f(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["first"]) @ params["second"]


def layout_of(alpha: float) -> Layout:
    return lora_jax.resolve(LoraSpec(RANK, alpha, ("first", "second")), f, PARAMS, X)


def trained(adapters: Any, tx: optax.GradientTransformation, alpha: float = 6.0) -> list[Any]:
    """Return the merged weights after each of `STEPS` steps, in float64."""
    layout = layout_of(alpha)
    g = lora_jax.adapt(layout, f)

    def loss(own: Any) -> Any:
        return jnp.mean((g(PARAMS, own["adapters"], X) - Y) ** 2)

    def step(state: Any, _: Any) -> Any:
        own, opt = state
        updates, opt = tx.update(jax.grad(loss)(own), opt, own)
        own = optax.apply_updates(own, updates)
        return (own, opt), lora_jax.merge(layout, PARAMS, own["adapters"])

    start = {"adapters": jax.tree.map(jnp.asarray, adapters), "base": {}}
    run = jax.jit(lambda own: jax.lax.scan(step, (own, tx.init(own)), length=STEPS)[1])
    merged = run(start)
    return [jax.tree.map(lambda x, i=i: np.asarray(x[i]), merged) for i in range(STEPS)]


def apart(one: list[Any], other: list[Any]) -> list[float]:
    """Return the largest difference of the merged weights after each step."""
    return [
        max(float(np.abs(a[name] - b[name]).max()) for name in PARAMS)
        for a, b in zip(one, other, strict=True)
    ]


def adam(rate_of_a: float, rate_of_b: float, eps: float) -> optax.GradientTransformation:
    """Return the optimizer of training, without clipping and warm-up."""
    config = OptimizerConfig(
        learning_rate=rate_of_a,
        loraplus_lr_ratio=rate_of_b / rate_of_a,
        schedule="constant",
        warmup=0.0,
        clip=None,
        eps=eps,
    )
    return optimizer.adamw(optimizer.hyper(config, STEPS))


def test_a_rotation_of_the_rank_changes_nothing_under_sgd_and_much_under_adam() -> None:
    with jax.enable_x64(True):
        q = np.linalg.qr(draw((RANK, RANK)))[0]
        turned = {name: Factors(own.a @ q, own.b) for name, own in START.items()}
        sgd = apart(trained(START, optax.sgd(0.5)), trained(turned, optax.sgd(0.5)))
        assert max(sgd) < 1e-6
        moved = trained(START, optax.sgd(0.5))
        assert np.abs(moved[-1]["first"] - PARAMS["first"]).max() > 1e-2, "nothing is trained"
        tx = adam(1e-2, 1e-2, 1e-8)
        assert apart(trained(START, tx), trained(turned, tx))[-1] > 1e-3


@pytest.mark.parametrize("eps", [1e-30, 1e-3])
def test_a_scale_of_the_factors_is_a_rate_under_adam_without_eps(eps: float) -> None:
    """A times p, its rate times p, B's rate times q, and alpha / (p q): the same training.

    `eps` is added to the root of the second moment. It must not matter next to the gradient; it is
    not exactly 0 here, because A's first gradient is, and 0 / 0 is not a number.
    """
    p, q = 3.0, 0.2
    with jax.enable_x64(True):
        scaled = {name: Factors(p * own.a, own.b) for name, own in START.items()}
        one = trained(START, adam(1e-2, 2e-2, eps))
        other = trained(scaled, adam(p * 1e-2, q * 2e-2, eps), 6.0 / (p * q))
        found = apart(one, other)
        assert np.abs(one[-1]["first"] - PARAMS["first"]).max() > 1e-2, "nothing is trained"
    assert max(found) < 1e-6 if eps < 1e-20 else found[-1] > 1e-4


def test_step_0_over_a_bfloat16_base_is_the_base_bit_for_bit() -> None:
    params = {name: jnp.asarray(w, jnp.bfloat16) for name, w in PARAMS.items()}
    x = jnp.asarray(X, jnp.bfloat16)
    layout = layout_of(6.0)
    adapters = lora_jax.init(jax.random.key(0), layout)
    g = lora_jax.adapt(layout, f)
    np.testing.assert_array_equal(jax.jit(g)(params, adapters, x), jax.jit(f)(params, x))
    np.testing.assert_array_equal(
        lora_jax.merge(layout, params, adapters)["first"], params["first"]
    )
