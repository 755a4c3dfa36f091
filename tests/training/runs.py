"""Small runs of train.py in this process; tests.training.forks runs them in other processes."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import train
from lora_jax.checkpoint.storage import orbax
from lora_jax.sweeps import loop
from lora_jax.sweeps.config import GroupConfig
from lora_jax.training import export, mesh, one_run
from lora_jax.training.config import Config

ROOT = pathlib.Path(train.__file__).parent
OWN = str(ROOT / "configs/own_model.py")
SMALL = ("--width", "16", "--batch-size", "32", "--steps", "12", "--evaluate-every", "4")


def run(path: pathlib.Path, *arguments: str, config: str = OWN) -> dict[str, Any]:
    """Train in this process to the end, and return the summary."""
    status = train.main(["--config", config, "--run-dir", str(path), *arguments])
    assert status == 0
    return json.loads((path / "summary.json").read_text())


def train_in(
    path: pathlib.Path, config: Config, devices: Any = None, console: Any = None
) -> dict[str, Any]:
    """Train one run in a folder, without a command line, on all devices or these."""
    path.mkdir(parents=True, exist_ok=True)
    grid = mesh.make(config.mesh, devices)
    with jax.set_mesh(grid):
        return one_run.train(config, grid, path, console or train.Console(quiet=True))


def train_group(path: pathlib.Path, config: GroupConfig, devices: Any = None) -> list[Any]:
    """Train a group in a folder, without a command line."""
    grid = mesh.make(config.mesh, devices)
    with jax.set_mesh(grid):
        return loop.run(config, grid, path, train.Console())


def bits(tree: Any) -> list[tuple[str, bytes]]:
    """Dtype and bytes of each array, keys too."""

    def plain(x: Any) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [(str(x.dtype), np.asarray(plain(x)).tobytes()) for x in jax.tree.leaves(tree)]


def saved_state(run: pathlib.Path, step: int) -> Any:
    return orbax().load_checkpointables(run / f"checkpoints/{step}")["state"]


def assert_same_run(one: pathlib.Path, other: pathlib.Path, step: int) -> None:
    """Assert that record, checkpoint and exports are equal, bit for bit."""
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    states = [saved_state(run, step) for run in (one, other)]
    assert jax.tree.leaves(states[0]["optimizer"]), "nothing was compared"
    assert bits(states[0]) == bits(states[1])
    for name in ("best", "last"):
        assert bits(export.load(one, name)) == bits(export.load(other, name))
