"""`from_equinox` and `from_keras` on real models: state is updated, and misuse is a clear error."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.foreign.register import KEY, X

pytestmark = pytest.mark.filterwarnings("default")  # other people's warnings


@pytest.fixture
def eqx() -> Any:
    return pytest.importorskip("equinox")


@pytest.fixture
def keras() -> Any:
    return pytest.importorskip("keras")


# --- Equinox -------------------------------------------------------------------------------------


def normed(eqx: Any) -> Any:
    norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
    return eqx.nn.Sequential([eqx.nn.Linear(6, 4, key=KEY), norm])


def test_equinox_state_moves_on(eqx: Any) -> None:
    model, first = eqx.nn.make_with_state(normed)(eqx)
    f, params, state = lora_jax.from_equinox(model, first)
    batched = jax.jit(jax.vmap(f, (None, None, 0), (0, None), axis_name="batch"))
    own = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    y, once = batched(params, state, X)
    want, first = own(X, first)
    np.testing.assert_allclose(y, want, atol=1e-6)
    y, twice = batched(params, once, X)
    want, first = own(X, first)
    np.testing.assert_allclose(y, want, atol=1e-6)
    for got, expected in zip(jax.tree.leaves(twice), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert set(lora_jax.paths.flatten(params)) == {
        f"layers/{i}/{name}" for i in range(2) for name in ("weight", "bias")
    }


def test_equinox_state_that_is_missing_or_left_in(eqx: Any) -> None:
    model, _ = eqx.nn.make_with_state(normed)(eqx)
    f, params, state = lora_jax.from_equinox(model)
    with pytest.raises(lora_jax.LoraError, match=r"a Sequential needs a state.*make_with_state"):
        f(params, state, X[0])
    with pytest.raises(lora_jax.LoraError, match=r"initial state.*make_with_state"):
        lora_jax.from_equinox(normed(eqx))


def test_equinox_model_that_returns_no_state(eqx: Any) -> None:
    class Net(eqx.Module):
        layers: Any

        def __call__(self, x: Any, state: Any) -> Any:
            return self.layers(x, state)[0]

    model, first = eqx.nn.make_with_state(lambda: Net(normed(eqx)))()
    f, params, state = lora_jax.from_equinox(eqx.nn.inference_mode(model), first)
    with pytest.raises(lora_jax.LoraError, match=r"a Net was given state=.*\(output, new_state\)"):
        f(params, state, X[0])


def test_equinox_in_training_mode(eqx: Any) -> None:
    model = eqx.nn.Sequential([eqx.nn.Linear(6, 4, key=KEY), eqx.nn.Dropout(0.5)])
    f, params, state = lora_jax.from_equinox(model)
    spec = lora_jax.LoraSpec(2, targets="layers/0/weight")
    with pytest.raises(RuntimeError, match="Dropout requires a key"):
        lora_jax.resolve(spec, f, params, state, X[0])
    with_key = functools.partial(f, key=KEY)
    layout = lora_jax.resolve(spec, with_key, params, state, X[0])
    adapters = lora_jax.init(KEY, layout)
    y, _ = lora_jax.adapt(layout, with_key)(params, adapters, state, X[0])
    np.testing.assert_allclose(y, model(X[0], key=KEY), atol=1e-6)


def test_equinox_without_arrays(eqx: Any) -> None:
    with pytest.raises(lora_jax.LoraError, match="a Lambda has no floating-point array"):
        lora_jax.from_equinox(eqx.nn.Lambda(jnp.tanh))


def test_merged_weights_go_back_into_equinox(eqx: Any) -> None:
    model = eqx.nn.Linear(6, 4, key=KEY)
    _, params, _ = lora_jax.from_equinox(model)
    doubled = eqx.combine(jax.tree.map(lambda x: 2 * x, params), model)
    np.testing.assert_allclose(doubled(X[0]), 2 * model(X[0]), atol=1e-6)


# --- Keras ---------------------------------------------------------------------------------------


def dropped(keras: Any) -> Any:
    inputs = keras.Input((6,))
    x = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization(name="norm")(inputs))
    return keras.Model(inputs, keras.layers.Dense(4, name="dense")(keras.layers.Dropout(0.5)(x)))


def test_keras_seeds_and_statistics_move_on(keras: Any) -> None:
    model = dropped(keras)
    f, params, state = lora_jax.from_keras(model)
    step = jax.jit(functools.partial(f, training=True))
    one, after = step(params, state, X)
    two, last = step(params, after, X)
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(step(params, state, X)[0], one)
    moved = {path for path in state if not np.array_equal(state[path], last[path])}
    assert moved == set(state) and len(state) == 4
    read, same = f(params, state, X)
    np.testing.assert_allclose(read, model(X), atol=1e-6)
    assert all(np.array_equal(state[path], same[path]) for path in state)
    assert [v.path for v in model.trainable_variables] == list(params)


def test_keras_model_that_is_not_built(keras: Any) -> None:
    model = keras.Sequential([keras.layers.Dense(3)])
    with pytest.raises(lora_jax.LoraError, match=r"a Sequential is not built.*model\.build"):
        lora_jax.from_keras(model)
    model.build((None, 6))
    assert len(lora_jax.from_keras(model)[1]) == 2


def test_keras_model_that_is_frozen(keras: Any) -> None:
    model = dropped(keras)
    model.trainable = False
    with pytest.raises(lora_jax.LoraError, match=r"none of them trainable.*\.trainable = True"):
        lora_jax.from_keras(model)
    model.trainable = True
    model.get_layer("norm").trainable = False
    _, params, state = lora_jax.from_keras(model)
    assert list(params) == ["dense/kernel", "dense/bias"] and "norm/gamma" in state


def test_keras_layers_of_one_name(keras: Any) -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.one, self.two = (keras.layers.Dense(4, name="same") for _ in range(2))

        def call(self, x: Any) -> Any:
            return self.one(x) + self.two(x)

    model = Net()
    model(X)
    with pytest.raises(lora_jax.LoraError, match=r"(?s)one path:\n  net/same/bias.*name="):
        lora_jax.from_keras(model)


def test_keras_without_jax(keras: Any) -> None:
    """A model on another backend is refused; NumPy is the only other one that Keras includes."""
    program = (
        "import keras, lora_jax\n"
        "model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])\n"
        "try: lora_jax.from_keras(model)\n"
        "except lora_jax.LoraError as error: print(error)\n"
    )
    env = {**os.environ, "KERAS_BACKEND": "numpy"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert "is a numpy.ndarray, not a JAX array: set KERAS_BACKEND=jax" in done.stdout, done.stderr
