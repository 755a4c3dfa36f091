"""The definition itself, against a float64 sum written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import LoraSpec


def test_merge_against_float64_by_hand() -> None:
    """W [heads, in, layers, head_dim] with a [layers, in, r], b [layers, r, heads, head_dim]."""
    key = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(key[0], (2, 6, 3, 4)), "other": jnp.ones(3)}
    f = lambda p, x: jnp.einsum("lbd,hdlk->lbhk", x, p["w"])  # noqa: E731
    layout = lora_jax.resolve(LoraSpec(2, 5.0, "w"), f, params, jnp.ones((3, 7, 6)))
    target = layout["w"]
    assert (target.stack, target.inputs, target.outputs) == ((2,), (1,), (0, 3))
    a = jax.random.normal(key[1], target.a_shape)
    b = jax.random.normal(key[2], target.b_shape)
    merged = lora_jax.merge(layout, params, {"w": lora_jax.Factors(a, b)})
    want = np.asarray(params["w"], np.float64)
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    for layer in range(3):
        for head in range(2):
            want[head, :, layer, :] += 2.5 * a64[layer] @ b64[layer, :, head]
    np.testing.assert_allclose(merged["w"], want, rtol=1e-6, atol=1e-6)
    assert merged["other"] is params["other"]


def test_a_bfloat16_base_is_summed_in_float32_and_rounded_once() -> None:
    """Red if the sum is formed in bfloat16: the update below vanishes or doubles there."""
    w = jnp.full((4, 4), 256.0, jnp.bfloat16)  # neighbours in bfloat16: 255, 258
    f = lambda p, x: x @ p["w"]  # noqa: E731
    layout = lora_jax.resolve(LoraSpec(1, 1.0, "w"), f, {"w": w}, jnp.ones((1, 4), jnp.bfloat16))
    factors = lora_jax.Factors(jnp.full((4, 1), 1.004), jnp.ones((1, 4)))
    merged = lora_jax.merge(layout, {"w": w}, {"w": factors})["w"]
    assert merged.dtype == jnp.bfloat16
    assert (merged == 258).all()  # 257.004 rounds up; bfloat16(1.004) = 1 would tie and stay at 256


def test_float32_adapters_over_a_bfloat16_base() -> None:
    """The output keeps the base's dtype, gradients the adapters'. Red if the cast is left out."""
    w = jnp.ones((8, 4), jnp.bfloat16)
    f = lambda p, x: x @ p["w"]  # noqa: E731
    x = jnp.ones((3, 8), jnp.bfloat16)
    layout = lora_jax.resolve(LoraSpec(2, 2.0, "w"), f, {"w": w}, x)
    adapters = lora_jax.init(jax.random.key(0), layout)
    g = lora_jax.adapt(layout, f)
    assert g({"w": w}, adapters, x).dtype == jnp.bfloat16
    grads = jax.grad(lambda ad: g({"w": w}, ad, x).astype(jnp.float32).sum())(adapters)
    assert grads["w"].a.dtype == grads["w"].b.dtype == jnp.float32
    assert jnp.any(grads["w"].b != 0)
