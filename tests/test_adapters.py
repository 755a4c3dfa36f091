"""The adapter tree: its first values, and trees that do not fit a layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Factors, LoraError, LoraSpec

F = lambda p, x: jnp.einsum("lbd,ldk->lbk", x @ p["w"], p["v"])  # noqa: E731
PARAMS = {"w": jnp.ones((400, 500)), "v": jnp.ones((2, 500, 300))}
LAYOUT = lora_jax.resolve(LoraSpec(8, 16.0, ("w", "v")), F, PARAMS, jnp.ones((2, 3, 400)))


def test_a_is_gaussian_with_variance_one_over_fan_in_and_b_is_zero() -> None:
    adapters = lora_jax.init(jax.random.key(0), LAYOUT)
    for target in LAYOUT.targets:
        a, b = adapters[target.path]
        assert (a.shape, b.shape) == (target.a_shape, target.b_shape)
        z = np.asarray(a).ravel() * np.sqrt(target.fan_in)
        assert abs(z.std() - 1) < 0.05
        assert abs((z**4).mean() - 3) < 0.5  # the kurtosis of a Gaussian; a uniform one has 1.8
        assert not np.asarray(b).any()


def test_each_target_draws_from_its_own_path() -> None:
    """The first values of a target depend on its path alone."""
    both = lora_jax.init(jax.random.key(0), LAYOUT)
    alone = lora_jax.init(jax.random.key(0), LAYOUT.subset("v"))
    assert (both["v"].a == alone["v"].a).all()
    slices = both["v"].a
    assert not np.allclose(slices[0], slices[1])


def test_dtype_and_own_initialiser() -> None:
    adapters = lora_jax.init(
        jax.random.key(0),
        LAYOUT,
        dtype=jnp.bfloat16,
        method=lambda key, target, dtype: jnp.full(target.a_shape, 2, dtype),
    )
    assert adapters["w"].a.dtype == adapters["w"].b.dtype == jnp.bfloat16
    assert (adapters["w"].a == 2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ad: {"w": ad["w"]}, "no factors for it"),
        (lambda ad: {**ad, "u": ad["w"]}, r"'u', which the layout does not"),
        (lambda ad: {**ad, "w": (ad["w"].a, ad["w"].b)}, r"expected Factors\(a, b\)"),
        (lambda ad: {**ad, "w": Factors(ad["w"].a[:, :4], ad["w"].b[:4])}, r"got \(400, 4\)"),
        (lambda ad: list(ad.values()), "must be a dict"),
    ],
)
def test_adapters_that_do_not_fit(change: object, message: str) -> None:
    bad = change(lora_jax.init(jax.random.key(0), LAYOUT))  # type: ignore[operator]
    with pytest.raises(LoraError, match=message):
        lora_jax.adapt(LAYOUT, F)(PARAMS, bad, jnp.ones((2, 3, 400)))
    with pytest.raises(LoraError, match=message):
        lora_jax.merge(LAYOUT, PARAMS, bad)
