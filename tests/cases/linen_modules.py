"""Modules of Flax Linen."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.cases.case import B, T, case, normal


def linen(module: nn.Module, *args: Any, targets: tuple[str, ...], **kwargs: Any) -> Any:
    shapes = jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), *args)
    variables = jax.tree.map(lambda x: normal(7, *x.shape) / 3, shapes)
    return module.apply, variables, args, targets, {"kwargs": kwargs}


@case
def linen_dense() -> Any:
    return linen(nn.Dense(14), normal(1, B, T, 10), targets=("params/kernel",))


@case
def linen_dense_general_outputs() -> Any:
    return linen(nn.DenseGeneral((2, 7)), normal(1, B, T, 10), targets=("params/kernel",))


@case
def linen_dense_general_inputs() -> Any:
    module = nn.DenseGeneral(14, axis=(-2, 1))
    return linen(module, normal(1, B, 2, T, 4), targets=("params/kernel",))


@case
def linen_dense_general_batch() -> Any:
    module = nn.DenseGeneral(14, axis=-1, batch_dims=(0,))
    return linen(module, normal(1, 4, B, 10), targets=("params/kernel",))


@case
def linen_einsum() -> Any:
    module = nn.Einsum((2, 10, 7), "btd,hdk->bthk", use_bias=False)
    return linen(module, normal(1, B, T, 10), targets=("params/kernel",))


@case
def linen_conv_1d() -> Any:
    return linen(nn.Conv(14, (3,)), normal(1, B, 8, 10), targets=("params/kernel",))


@case
def linen_conv_2d_strided() -> Any:
    module = nn.Conv(14, (3, 2), strides=(2, 1), padding="VALID")
    return linen(module, normal(1, 2, 7, 8, 5), targets=("params/kernel",))


@case
def linen_conv_grouped() -> Any:
    module = nn.Conv(12, (3, 3), feature_group_count=3, kernel_dilation=(2, 1))
    return linen(module, normal(1, 2, 8, 6, 9), targets=("params/kernel",))


@case
def linen_conv_transposed() -> Any:
    module = nn.ConvTranspose(14, (3,), strides=(2,))
    return linen(module, normal(1, B, 6, 10), targets=("params/kernel",))


@case
def linen_embed() -> Any:
    ids = jnp.array([[3, 0, 21], [1, 1, 22]])
    return linen(nn.Embed(23, 9), ids, targets=("params/embedding",))


class _Tied(nn.Module):
    @nn.compact
    def __call__(self, ids: Any) -> Any:
        table = nn.Embed(23, 9, name="table")
        return table.attend(jnp.tanh(table(ids)))


@case
def linen_embed_tied() -> Any:
    ids = jnp.array([[3, 0, 21, 7], [1, 1, 22, 2]])
    return linen(_Tied(), ids, targets=("params/table/embedding",))


@case
def linen_attention() -> Any:
    module = nn.MultiHeadDotProductAttention(2, qkv_features=14, out_features=11)
    targets = ("params/{query,key,value,out}/kernel",)
    return linen(module, normal(1, B, T, 10), targets=targets)


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        h = nn.LayerNorm(name="norm")(x)
        h = x + nn.MultiHeadDotProductAttention(2, name="attention")(h, h)
        return h + nn.Dense(10, name="down")(nn.gelu(nn.Dense(26, name="up")(h))), None


class _Scanned(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.remat(_Layer) if self.remat else _Layer
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


@case
def linen_scan() -> Any:
    targets = ("params/layers/**/kernel",)
    return linen(_Scanned(remat=False), normal(1, B, T, 10), targets=targets)


@case
def linen_scan_remat() -> Any:
    targets = ("params/layers/**/kernel",)
    return linen(_Scanned(remat=True), normal(1, B, T, 10), targets=targets)


class _BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Dense(14, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


@case
def linen_mutable_and_rngs() -> Any:
    module, x = _BatchNormed(), normal(1, B, T, 10)
    variables = module.init(jax.random.key(0), x, train=False)
    kwargs = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(3)}}
    return module.apply, variables, (x,), ("params/dense/kernel",), {"kwargs": kwargs}
