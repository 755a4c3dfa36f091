"""Small runs of train.py in this process; tests.training.forks runs them in other processes."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax

import train
from lora_jax.sweeps import loop
from lora_jax.sweeps.config import GroupConfig
from lora_jax.training import mesh
from lora_jax.training.config import Config

ROOT = pathlib.Path(train.__file__).parent
OWN = str(ROOT / "configs/own_model.py")
SMALL = ("--width", "16", "--batch-size", "32", "--steps", "12", "--evaluate-every", "4")


def run(path: pathlib.Path, *arguments: str, config: str = OWN) -> dict[str, Any]:
    """Train in this process to the end, and return the summary."""
    status = train.main(["--config", config, "--run-dir", str(path), *arguments])
    assert status == 0
    return json.loads((path / "summary.json").read_text())


def train_in(path: pathlib.Path, config: Config, devices: Any = None) -> dict[str, Any]:
    """Train one run in a folder, without a command line, on all devices or these."""
    path.mkdir(parents=True, exist_ok=True)
    grid = mesh.make(config.mesh, devices)
    with jax.set_mesh(grid):
        return train.train(config, grid, path, train.Console(quiet=True))


def train_group(path: pathlib.Path, config: GroupConfig, devices: Any = None) -> list[Any]:
    """Train a group in a folder, without a command line."""
    grid = mesh.make(config.mesh, devices)
    with jax.set_mesh(grid):
        return loop.run(config, grid, path, train.Console())
