"""Models of Penzai."""

from __future__ import annotations

import importlib
from typing import Any

import jax.numpy as jnp

from tests.foreign.register import IDS, KEY, Built, X, model


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
