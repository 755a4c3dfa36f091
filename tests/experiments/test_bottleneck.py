"""Adapter layers: the formula of one, and its place in the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import methods
from lora_jax import models
from tests.experiments.test_method import BERT, IDS, LLAMA, MASK, model_of, noisy, run


@pytest.mark.parametrize("norm", [False, True])
def test_a_layer_is_the_formula(norm: bool) -> None:
    """A layer is x + up(relu(down(norm(x))))."""
    made = methods.Bottleneck(("site",), 4, 3, norm=norm)
    random = np.random.default_rng(0)
    shapes = made.init(jax.random.key(0))["site"]
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)
    x = random.normal(size=(2, 5, 4)).astype(np.float32)
    h = x
    if norm:
        h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        h = h * params["norm"]["scale"] + params["norm"]["bias"]
    h = np.maximum(h @ params["down"]["kernel"] + params["down"]["bias"], 0)
    want = x + h @ params["up"]["kernel"] + params["up"]["bias"]
    np.testing.assert_allclose(made.layer(params, jnp.asarray(x)), want, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "layer", "biases"),
    [
        (BERT, "bert/encoder/layer_1", {"attention": "output", "mlp": "down"}),
        (dataclasses.replace(LLAMA, output_bias=True), "layers_1", {"attention": "o"}),
    ],
    ids=["encoder", "decoder"],
)
def test_it_stands_before_the_residual(config: Any, layer: str, biases: dict[str, str]) -> None:
    model, params = model_of(config)
    method = methods.houlsby(config, 2)
    shift = np.random.default_rng(3).normal(0.0, 0.5, 16).astype(np.float32)
    f, g = run(method, model), run(methods.LORA, model)
    base = g(params, IDS, MASK)
    for module, product in biases.items():
        extra = method.init(jax.random.key(0))["extra"]
        at(extra, f"{layer}/{module}")["up"]["bias"] = shift
        found = f({**params, "extra": extra}, IDS, MASK)
        biased = jax.tree.map(np.copy, params)
        at(biased, f"{layer}/{module}/{product}")["bias"] += shift
        want = g(biased, IDS, MASK)
        np.testing.assert_allclose(found, want, atol=1e-5)
        assert np.abs(want - base).max() > 1e-3


def at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


@pytest.mark.parametrize("kind", ["houlsby", "prefix_layer"])
def test_rematerialised_layers_are_the_same(kind: str) -> None:

    def gradient(remat: str) -> Any:
        config = dataclasses.replace(BERT, num_layers=1, remat=remat)
        model = models.BertClassifier(config, 2)
        method = (
            methods.houlsby(config, 3)
            if kind == "houlsby"
            else getattr(methods, kind)(config, 2, 1, 8)
        )
        extra = noisy(method.init(jax.random.key(0))["extra"], 3)

        def loss(extra: Any) -> Any:
            out = method.apply(model, {**params, "extra": extra}, IDS, MASK)
            return jnp.square(out).sum()

        return jax.jit(jax.value_and_grad(loss))(extra)

    params = model_of(dataclasses.replace(BERT, num_layers=1))[1]
    plain, again = gradient("none"), gradient("full")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), plain, again)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(plain[1]))


def test_it_computes_in_the_models_dtype() -> None:
    config = dataclasses.replace(BERT, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    method = methods.lin(config, 3)
    extra = method.extra
    assert isinstance(extra, methods.Bottleneck)
    params = extra.init(jax.random.key(0))["bert"]["encoder"]["layer_0"]["mlp"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert extra.layer(params, jnp.ones((1, 2, 16), jnp.bfloat16)).dtype == jnp.bfloat16
