"""The first values of `a`, by method."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraError
from lora_jax import adapters as initial

FLAT = lora_jax.Target("w", (400, 30), (), (0,), (1,), rank=8, alpha=8.0)
STACKED = lora_jax.Target("w", (3, 20, 5, 30), (0,), (1, 2), (3,), rank=8, alpha=8.0)


@pytest.mark.parametrize("name", initial.INITIALIZERS)
@pytest.mark.parametrize("target", [FLAT, STACKED])
def test_shape_dtype_and_spread(name: str, target: lora_jax.Target) -> None:
    layout = lora_jax.Layout((target,))
    a = lora_jax.init(jax.random.key(0), layout, method=name)["w"].a
    assert a.shape == target.a_shape
    assert a.dtype == jnp.float32
    spread = {"uniform": 1 / np.sqrt(3)}.get(name, 1.0) / np.sqrt(target.fan_in)
    np.testing.assert_allclose(jnp.std(a), spread, rtol=0.05)


def test_uniform_stays_within_its_bound_and_comes_near() -> None:
    a = initial.uniform(jax.random.key(0), FLAT, jnp.float32)
    assert 0.99 / 20 < float(jnp.abs(a).max()) <= 1 / 20


def test_orthogonal_columns_in_every_slice() -> None:
    a = initial.orthogonal(jax.random.key(0), STACKED, jnp.float32).reshape(3, 100, 8)
    gram = jnp.einsum("sir,siq->srq", a, a)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(8), gram.shape), atol=1e-5)
    assert not np.allclose(a[0], a[1])


def test_a_method_that_is_none_is_named_with_the_cure() -> None:
    layout = lora_jax.Layout((FLAT,))
    with pytest.raises(LoraError, match=r"(?s)no method 'pissa'.*init_from_base\(layout"):
        lora_jax.init(jax.random.key(0), layout, method="pissa")
    with pytest.raises(LoraError, match=r"(?s)no method 'normal'.*gaussian, uniform, orthogonal"):
        lora_jax.init(jax.random.key(0), layout, method="normal")
