"""Run directories as train.py leaves them, with the numbers of a test and without training."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.sweeps.config import Member
from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.training.config_json import to_dict


def write(folder: pathlib.Path, members: Sequence[Member], scores: Mapping[str, Any]) -> None:
    """Write a finished run for each member.

    scores: name of the member -> (validation, test) of the number that picks the best.
    """
    for member in members:
        validation, test = scores[member.name]
        finished(folder / member.name, to_dict(member.config), validation, test)


def finished(
    path: pathlib.Path, config: Any, validation: float, test: float, select: str = "accuracy"
) -> None:
    """Write one run; the numbers that are not given are made up."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    numbers = ("steps", "skipped_steps", "base_parameters", "trainable_parameters",
               "optimizer_bytes", "adapter_file_bytes", "full_checkpoint_bytes",
               "base_bytes_per_device",
               "peak_memory_bytes", "steps_per_second", "tokens_per_second", "merged_difference",
               "compile_seconds", "total_seconds")  # fmt: skip
    summary = {
        **dict.fromkeys(numbers, 1),
        "adapter_parameters": 1000 * config["lora"]["rank"],
        "run": str(path),
        "select": select,
        "better": "lower" if select == "loss" else "higher",
        "best_step": 1,
        "before": {"validation": {select: 0.5}, "test": {select: 0.5}},
        "after": {"validation": {select: validation}, "test": {select: test}},
    }
    (path / "summary.json").write_text(json.dumps(summary))


def members(config: SweepConfig) -> tuple[Member, ...]:
    return config.expand().members
