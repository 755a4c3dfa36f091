"""Saving an adapter writes no line that a user would have to understand."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_jax


def test_a_save_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Saving an adapter logs no line. Red without the filter: Orbax says that "meta" is skipped."""
    params = {"w": jnp.ones((8, 8))}
    spec = lora_jax.LoraSpec(rank=2, alpha=4.0, targets=("w",))
    layout = lora_jax.resolve(spec, lambda p, x: x @ p["w"], params, jnp.ones((2, 8)))
    filters = list(logging.getLogger("absl").filters)
    with caplog.at_level(logging.WARNING):
        lora_jax.save(tmp_path / "a", (layout, lora_jax.init(jax.random.key(0), layout)))
    assert not caplog.records
    assert logging.getLogger("absl").filters == filters
