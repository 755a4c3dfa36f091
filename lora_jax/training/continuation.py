"""A run that goes on with other settings: more steps, another optimizer, interval or batch size.

The fields that may change are marked in the config (`config.changeable`). A checkpoint holds the
config that wrote it, so each change is noticed when a checkpoint is restored, at its step.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.errors import listed
from lora_jax.system import whole_files
from lora_jax.training import optimizer
from lora_jax.training.checkpoints import steps_in
from lora_jax.training.config import Config, ConfigError, OptimizerConfig
from lora_jax.training.config_json import FIXED, changes, to_dict


def reopen(path: pathlib.Path, stored: Mapping[str, Any], config: Config) -> None:
    """Let the run in `path`, whose config was `stored`, go on with `config`.

    Raise `ConfigError` if a field differs that decides what the run is, or if no step is left.
    """
    changed = changes(stored, config)
    if not changed:
        return
    if fixed := changes(stored, config, FIXED):
        raise ConfigError(
            f"{path} holds a run of another config; it differs in\n{listed(fixed, 20)}\n"
            "A run cannot change these on its way. Give another --run-dir (and, to begin it with "
            f"this run's adapter, --from {path}), or --fresh to delete that run"
        )
    finished = (path / "summary.json").exists()
    step = max(steps_in(path / "checkpoints"), default=0)
    if finished and not step:
        raise ConfigError(
            f"{path} is finished and its checkpoints are gone, so it cannot go on: begin another "
            f"run with its adapter (--from {path} and another --run-dir)"
        )
    steps = config.steps
    if step > steps or (finished and step == steps):
        raise ConfigError(
            f"{path} has taken {step:,} steps and --steps is {steps:,}: no step is left for\n"
            f"{listed(changed, 20)}\nGive more --steps, another --run-dir, or --fresh to delete it"
        )
    # In this order: without a summary the run is unfinished, and either config may go on with it.
    (path / "summary.json").unlink(missing_ok=True)
    whole_files.write_json(path / "config.json", to_dict(config))


def rates(saved: Mapping[str, Any], config: Config, applied: int) -> str:
    """Say how the learning rate goes on after `applied` steps of a run whose config was `saved`."""
    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    before = OptimizerConfig(**{k: v for k, v in saved["optimizer"].items() if k in known})

    def rate(settings: OptimizerConfig, steps: int, count: int) -> float:
        return float(optimizer.rate(optimizer.hyper(settings, steps), np.float32(count), np))

    last = rate(before, saved["steps"], max(applied - 1, 0))
    following = rate(config.optimizer, config.steps, applied)
    return (
        f"The learning rate was {last:.3g} and goes on at {following:.3g}, as in a run that was "
        f"asked for {config.steps:,} steps ({config.optimizer.schedule})."
    )


def batches_before(saved: Mapping[str, Any], config: Config, taken: int) -> int | None:
    """Return how many batches of the new size hold the examples of `taken` batches before.

    None: the batch size is the same.
    """
    old, new = (values.get("data", {}).get("batch_size") for values in (saved, to_dict(config)))
    return None if old == new else taken * old // new
