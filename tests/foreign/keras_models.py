"""Keras."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from tests.cases import normal
from tests.foreign.register import IDS, IMAGE, Built, X, model


def keras_model(net: Any, *args: Any, training: bool = False) -> Built:
    """Keras's stateless call: the trainable variables by their paths, all else an argument."""
    params = {v.path: v.value for v in net.trainable_variables}
    state = [v.value for v in net.non_trainable_variables]

    def f(p: Any, state: Any, *args: Any) -> Any:
        return net.stateless_call(list(p.values()), state, *args, training=training)

    paths = list(params)
    ordered = lambda p, *a: f({path: p[path] for path in paths}, *a)  # noqa: E731
    return ordered, params, (state, *args)


@model("keras")
def keras_mlp(keras: Any) -> Built:
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="relu")(inputs)
    x = keras.layers.BatchNormalization()(x)
    net = keras.Model(inputs, keras.layers.Dense(5)(x))
    return keras_model(net, X, training=True)


@model("keras")
def keras_mobile_net_v2(keras: Any) -> Built:
    net = keras.applications.MobileNetV2((32, 32, 3), 0.35, weights=None, classes=5)
    return keras_model(net, jnp.tile(IMAGE, (2, 2, 1))[None])


@model("keras")
def keras_transformer_layer(keras: Any) -> Built:
    inputs = keras.Input((7,), dtype="int32")
    x = keras.layers.Embedding(13, 6)(inputs)
    x = x + keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.EinsumDense("btd,de->bte", (7, 8), activation="gelu")(x)
    net = keras.Model(inputs, keras.layers.Dense(13)(x))
    return keras_model(net, IDS[None])


@model("keras")
def keras_recurrent_and_separable(keras: Any) -> Built:
    inputs = keras.Input((8, 6))
    x = keras.layers.SeparableConv1D(5, 3)(inputs)
    x = keras.layers.DepthwiseConv1D(3, depth_multiplier=2, padding="same")(x)
    x = keras.layers.LSTM(4, return_sequences=True)(x)
    x = keras.layers.GRU(4)(x)
    net = keras.Model(inputs, keras.layers.Dense(3)(x))
    return keras_model(net, normal(3, 1, 8, 6))
