"""Models of jimm, Tunix, Gemma and Flax."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests.cases import normal
from tests.foreign.register import IDS, IMAGE, KEY, Built, X, model, without_init


def nnx(net: Any, *args: Any) -> Built:
    f, params, state = lora_jax.from_nnx(net)
    return (lambda p, *a: f(p, state, *a)), params, args


@model("flax.nnx")
def jimm_vision_transformer(flax_nnx: Any) -> Built:
    without_init("jimm", "jimm.common", "jimm.models")
    vit = importlib.import_module("jimm.models.vit")
    with flax_nnx.use_eager_sharding(False):
        net = vit.VisionTransformer(
            num_classes=5, img_size=16, patch_size=8, num_layers=2, num_heads=2, mlp_dim=8,
            hidden_size=6, dropout_rate=0.0, rngs=flax_nnx.Rngs(0),
        )  # fmt: skip
    f, params, args = nnx(net, IMAGE[None])
    axes = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)

    def on_a_mesh(p: Any, *args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(axes.abstract_mesh):
            return f(p, *args)

    return on_a_mesh, params, args


# --- Tunix and Gemma ----------------------------------------------------------------------------

DECODER = {
    "num_layers": 2, "vocab_size": 13, "embed_dim": 6, "hidden_dim": 8, "num_heads": 2,
    "head_dim": 4, "num_kv_heads": 1, "rope_theta": 10_000, "norm_eps": 1e-6,
}  # fmt: skip


def tunix(module: str, make: str, **settings: Any) -> Built:
    without_init("tunix")
    package = importlib.import_module(f"tunix.models.{module}.model")
    rngs = importlib.import_module("flax.nnx").Rngs(0)
    net = getattr(package, make)(package.ModelConfig(**settings), rngs=rngs)
    mask = jnp.tril(jnp.ones((7, 7), bool))[None]
    return nnx(net, IDS[None], jnp.arange(7)[None], None, mask)


@model("flax.nnx")
def tunix_llama(_: Any) -> Built:
    return tunix("llama3", "Llama3", **DECODER)


@model("flax.nnx")
def tunix_qwen_with_experts(_: Any) -> Built:
    return tunix(
        "qwen3", "Qwen3", **{**DECODER, "num_layers": 1}, num_experts=3, num_experts_per_tok=2
    )


def gemma_modules() -> Any:
    """Gemma's layers, with a stand-in for TensorFlow, which only annotations need."""
    stand_in = types.ModuleType("tensorflow")
    stand_in.Tensor = type("Tensor", (), {})  # type: ignore[attr-defined]
    before = sys.modules.get("tensorflow", stand_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", before)
        modules = importlib.import_module("gemma.gm.nn._modules")
        assert modules.kd.nn.Identity  # this imports the module
    return modules


@model("gemma")
def gemma_block(_: Any) -> Built:
    modules = gemma_modules()
    block = modules.Block(
        num_heads=2, num_kv_heads=1, embed_dim=6, head_dim=4, hidden_dim=8,
        use_post_attn_norm=True, use_post_ffw_norm=True, attn_type=modules.AttentionType.GLOBAL,
        query_pre_attn_scalar=0.5, transpose_gating_einsum=True,
    )  # fmt: skip
    args = (normal(4, 1, 7, 6), jnp.arange(7)[None], None, jnp.ones((1, 7, 7), bool))
    params = block.init(KEY, *args)
    return block.apply, params, args


# --- Flax ---------------------------------------------------------------------------------------


def linen(module: Any, *args: Any, **kwargs: Any) -> Built:
    variables = module.init(KEY, *args)
    params = {"params": variables.pop("params")}
    f = lambda p, *a: module.apply({**p, **variables}, *a, **kwargs)  # noqa: E731
    return f, params, args


@model("flax.linen")
def linen_normalised_weights(nn: Any) -> Built:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.tanh(nn.WeightNorm(nn.Dense(8))(x))
            x = nn.tanh(nn.SpectralNorm(nn.Dense(7))(x, update_stats=False))
            return nn.Dense(5)(x)

    return linen(Net(), X)


@model("flax.linen")
def linen_recurrent(nn: Any) -> Built:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.RNN(nn.OptimizedLSTMCell(5))(x)
            return nn.Dense(3)(nn.RNN(nn.GRUCell(4))(x))

    return linen(Net(), X[None])


@model("flax.linen")
def linen_convolutions_with_batch_statistics(nn: Any) -> Built:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x)))
            x = nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x)
            return nn.Dense(5)(x.mean((1, 2)))

    return linen(Net(), IMAGE[None], mutable=["batch_stats"])


@model("flax.nnx")
def nnx_recurrent(flax_nnx: Any) -> Built:
    class Net(flax_nnx.Module):
        def __init__(self) -> None:
            rngs = flax_nnx.Rngs(0)
            self.rnn = flax_nnx.RNN(flax_nnx.LSTMCell(6, 5, rngs=rngs), rngs=rngs)
            self.head = flax_nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.rnn(x))

    return nnx(Net(), X[None])


@model("flax.nnx")
def nnx_remat_in_scan(flax_nnx: Any) -> Built:
    class Net(flax_nnx.Module):
        def __init__(self) -> None:
            make = flax_nnx.vmap(lambda rngs: flax_nnx.Linear(6, 6, rngs=rngs))
            self.layers = flax_nnx.split_rngs(splits=3)(make)(flax_nnx.Rngs(0))
            self.head = flax_nnx.Linear(6, 3, rngs=flax_nnx.Rngs(1))

        def __call__(self, x: Any) -> Any:
            @flax_nnx.scan(in_axes=(flax_nnx.Carry, 0), out_axes=flax_nnx.Carry)
            @flax_nnx.remat
            def run(x: Any, layer: Any) -> Any:
                return x + jnp.tanh(layer(x))

            return self.head(run(x, self.layers))

    return nnx(Net(), X)
