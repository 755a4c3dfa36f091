"""Small runs of train.py in this process; tests.training.forks runs them in other processes."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import train

ROOT = pathlib.Path(train.__file__).parent
OWN = str(ROOT / "configs/own_model.py")
SMALL = ("--width", "16", "--batch-size", "32", "--steps", "12", "--evaluate-every", "4")


def run(path: pathlib.Path, *arguments: str, config: str = OWN) -> dict[str, Any]:
    """Train in this process to the end, and return the summary."""
    status = train.main(["--config", config, "--run-dir", str(path), *arguments])
    assert status == 0
    return json.loads((path / "summary.json").read_text())
