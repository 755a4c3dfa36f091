"""How `a` begins."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.training import initializers
from tests.training.runs import SMALL, run

FLAT = lora_jax.Target("w", (400, 30), (), (0,), (1,), rank=8, alpha=8.0)
STACKED = lora_jax.Target("w", (3, 20, 5, 30), (0,), (1, 2), (3,), rank=8, alpha=8.0)


@pytest.mark.parametrize("name", initializers.INITIALIZERS)
@pytest.mark.parametrize("target", [FLAT, STACKED])
def test_shape_dtype_and_spread(name: initializers.InitName, target: lora_jax.Target) -> None:
    layout = lora_jax.Layout((target,))
    a = lora_jax.init(jax.random.key(0), layout, a_init=initializers.INITIALIZERS[name])["w"].a
    assert a.shape == target.a_shape
    assert a.dtype == jnp.float32
    spread = {"uniform": 1 / np.sqrt(3)}.get(name, 1.0) / np.sqrt(target.fan_in)
    np.testing.assert_allclose(jnp.std(a), spread, rtol=0.05)


def test_uniform_stays_within_its_bound_and_comes_near() -> None:
    a = initializers.uniform(jax.random.key(0), FLAT, jnp.float32)
    assert 0.99 / 20 < float(jnp.abs(a).max()) <= 1 / 20


def test_orthogonal_columns_in_every_slice() -> None:
    a = initializers.orthogonal(jax.random.key(0), STACKED, jnp.float32).reshape(3, 100, 8)
    gram = jnp.einsum("sir,siq->srq", a, a)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(8), gram.shape), atol=1e-5)
    assert not np.allclose(a[0], a[1])


def test_a_run_begins_as_its_config_says(tmp_path: pathlib.Path) -> None:
    """With a learning rate of nearly nothing, `a` at the end is `a` at the beginning."""
    still = ("--optimizer.learning-rate", "1e-30", "--steps", "1", "--lora.init")
    found = {}
    for name in initializers.INITIALIZERS:
        run(tmp_path / name, *SMALL, *still, name)
        folder = tmp_path / name / "adapters/last"
        layout, adapters, _ = lora_jax.restore(folder)
        target = layout.targets[0]
        key = jax.random.key(0)
        wanted = lora_jax.init(key, layout, a_init=initializers.INITIALIZERS[name])
        np.testing.assert_allclose(adapters[target.path].a, wanted[target.path].a, atol=1e-6)
        found[name] = np.asarray(adapters[target.path].a)
        assert json.loads((tmp_path / name / "config.json").read_text())["lora"]["init"] == name
    assert not np.allclose(found["gaussian"], found["uniform"])
