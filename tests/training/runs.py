"""Small runs of train.py, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import train

ROOT = pathlib.Path(train.__file__).parent
OWN = str(ROOT / "configs/own_model.py")
SMALL = ("--width", "16", "--batch-size", "32", "--steps", "12", "--evaluate-every", "4")


def run(path: pathlib.Path, *arguments: str, config: str = OWN) -> dict[str, Any]:
    """Train in this process, to the end; the summary."""
    status = train.main(["--config", config, "--run-dir", str(path), *arguments])
    assert status == 0
    return json.loads((path / "summary.json").read_text())


def spawn(path: pathlib.Path, *arguments: str, config: str = OWN) -> subprocess.Popen[str]:
    """Start train.py as a process of its own, on one CPU device."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", config]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    # A shell that starts the tests in the background has them ignore SIGINT, and so would the run.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*command, "--run-dir", str(path), *arguments],
            cwd=path.parent,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    finally:
        signal.signal(signal.SIGINT, before)
