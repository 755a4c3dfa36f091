"""The NNX bridge: a pure function that moves dropout and batch statistics on as NNX does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_jax
from lora_jax import LoraSpec


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(10, 14, rngs=rngs)
        self.norm = nnx.BatchNorm(14, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(14, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.dropout(self.norm(self.first(x))))

    def encode(self, x: jax.Array) -> jax.Array:
        return self.first(x)


X = jax.random.normal(jax.random.key(0), (4, 10))


def test_same_outputs_and_state_as_the_model_itself() -> None:
    """Red if new state is dropped: the second call would draw the first call's dropout again."""
    model = Net(nnx.Rngs(0))
    f, params, state = lora_jax.from_nnx(model)
    for _ in range(2):
        out, state = f(params, state, X)
        np.testing.assert_allclose(out, model(X), rtol=1e-6)
    assert not np.allclose(state["norm"]["mean"], 0)


def test_the_model_is_not_changed() -> None:
    model = Net(nnx.Rngs(0))
    f, params, state = lora_jax.from_nnx(model)
    mean, kernel = np.array(model.norm.mean[...]), np.array(model.first.kernel[...])
    f(jax.tree.map(jnp.zeros_like, params), state, X)
    assert np.array_equal(mean, model.norm.mean[...])
    assert np.array_equal(kernel, model.first.kernel[...])


def test_another_method_and_adapted() -> None:
    f, params, state = lora_jax.from_nnx(Net(nnx.Rngs(0)), method="encode")
    layout = lora_jax.resolve(LoraSpec(2, 2.0, "first/kernel"), f, params, state, X)
    adapters = jax.tree.map(jnp.ones_like, lora_jax.init(jax.random.key(0), layout))
    out, _ = lora_jax.adapt(layout, f)(params, adapters, state, X)
    want, _ = f(lora_jax.merge(layout, params, adapters), state, X)
    np.testing.assert_allclose(out, want, rtol=1e-5)
