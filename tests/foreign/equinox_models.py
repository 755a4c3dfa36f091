"""Models of Equinox and of packages built on it."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from tests.foreign.register import IDS, IMAGE, KEY, Built, X, model


def equinox(model: Any, *args: Any, state: Any = None, mapped: Any = None, **kwargs: Any) -> Built:
    """Build an Equinox model, mapped over its arguments' first axis with the options of `vmap`."""
    f, params, state = lora_jax.from_equinox(model, state)
    call = lambda p, s, *a: f(p, s, *a, **kwargs)  # noqa: E731
    if mapped is not None:
        call = jax.vmap(call, (None, None, 0), (0, None), **mapped)
    return (lambda p, *a: jax.tree.leaves(call(p, state, *a))), params, args


@model("equinox")
def equinox_mlp(eqx: Any) -> Built:
    net = eqx.nn.MLP(6, 5, 8, 2, key=KEY)
    return equinox(net, X, mapped={})


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
    mapped = {"axis_name": "batch"}
    return equinox(net, IMAGE.transpose(2, 0, 1)[None], state=state, mapped=mapped)


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
    return equinox(net, X, mapped={})


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
    return equinox(net, X[0], state=state)


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
    return equinox(net, IMAGE.transpose(2, 0, 1), key=KEY, inference=True)
