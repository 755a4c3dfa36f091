"""The parameters that `"all-linear"` treats as the output head.

A head is a parameter whose product feeds no other product of a parameter, and is the last product
on every path to some output. A residual counts as a path: if a value of the same shape, which has
not passed the product, is added to the result, the product is not the last one on every path.
Constants, parameters (a bias), integers and predicates (labels, masks) do not count as paths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax
from tests import laws
from tests.cases import normal

pytestmark = pytest.mark.standard_promotion  # Flax inside the models promotes
X = normal(1, 3, 6)
REGISTRY: dict[str, Callable[[], tuple[Any, ...]]] = {}


def model(make: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
    """Register a builder; it returns (f, params, args, heads)."""
    REGISTRY[make.__name__] = make
    return make


def attention(p: Any, x: Any) -> tuple[Any, Any, Any]:
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    return jax.nn.softmax(q @ k.T) @ v @ p["o"], k, v


PARAMS = {
    "q": normal(2, 6, 5),
    "k": normal(3, 6, 5),
    "v": normal(4, 6, 5),
    "o": normal(5, 5, 6),
    "head": normal(6, 6, 7),
    "bias": normal(7, 7),
}


def logits(p: Any, h: Any) -> Any:
    return h @ p["head"] + p["bias"][None]


@model
def a_decoder_that_returns_its_cache() -> Any:
    def f(p: Any, x: Any) -> Any:
        h, k, v = attention(p, x)
        return logits(p, x + h), {"k": k, "v": v}

    return f, PARAMS, (X,), {"head"}


@model
def a_decoder_that_writes_its_cache() -> Any:
    def f(p: Any, x: Any, cache: Any, at: Any) -> Any:
        k = jax.lax.dynamic_update_slice(cache, x @ p["k"], (at, 0))
        h = jax.nn.softmax((x @ p["q"]) @ k.T) @ k @ p["o"]
        return logits(p, h), k

    params = {path: w for path, w in PARAMS.items() if path != "v"}
    return f, params, (X, jnp.zeros((8, 5)), jnp.int32(2)), {"head"}


@model
def hidden_states() -> Any:
    def f(p: Any, x: Any) -> Any:
        h, _, _ = attention(p, x)
        return logits(p, h), [h, jnp.tanh(h)]

    return f, PARAMS, (X,), {"head"}


@model
def logged_norms() -> Any:
    def f(p: Any, x: Any) -> Any:
        h, k, _ = attention(p, x)
        return logits(p, h), {"h": jnp.linalg.norm(h), "k": (k * k).mean()}

    return f, PARAMS, (X,), {"head"}


@model
def two_heads_and_a_loss_with_float_targets() -> Any:
    """A subtraction is a comparison, not a residual path."""

    def f(p: Any, x: Any, y: Any, labels: Any) -> Any:
        h = jnp.tanh(x @ p["body"])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(h @ p["classes"]), labels[:, None], 1)
        return ((h @ p["values"] - y) ** 2).mean(), -chosen.mean()

    params = {"body": normal(0, 6, 8), "classes": normal(1, 8, 5), "values": normal(2, 8, 4)}
    return f, params, (X, normal(3, 3, 4), jnp.array([0, 4, 2])), {"classes", "values"}


@model
def a_masked_head() -> Any:
    """The term added to the logits comes from a predicate, which does not count as a path."""

    def f(p: Any, x: Any, allowed: Any) -> Any:
        return jnp.tanh(x @ p["body"]) @ p["head"] + jnp.where(allowed, 0.0, -1e9)

    params = {"body": normal(0, 6, 8), "head": normal(1, 8, 4)}
    return f, params, (X, jnp.ones((3, 4), bool)), {"head"}


@model
def a_scanned_residual_stack_fed_by_raw_inputs() -> Any:
    def f(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, p)[0]

    return f, {"up": normal(0, 2, 6, 8), "down": normal(1, 2, 8, 6)}, (X,), set()


@model
def one_residual_block_fed_by_raw_inputs() -> Any:
    f = lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    return f, {"up": normal(0, 6, 8), "down": normal(1, 8, 6)}, (X,), set()


@model
def a_residual_stack_with_a_head() -> Any:
    def f(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return x + jnp.tanh(x @ w["up"]) @ w["down"], jnp.linalg.norm(x)

        x, norms = jax.lax.scan(layer, x, p["layers"])
        return x @ p["head"], norms

    layers = {"up": normal(0, 2, 6, 8), "down": normal(1, 2, 8, 6)}
    return f, {"layers": layers, "head": normal(2, 6, 5)}, (X,), {"head"}


@model
def a_recurrent_cell() -> Any:
    """The product of one step feeds the product of the next."""

    def f(p: Any, x: Any) -> Any:
        step = lambda h, x: (jnp.tanh(h @ p["hidden"] + x @ p["in"]), h)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros(5), x)

    return f, {"hidden": normal(0, 5, 5), "in": normal(1, 6, 5)}, (X,), set()


@model
def a_recurrent_cell_without_inputs() -> Any:
    def f(p: Any, h: Any) -> Any:
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), h, None, length=3)[0]

    return f, {"w": normal(0, 6, 6)}, (X,), set()


@model
def a_tied_autoencoder() -> Any:
    f = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T  # noqa: E731
    return f, {"w": normal(0, 6, 8)}, (X,), set()


@model
def a_generation_loop() -> Any:
    """The head feeds the next token's lookup through an integer, not as a product's operand."""

    def f(p: Any, first: Any) -> Any:
        def step(token: Any, _: Any) -> Any:
            scores = jnp.tanh(p["table"][token] @ p["body"]) @ p["head"]
            return scores.argmax(-1), scores

        return jax.lax.scan(step, first, None, length=3)[1]

    params = {"table": normal(0, 9, 6), "body": normal(1, 6, 8), "head": normal(2, 8, 9)}
    return f, params, (jnp.array([1, 3]),), {"head", "table"}


class _Sown(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i in range(2):
            x = nn.tanh(nn.Dense(8, name=f"layer_{i}", use_bias=False)(x))
            self.sow("intermediates", "x", x)
        return nn.Dense(5, name="head")(x)


@model
def sown_values() -> Any:
    module = _Sown()
    params = {"params": module.init(jax.random.key(0), X)["params"]}
    f = lambda p, x: module.apply(p, x, mutable=["intermediates"])  # noqa: E731
    return f, params, (X,), {"params/head/kernel"}


class _Normed(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.head = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(jnp.tanh(self.norm(self.first(x))))


@model
def batch_statistics() -> Any:
    f, params, state = lora_jax.from_nnx(_Normed())
    return f, params, (state, X), {"head/kernel"}


@pytest.mark.few(8)
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_the_head_is_left_out_by_name_and_nothing_else_is(name: str) -> None:
    f, params, args, heads = REGISTRY[name]()
    layout = lora_jax.resolve(lora_jax.LoraSpec(2, 4.0), f, params, *args)
    matrices = {path for path, w in laws.flat(params).items() if w.ndim >= 2}
    assert {t.path for t in layout.targets} == matrices - heads
    assert set(laws.left_out(layout)) == heads
    printed = "".join(str(layout).split())  # lines are wrapped
    assert all("".join(why.split()) in printed for why in laws.left_out(layout).values())
    laws.assert_complete(layout, f, params, *args)
    laws.assert_adapt_equals_merge(layout, f, params, *args)


def test_the_reason_says_that_it_is_the_head_and_the_cure_takes_it() -> None:
    f, params, args, _ = a_decoder_that_returns_its_cache()
    layout = lora_jax.resolve(lora_jax.LoraSpec(2, 4.0), f, params, *args)
    assert "output head" in laws.left_out(layout)["head"]
    both = lora_jax.LoraSpec(2, 4.0, ("all-linear", "head"))
    layout = lora_jax.resolve(both, f, params, *args)
    assert "head" in {t.path for t in layout.targets}
    assert not layout.left_out


def test_a_function_that_is_only_a_head_says_so() -> None:
    f = lambda p, x: x @ p["w"]  # noqa: E731
    with pytest.raises(lora_jax.LoraError, match=r"'w'(.|\n)*output head(.|\n)*path"):
        lora_jax.resolve(lora_jax.LoraSpec(2, 4.0), f, {"w": normal(0, 6, 8)}, X)
