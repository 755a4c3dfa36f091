"""DoRA's factored norm, compared with the dense formula; its gradients and its costs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Target
from lora_jax.base import Base
from lora_jax.updates import Directed, Dora
from lora_jax.updates.factors import in_w_order
from tests.updates import forms
from tests.updates.forms import arrays, name_of, weight

TARGETS = [t for t in forms.TARGETS if t.kind == "dora"]
DORA = Dora()


def dense_gain(target: Target, parameters: Directed, w: Any) -> Any:
    """The definition of the gain: a dense sum, and a norm that is not differentiated."""
    v = w + DORA.delta(target, parameters, w.dtype)
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(v**2, axis=target.inputs, keepdims=True)))
    return in_w_order(target, parameters.magnitude, target.outputs) / norm


def product(target: Target, x: Any, w: Any) -> Any:
    """A program that multiplies x [*stack, rows, *inputs] by w."""
    letters = {i: chr(ord("a") + i) for i in range(len(target.shape))}
    text = lambda which: "".join(letters[i] for i in which)  # noqa: E731
    stack, inputs, outputs = map(text, (target.stack, target.inputs, target.outputs))
    equation = f"{stack}z{inputs},{text(range(len(target.shape)))}->{stack}z{outputs}"
    return jnp.einsum(equation, x, w, precision="highest")


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_value_and_gradients_in_float64(target: Target) -> None:
    with jax.enable_x64(True):
        parameters, w = arrays(target, dtype=jnp.float64), weight(target, dtype=jnp.float64)
        shape = (*target.sizes(target.stack), 5, *target.sizes(target.inputs))
        x = jax.device_put(np.random.default_rng(3).standard_normal(shape))

        def fast(p: Directed, x: Any) -> Any:
            v = w + DORA.delta(target, p, jnp.float64)
            gain = DORA.gains(target, p, w).outputs
            rows = jnp.expand_dims(gain, len(target.stack))
            return jnp.sum(jnp.sin(rows * product(target, x, v)))

        def definition(p: Directed, x: Any) -> Any:
            whole = dense_gain(target, p, w) * (w + DORA.delta(target, p, jnp.float64))
            return jnp.sum(jnp.sin(product(target, x, whole)))

        def merged(p: Directed, x: Any) -> Any:
            return jnp.sum(jnp.sin(product(target, x, DORA.merged(target, p, w))))

        both = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(parameters, x)  # noqa: E731
        want = both(definition)
        for got in map(both, (fast, merged)):
            for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_in_float32_and_over_bfloat16(target: Target) -> None:
    """The gain is float32 for every dtype of W: in bfloat16, a trained gain of 1.001 would be 1."""
    parameters = arrays(target)
    for dtype in (jnp.float32, jnp.bfloat16):
        w = weight(target, dtype=dtype)
        got = jax.jit(functools.partial(DORA.gains, target))(parameters, w).outputs
        got = in_w_order(target, got, target.outputs)
        assert got.dtype == jnp.float32
        exact = weight(target, dtype=dtype).astype(jnp.float32)
        want = jax.jit(functools.partial(dense_gain, target))(parameters, exact)
        np.testing.assert_allclose(got, want, rtol=2e-6)


def test_the_gain_of_the_start_is_one() -> None:
    target = TARGETS[0]
    w = weight(target).astype(jnp.bfloat16)
    start = DORA.init(
        jax.random.key(0), target, jnp.float32, lambda k, t, d: jnp.ones(t.a_shape, d), w
    )
    np.testing.assert_allclose(DORA.gains(target, start, w).outputs, 1.0, rtol=1e-6)


def test_an_output_of_zero_stays() -> None:
    target = Target("w", (3, 2), (), (0,), (1,), 1, 1.0, kind="dora")
    w = jnp.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    parameters = Directed(jnp.ones((3, 1)), jnp.zeros((1, 2)), jnp.array([0.0, 1.0]))

    def total(p: Directed) -> Any:
        return DORA.merged(target, p, w).sum() + DORA.gains(target, p, w).outputs.sum()

    value, grads = jax.jit(jax.value_and_grad(total))(parameters)
    assert np.isfinite([value, *map(np.sum, grads)]).all()
    assert (DORA.merged(target, parameters, w)[:, 0] == 0).all()


def test_cancellation_does_not_give_nan() -> None:
    """W + scale * a @ b = 0 gives no NaN, although its sum of squares may round below zero."""
    key = jax.random.split(jax.random.key(0))
    a, b = jax.random.normal(key[0], (256, 1)), jax.random.normal(key[1], (1, 64))
    target = Target("w", (256, 64), (), (0,), (1,), 1, 1.0, kind="dora")
    gain = DORA.gains(target, Directed(a, b, jnp.ones(64)), -(a @ b)).outputs
    assert not jnp.isnan(gain).any()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes(Base):
    """int8 codes [*lead, in, out], with a scale for each of [*lead, out]."""

    codes: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> Any:
        return self.scales.dtype

    def dense(self) -> jax.Array:
        return self.codes.astype(self.dtype) * self.scales[..., None, :]


def test_a_quantised_stack_is_dequantised_slice_by_slice() -> None:
    target = Target("w", (16, 256, 256), (0,), (1,), (2,), 4, 4.0, kind="dora")
    parameters = arrays(target)
    scales = jnp.linspace(0.01, 0.02, 16 * 256).reshape(16, 256)
    codes = jax.random.randint(jax.random.key(0), target.shape, -127, 128, jnp.int8)
    base = Codes(codes, scales)
    run = jax.jit(lambda p, w: DORA.gains(target, p, w).outputs).lower(parameters, base).compile()
    assert run.memory_analysis().temp_size_in_bytes < base.size  # a dense stack has 4 * size
    want = DORA.gains(target, parameters, base.dense()).outputs
    np.testing.assert_allclose(run(parameters, base), want, rtol=1e-6)
    merged = DORA.merged(target, parameters, base)
    np.testing.assert_array_equal(merged, DORA.merged(target, parameters, base.dense()))


def test_no_product_of_the_factors_is_formed() -> None:
    target = Target("w", (48, 40), (), (0,), (1,), 4, 4.0, kind="dora")
    jaxpr = jax.make_jaxpr(lambda p, w: DORA.gains(target, p, w).outputs)(
        arrays(target), weight(target)
    )
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert products
    assert all(e.outvars[0].aval.size < 48 * 40 for e in products)


@pytest.mark.few(1)
@pytest.mark.parametrize("program", ["dot", "conv", "scan"])
def test_bfloat16_is_composed_in_float32(program: str) -> None:
    key = jax.random.split(jax.random.key(0))
    draw = lambda k, *shape: jax.random.normal(k, shape, jnp.bfloat16)  # noqa: E731
    if program == "conv":
        f = lambda p, x: jax.lax.conv(x, p["w"], (1, 1), "SAME")  # noqa: E731
        w, x = draw(key[0], 64, 32, 3, 3), draw(key[1], 4, 32, 16, 16)
    elif program == "dot":
        f = lambda p, x: x @ p["w"]  # noqa: E731
        w, x = draw(key[0], 256, 128), draw(key[1], 512, 256)
    else:
        f = lambda p, x: jax.lax.scan(lambda x, w: (x, x @ w), x, p["w"])[1]  # noqa: E731
        w, x = draw(key[0], 2, 256, 128), draw(key[1], 256, 256)
    layout = lora_jax.resolve(lora_jax.LoraSpec(2, 2.0, "w", kind="dora"), f, {"w": w}, x)
    start = lora_jax.init(jax.random.key(0), layout, params={"w": w})["w"]
    adapters = {"w": start._replace(magnitude=1.001 * start.magnitude)}
    got = jax.jit(lora_jax.adapt(layout, f))({"w": w}, adapters, x)
    assert got.dtype == jnp.bfloat16
    exact = jax.jit(f)({"w": w.astype(jnp.float32)}, x.astype(jnp.float32))
    ratio = np.sum(np.asarray(got, np.float32) * exact) / np.sum(np.square(exact))
    assert abs(float(ratio) - 1.001) < 1e-4
    run = lambda ad, x: lora_jax.adapt(layout, f)({"w": w}, ad, x).astype(jnp.float32)  # noqa: E731
    grad = lambda run: jax.jit(jax.grad(lambda ad, x: (run(ad, x) * exact).sum(), (0, 1)))  # noqa: E731
    moved, along = grad(run)(adapters, x)
    slow = lambda ad, x: f(  # noqa: E731
        lora_jax.merge(layout, {"w": w.astype(jnp.float32)}, ad), x.astype(jnp.float32)
    )
    want = grad(slow)(adapters, x)
    for got, other in zip(jax.tree.leaves((moved, along)), jax.tree.leaves(want), strict=True):
        got, other = (np.asarray(x, np.float32).ravel() for x in (got, other))
        assert np.linalg.norm(got - other) <= 0.01 * np.linalg.norm(other)
