"""The bridges to other libraries' models return a pure function, its parameters and its state.

The bridge to Equinox is tested here on a class that is a tree by JAX alone; Equinox and Keras
themselves are tested in tests/foreign.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


# --- Equinox: any callable tree ------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Gathered:
    """A lookup by integers, then a product; each leaf is of a different sort."""

    weight: Any  # float
    order: Any  # int
    key: Any
    activation: Callable[[Any], Any]  # not an array
    rate: float

    def __call__(self, x: Any) -> Any:
        noise = self.rate * jax.random.normal(self.key, x.shape)
        return self.activation(self.weight @ x[self.order] + (self.weight @ noise))

    def forward(self, x: Any) -> Any:
        return self(x)


def gathered() -> Gathered:
    weight = jax.random.normal(jax.random.key(0), (3, 4))
    return Gathered(weight, jnp.array([3, 1, 0, 2]), jax.random.key(1), jnp.tanh, 0.5)


def test_every_array_of_a_tree_is_an_argument() -> None:
    f, params, state = lora_jax.from_equinox(gathered(), method="forward")
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(f(params, state, x)[0], gathered()(x))
    assert list(lora_jax.paths.flatten(params)) == ["weight"]
    assert len(jax.tree.leaves(state)) == 2
    closed = jax.make_jaxpr(f)(params, state, x)
    assert not closed.consts
    layout = lora_jax.resolve(LoraSpec(2, 2.0, "weight"), f, params, state, x)
    adapters = jax.tree.map(jnp.ones_like, lora_jax.init(jax.random.key(0), layout))
    out, _ = lora_jax.adapt(layout, f)(params, adapters, state, x)
    merged = lora_jax.merge(layout, params, adapters)
    np.testing.assert_allclose(out, f(merged, state, x)[0], rtol=1e-5)


@pytest.mark.parametrize(
    "model",
    [jnp.tanh, Gathered, nnx, {"ids": jnp.arange(3)}],
    ids=["function", "class", "module", "tree"],
)
def test_a_model_without_weights_is_refused(model: Any) -> None:
    with pytest.raises(lora_jax.LoraError, match=r"no floating-point array.*from_keras"):
        lora_jax.from_equinox(model)


@pytest.mark.parametrize("model", [jnp.tanh, Gathered, gathered()], ids=["f", "class", "other"])
def test_what_is_no_keras_model_is_refused(model: Any) -> None:
    with pytest.raises(lora_jax.LoraError, match=r"Keras 3.*stateless_call.*got "):
        lora_jax.from_keras(model)
