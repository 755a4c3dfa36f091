"""A compiled step keeps x and codes, and never has a float array of W's size for each layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.bases.quantise import bytes_of

LAYERS, SIZE, ROWS = 6, 256, 16
DENSE = 4 * SIZE * SIZE  # bytes of one dequantised W


def unrolled(params: Any, x: Any) -> Any:
    for w in params["w"]:
        x = jnp.tanh(x @ w)
    return x


def indexed(params: Any, x: Any) -> Any:
    for i in range(LAYERS):
        x = jnp.tanh(x @ params["w"][i])
    return x


def scanned(params: Any, x: Any) -> Any:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def experts(params: Any, x: Any) -> Any:
    return jnp.tanh(jax.lax.ragged_dot(x, params["w"], jnp.full(LAYERS, ROWS)))


def program(name: str, scheme: str) -> tuple[Any, Any, Any, Any]:
    """A function, its quantised parameters, adapters and x."""
    w = jax.random.normal(jax.random.key(0), (LAYERS, SIZE, SIZE)) / SIZE**0.5
    f = {"unrolled": unrolled, "indexed": indexed, "scanned": scanned, "experts": experts}[name]
    params = {"w": list(w) if name == "unrolled" else w}
    x = jnp.ones((ROWS * (LAYERS if name == "experts" else 1), SIZE))
    layout = lora_jax.resolve(
        lora_jax.LoraSpec(2, targets=("w", "w/*")[name == "unrolled"]), f, params, x
    )
    adapters = lora_jax.init(jax.random.key(1), layout)
    return lora_jax.adapt(layout, f), lora_jax.quantize(params, scheme, layout), adapters, x


def compiled(name: str, scheme: str) -> Any:
    g, params, adapters, x = program(name, scheme)
    loss = lambda adapters, params, x: (g(params, adapters, x) ** 2).sum()  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(adapters, params, x).compile()


@pytest.mark.few(2)
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["unrolled", "indexed", "scanned"])
def test_temporaries_do_not_grow_by_a_dense_weight_per_layer(name: str, scheme: str) -> None:
    temporary = compiled(name, scheme).memory_analysis().temp_size_in_bytes
    assert temporary < 0.5 * LAYERS * DENSE


@pytest.mark.few(3)
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["unrolled", "indexed", "scanned", "experts"])
def test_residuals_are_x_and_codes(name: str, scheme: str) -> None:
    g, params, adapters, x = program(name, scheme)
    _, pull = jax.vjp(lambda adapters, x: g(params, adapters, x), adapters, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.size < SIZE * SIZE for leaf in kept), [leaf.shape for leaf in kept]


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_no_weight_is_a_constant_of_the_program(scheme: str) -> None:
    program_bytes = compiled("unrolled", scheme).memory_analysis()
    _, params, adapters, x = program("unrolled", scheme)
    inputs = bytes_of((params, adapters, x))
    assert program_bytes.argument_size_in_bytes >= inputs
    assert program_bytes.generated_code_size_in_bytes < DENSE


def test_forward_mode_second_derivatives_and_mixed_batches() -> None:
    f = lambda params, x: jnp.tanh(x @ params["w"])  # noqa: E731
    w = jax.random.normal(jax.random.key(0), (8, 4))
    x = jax.random.normal(jax.random.key(1), (3, 8))
    layout = lora_jax.resolve(lora_jax.LoraSpec(2, targets="w"), f, {"w": w}, x)
    q = lora_jax.quantize({"w": w}, "nf4", layout)
    dense = lora_jax.dequantize(q)
    adapters = jax.tree.map(jnp.ones_like, lora_jax.init(jax.random.key(2), layout))
    g = lora_jax.adapt(layout, f)

    def hessian(params: Any) -> Any:
        loss = lambda ad, x: (g(params, ad, x) ** 2).sum()  # noqa: E731
        return jax.hessian(loss, (0, 1))(adapters, x)

    for got, want in zip(jax.tree.leaves(hessian(q)), jax.tree.leaves(hessian(dense)), strict=True):
        assert jnp.allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()))
    both, stacked = lora_jax.multi.stack([(layout, adapters), (layout, adapters)])
    chosen = lora_jax.multi.select(stacked, jnp.array([0, -1, 1]))
    mixed = lora_jax.adapt(both, f)
    assert jnp.allclose(mixed(q, chosen, x), mixed(dense, chosen, x), atol=1e-5)
