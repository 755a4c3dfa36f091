"""Saving an adapter says nothing, and deletes what earlier saves have left incomplete."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_jax


def test_a_save_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = {"w": jnp.ones((8, 8))}
    spec = lora_jax.LoraSpec(rank=2, alpha=4.0, targets=("w",))
    layout = lora_jax.resolve(spec, lambda p, x: x @ p["w"], params, jnp.ones((2, 8)))
    filters = list(logging.getLogger("absl").filters)
    with caplog.at_level(logging.WARNING):
        lora_jax.save(tmp_path / "a", (layout, lora_jax.init(jax.random.key(0), layout)))
    assert not caplog.records
    assert logging.getLogger("absl").filters == filters


def test_a_save_deletes_what_killed_saves_left(tmp_path: Path) -> None:
    """The rest of killed saves of a folder goes with the next save, and nothing else does."""
    layout = lora_jax.Layout((lora_jax.Target("w", (3, 4), (), (0,), (1,), rank=2, alpha=4.0),))
    rest = ["a.orbax-checkpoint-tmp", "a.new.orbax-checkpoint-tmp-1", "a.old.deleted-12"]
    others = ["ab.orbax-checkpoint-tmp", "a.new", "a.txt.orbax-checkpoint-tmp", "xa.deleted-1"]
    for name in (*rest, *others):
        (tmp_path / name / "arrays").mkdir(parents=True)
    lora_jax.save(tmp_path / "a", (layout, lora_jax.init(jax.random.key(0), layout)))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a", *others])
