"""Models of Keras."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

import lora_jax
from tests.cases import normal
from tests.foreign.register import IDS, IMAGE, Built, X, model


def keras_model(net: Any, *args: Any, **kwargs: Any) -> Built:
    f, params, state = lora_jax.from_keras(net)
    return (lambda p, *a: f(p, state, *a, **kwargs)), params, args


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
