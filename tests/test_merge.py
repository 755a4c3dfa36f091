"""The definition of `merge`, compared with a float64 sum that is written out by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import LoraSpec
from lora_jax.base import Base


def test_merge_against_float64_by_hand() -> None:
    """W is [heads, in, layers, head_dim], a [layers, in, r] and b [layers, r, heads, head_dim]."""
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
    w = jnp.full((4, 4), 256.0, jnp.bfloat16)  # neighbours in bfloat16: 255, 258
    f = lambda p, x: x @ p["w"]  # noqa: E731
    layout = lora_jax.resolve(LoraSpec(1, 1.0, "w"), f, {"w": w}, jnp.ones((1, 4), jnp.bfloat16))
    factors = lora_jax.Factors(jnp.full((4, 1), 1.004), jnp.ones((1, 4)))
    merged = lora_jax.merge(layout, {"w": w}, {"w": factors})["w"]
    assert merged.dtype == jnp.bfloat16
    assert (merged == 258).all()  # 257.004 rounds up; bfloat16(1.004) = 1 would tie and stay at 256


def test_float32_adapters_over_a_bfloat16_base() -> None:
    """Outputs keep the dtype of the base, and gradients the dtype of the adapters."""
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


def test_a_quantised_base_is_merged_where_it_stands_or_into_the_original() -> None:
    """An update is merged into the dequantised base, or into the original weight."""
    layout = lora_jax.Layout((lora_jax.Target("w", (6, 5), (), (0,), (1,), 2, 4.0),))
    original = jax.random.normal(jax.random.key(0), (6, 5))
    scale = jnp.abs(original).max() / 3
    codes = jnp.round(original / scale).astype(jnp.int8)
    quantised = {"w": Coarse(codes, scale), "other": Coarse(codes, scale)}
    a, b = jax.random.normal(jax.random.key(1), (6, 2)), jnp.ones((2, 5))
    adapters = {"w": lora_jax.Factors(a, b)}
    merged = lora_jax.merge(layout, quantised, adapters)
    want = quantised["w"].dense() + 2 * a @ b
    np.testing.assert_allclose(merged["w"], want, rtol=1e-5, atol=1e-6)
    assert merged["other"] is quantised["other"]
    other = lora_jax.merge(layout, {"w": original, "other": original}, adapters)["w"]
    found = lora_jax.merge_error(layout, quantised, {"w": original}, adapters)["w"]
    np.testing.assert_allclose(found.error, jnp.linalg.norm(merged["w"] - other), rtol=1e-5)
    np.testing.assert_allclose(found.update, jnp.linalg.norm(2 * a @ b), rtol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coarse(Base):
    """int8 codes times one scale."""

    codes: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def dense(self) -> jax.Array:
        return self.codes.astype(self.dtype) * self.scale
