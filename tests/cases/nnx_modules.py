"""Modules of Flax NNX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

import lora_jax
from tests.cases.case import B, T, case, normal


def from_nnx(model: nnx.Module, *args: Any, targets: tuple[str, ...]) -> Any:
    f, params, state = lora_jax.from_nnx(model)
    return (lambda p, *a: f(p, state, *a)[0]), params, args, targets


@case
def nnx_linear() -> Any:
    model = nnx.Linear(10, 14, rngs=nnx.Rngs(0))
    return from_nnx(model, normal(1, B, T, 10), targets=("kernel",))


@case
def nnx_linear_general() -> Any:
    model = nnx.LinearGeneral((2, 5), (3, 7), axis=(-2, -1), rngs=nnx.Rngs(0))
    return from_nnx(model, normal(1, B, T, 2, 5), targets=("kernel",))


@case
def nnx_einsum() -> Any:
    model = nnx.Einsum("btd,hdk->bthk", (2, 10, 7), rngs=nnx.Rngs(0))
    return from_nnx(model, normal(1, B, T, 10), targets=("kernel",))


@case
def nnx_conv_1d() -> Any:
    model = nnx.Conv(10, 14, (3,), rngs=nnx.Rngs(0))
    return from_nnx(model, normal(1, B, 8, 10), targets=("kernel",))


@case
def nnx_conv_2d_grouped_strided() -> Any:
    model = nnx.Conv(9, 12, (3, 2), strides=(1, 2), feature_group_count=3, rngs=nnx.Rngs(0))
    return from_nnx(model, normal(1, 2, 7, 6, 9), targets=("kernel",))


@case
def nnx_embed() -> Any:
    model = nnx.Embed(23, 9, rngs=nnx.Rngs(0))
    return from_nnx(model, jnp.array([[3, 0, 21], [1, 1, 22]]), targets=("embedding",))


class _NnxTied(nnx.Module):
    def __init__(self) -> None:
        self.table = nnx.Embed(23, 9, rngs=nnx.Rngs(0))

    def __call__(self, ids: Any) -> Any:
        return self.table.attend(jnp.tanh(self.table(ids)))


@case
def nnx_embed_tied() -> Any:
    ids = jnp.array([[3, 0, 21, 7], [1, 1, 22, 2]])
    return from_nnx(_NnxTied(), ids, targets=("table/embedding",))


@case
def nnx_attention() -> Any:
    model = nnx.MultiHeadAttention(
        2, 10, qkv_features=14, out_features=11, decode=False, rngs=nnx.Rngs(0)
    )
    return from_nnx(model, normal(1, B, T, 10), targets=("{query,key,value,out}/kernel",))


class _NnxScanned(nnx.Module):
    def __init__(self) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(10, 10, rngs=rngs)

        self.layers = make(nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: Any, layer: Any) -> Any:
            return x + jnp.tanh(layer(x))

        return run(x, self.layers)


@case
def nnx_scan() -> Any:
    return from_nnx(_NnxScanned(), normal(1, 2, 10), targets=("layers/kernel",))
