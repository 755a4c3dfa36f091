"""Frozen parameters stay frozen: bit for bit, without a gradient and without optimizer state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import LoraError, LoraSpec, frozen

pytestmark = pytest.mark.standard_promotion  # Optax divides an integer step

PARAMS = {
    "body": {"w": jax.random.normal(jax.random.key(0), (6, 8)), "norm": jnp.ones((1, 8))},
    "head": {"w": jax.random.normal(jax.random.key(1), (8, 3))},
}
X = jax.random.normal(jax.random.key(2), (4, 6))


def model(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["body"]["w"] * p["body"]["norm"]) @ p["head"]["w"]


LAYOUT = lora_jax.resolve(LoraSpec(2, 4.0, "body/w"), model, PARAMS, X)
W0_SHAPES = {(6, 8)}


def shapes(tree: Any) -> set[tuple[int, ...]]:
    return {x.shape for x in jax.tree.leaves(tree)}


def test_split_and_combine_are_inverses() -> None:
    trained, rest = frozen.split(PARAMS, ("head/**", "**/norm"))
    assert sorted(trained) == ["body/norm", "head/w"]
    assert shapes(rest) == {(6, 8)}
    again = frozen.join(trained, rest)
    assert jax.tree.structure(again) == jax.tree.structure(PARAMS)
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (again, PARAMS)), strict=True))


@pytest.mark.parametrize("change", [lambda t: {}, lambda t: {**t, "body/w": 1}])
def test_combine_refuses_parts_that_do_not_fit(change: Any) -> None:
    trained, rest = frozen.split(PARAMS, ("head/w",))
    with pytest.raises(LoraError, match=r"(head|body)/w"):
        frozen.join(change(trained), rest)


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(LoraError, match=r"'hed/\*'(.|\n)*head/w"):
        frozen.trained_mask(PARAMS, ("hed/*",))


@pytest.mark.few(1)
@pytest.mark.parametrize("tx", [optax.adamw(1e-2, weight_decay=0.1), optax.adafactor(1e-2)])
def test_training_adapters_and_head_leaves_w0_bit_identical(tx: Any) -> None:
    before = np.array(PARAMS["body"]["w"])
    trained, rest = frozen.split(PARAMS, ("head/**",))
    trainable = {"adapters": lora_jax.init(jax.random.key(0), LAYOUT), "base": trained}
    g = lora_jax.adapt(LAYOUT, model)

    def loss(trainable: Any) -> Any:
        base = frozen.join(trainable["base"], rest)
        return (g(base, trainable["adapters"], X) ** 2).mean()

    state = tx.init(trainable)
    assert not shapes(state) & W0_SHAPES
    first = loss(trainable)
    for _ in range(5):
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert loss(trainable) < first
    assert np.array_equal(before, np.asarray(rest["body"]["w"]))
    assert jnp.any(trainable["adapters"]["body/w"].b != 0)


def test_partition_freezes_even_where_gradients_of_w0_exist() -> None:
    tree = {"params": PARAMS, "adapters": lora_jax.init(jax.random.key(0), LAYOUT)}
    g = lora_jax.adapt(LAYOUT, model)
    grads = jax.grad(lambda t: (g(t["params"], t["adapters"], X) ** 2).mean())(tree)
    assert jnp.any(grads["params"]["body"]["w"] != 0)
    tx = frozen.partition(
        optax.adamw(1e-2, weight_decay=0.1), tree, ("adapters/**", "params/head/**")
    )
    state = tx.init(tree)
    assert not shapes(state) & W0_SHAPES
    updates, _ = tx.update(grads, state, tree)
    new = optax.apply_updates(tree, updates)
    assert np.array_equal(new["params"]["body"]["w"], PARAMS["body"]["w"])
    assert np.array_equal(new["params"]["body"]["norm"], PARAMS["body"]["norm"])
    assert not np.array_equal(new["params"]["head"]["w"], PARAMS["head"]["w"])
    assert not np.array_equal(new["adapters"]["body/w"].b, tree["adapters"]["body/w"].b)
