"""Small models of packages that we did not write, each as (f, params, args).

Sizes are the smallest that the packages take. A builder imports its package itself, so that a
missing one skips its models alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests.cases import normal

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported
Built = tuple[Callable[..., Any], Any, tuple[Any, ...]]
REGISTRY: dict[str, Callable[[], Built]] = {}

X = normal(1, 4, 6)
IMAGE = normal(2, 16, 16, 3)
IDS = jnp.arange(7) * 5 % 13
KEY = jax.random.key(0)


def model(package: str) -> Callable[[Callable[[Any], Built]], Callable[[], Built]]:
    """Register a builder, which gets the imported package."""

    def register(make: Callable[[Any], Built]) -> Callable[[], Built]:
        def build() -> Built:
            return make(pytest.importorskip(package, exc_type=ImportError))

        REGISTRY[make.__name__] = build
        return build

    return register


def without_init(*packages: str) -> None:
    """Make modules inside of packages importable without the packages' own `__init__`.

    Those bring a training framework (Tunix) or a profiler (jimm) along, which no model needs.
    """
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip(f"{name} is not installed")
        if name not in sys.modules:
            bare = types.ModuleType(name)
            bare.__spec__ = spec
            bare.__path__ = list(spec.submodule_search_locations)
            sys.modules[name] = bare


# --- Equinox and what is built on it ------------------------------------------------------------


def equinox(model: Any, *args: Any, call: Any = None) -> Built:
    """An Equinox model: its float arrays are the parameters, the rest of it is the program."""
    eqx = importlib.import_module("equinox")
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    call = call or (lambda model, *args: model(*args))
    same = lambda tree: jax.tree.map(lambda x: x, tree)  # noqa: E731  # a state is good for one call
    return (lambda p, *a: call(eqx.combine(p, rest), *same(a))), params, args


@model("equinox")
def equinox_mlp(eqx: Any) -> Built:
    net = eqx.nn.MLP(6, 5, 8, 2, key=KEY)
    return equinox(net, X, call=lambda net, x: jax.vmap(net)(x))


@model("equinox")
def equinox_convolutions_with_batch_statistics(eqx: Any) -> Built:
    keys = jax.random.split(KEY, 3)
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
            eqx.nn.BatchNorm(4, axis_name="batch", mode="batch"),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(4, 6, 3, groups=2, key=keys[1]),
            eqx.nn.AdaptiveAvgPool2d(1),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(6, 5, key=keys[2]),
        ]
    )
    net, state = eqx.nn.make_with_state(lambda: net)()
    call = lambda net, state, x: jax.vmap(  # noqa: E731
        net, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
    )(x, state)
    f, params, args = equinox(net, state, IMAGE.transpose(2, 0, 1)[None], call=call)
    return (lambda p, *a: jax.tree.leaves(f(p, *a))), params, args


@model("equinox")
def equinox_embedded_attention(eqx: Any) -> Built:
    keys = jax.random.split(KEY, 3)

    class Net(eqx.Module):
        embed: Any
        attend: Any
        head: Any

        def __call__(self, ids: Any) -> Any:
            x = jax.vmap(self.embed)(ids)
            x = x + self.attend(x, x, x)
            return jax.vmap(self.head)(x)

    net = Net(
        eqx.nn.Embedding(13, 6, key=keys[0]),
        eqx.nn.MultiheadAttention(2, 6, key=keys[1]),
        eqx.nn.Linear(6, 13, key=keys[2]),
    )
    return equinox(net, IDS)


@model("equinox")
def equinox_gated_recurrence(eqx: Any) -> Built:
    class Net(eqx.Module):
        cell: Any
        head: Any

        def __call__(self, x: Any) -> Any:
            step = lambda h, x: (self.cell(x, h), None)  # noqa: E731
            return self.head(jax.lax.scan(step, jnp.zeros(5), x)[0])

    return equinox(Net(eqx.nn.GRUCell(6, 5, key=KEY), eqx.nn.Linear(5, 3, key=KEY)), X)


@model("equinox")
def equinox_weight_normalisation(eqx: Any) -> Built:
    first = eqx.nn.WeightNorm(eqx.nn.Linear(6, 8, key=KEY), weight_name="weight")
    middle, head = eqx.nn.Linear(8, 7, key=KEY), eqx.nn.Linear(7, 5, key=KEY)
    tanh = eqx.nn.Lambda(jnp.tanh)
    net = eqx.nn.Sequential([first, tanh, middle, tanh, head])
    return equinox(net, X, call=lambda net, x: jax.vmap(net)(x))


@model("equinox")
def equinox_spectral_normalisation(eqx: Any) -> Built:
    class Net(eqx.Module):
        first: Any
        head: Any

        def __call__(self, x: Any, state: Any) -> Any:
            h, state = self.first(x, state)
            return self.head(jnp.tanh(h)), state

    def make() -> Any:
        first = eqx.nn.SpectralNorm(eqx.nn.Linear(6, 8, key=KEY), "weight", key=KEY)
        return Net(first, eqx.nn.Linear(8, 5, key=KEY))

    net, state = eqx.nn.make_with_state(make)()
    return equinox(net, X[0], state, call=lambda net, x, state: jax.tree.leaves(net(x, state)))


def zoo(**changes: Any) -> Built:
    package = importlib.import_module("eqx_zoo.models.causal_lm.model")
    config = importlib.import_module("eqx_zoo.models.causal_lm.config").Config(
        **{
            "architecture": "Qwen3ForCausalLM", "vocab_size": 13, "hidden_size": 6,
            "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
            "tie_word_embeddings": False, "attention_bias": False, "qk_norm": True,
            "rope_scaling": None, **changes,
        }
    )  # fmt: skip
    return equinox(package.CausalLM(config, key=KEY), IDS)


@model("eqx_zoo")
def zoo_decoder(_: Any) -> Built:
    return zoo()


@model("eqx_zoo")
def zoo_tied_decoder(_: Any) -> Built:
    return zoo(tie_word_embeddings=True, attention_bias=True)


@model("eqx_zoo")
def zoo_decoder_with_experts(_: Any) -> Built:
    return zoo(
        num_hidden_layers=1, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=7,
        moe_layers=(0,),
    )  # fmt: skip


@model("eqx_zoo")
def zoo_encoder(package: Any) -> Built:
    config = importlib.import_module("eqx_zoo.models.encoder.config").EncoderConfig(
        architecture="BertModel", vocab_size=13, hidden_size=6, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=8, max_position_embeddings=9, type_vocab_size=2,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    return equinox(package.Encoder(config, key=KEY), IDS)


@model("equimo")
def equimo_vision_transformer(_: Any) -> Built:
    vit = importlib.import_module("equimo.vision.models.vit")
    net = vit.VisionTransformer(
        img_size=16, in_channels=3, dim=6, patch_size=8, num_heads=2, depths=[2], num_classes=5,
        key=KEY,
    )  # fmt: skip
    call = lambda net, x: net(x, key=KEY, inference=True)  # noqa: E731
    return equinox(net, IMAGE.transpose(2, 0, 1), call=call)


# --- jimm ---------------------------------------------------------------------------------------


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


# --- Keras --------------------------------------------------------------------------------------


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


# --- Penzai -------------------------------------------------------------------------------------


def penzai_model(pz: Any, net: Any, *args: Any, **kwargs: Any) -> Built:
    definition, params = pz.unbind_params(net, freeze=True)
    values = {p.label: p.value for p in params}

    def f(values: Any, *args: Any) -> Any:
        bound = [p.__class__(value=values[p.label], label=p.label) for p in params]
        return pz.bind_variables(definition, bound)(*args, **kwargs)

    return f, values, args


@model("penzai.pz")
def penzai_mlp(pz: Any) -> Built:
    mlp = importlib.import_module("penzai.models.simple_mlp").MLP
    net = mlp.from_config(name="mlp", init_base_rng=KEY, feature_sizes=[6, 8, 5])
    return penzai_model(pz, net, pz.nx.wrap(X).tag("batch", "features"))


def penzai_llama(pz: Any, stacked: bool) -> Built:
    common = importlib.import_module("penzai.models.transformer.variants.llamalike_common")
    config = common.LlamalikeTransformerConfig(
        num_kv_heads=1, query_head_multiplier=2, embedding_dim=6, projection_dim=4,
        mlp_hidden_dim=8, num_decoder_blocks=2, vocab_size=13, mlp_variant="swiglu",
        tie_embedder_and_logits=False, use_layer_stack=stacked,
    )  # fmt: skip
    net = common.build_llamalike_transformer(config, init_base_rng=KEY)
    tokens, positions = (pz.nx.wrap(x).tag("seq") for x in (IDS, jnp.arange(7)))
    return penzai_model(pz, net, tokens, token_positions=positions)


@model("penzai.pz")
def penzai_decoder(pz: Any) -> Built:
    return penzai_llama(pz, stacked=False)


@model("penzai.pz")
def penzai_stacked_decoder(pz: Any) -> Built:
    return penzai_llama(pz, stacked=True)


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
    """Gemma's layers; a library under them names TensorFlow's arrays in its annotations alone."""
    stand_in = types.ModuleType("tensorflow")
    stand_in.Tensor = type("Tensor", (), {})  # type: ignore[attr-defined]
    before = sys.modules.get("tensorflow", stand_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", before)
        modules = importlib.import_module("gemma.gm.nn._modules")
        assert modules.kd.nn.Identity  # imported as it is read
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
