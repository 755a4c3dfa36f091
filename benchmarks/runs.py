"""Run `train.py` in processes of its own, for benchmarks that compare whole runs."""

import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]


def summary(arguments: Sequence[str], folder: pathlib.Path) -> dict[str, Any]:
    """Run `python train.py *arguments` in `folder`, print the command, and return its summary.

    A finished run is read, not repeated.
    """
    file = folder / "summary.json"
    command = ["train.py", *arguments, "--run-dir", str(folder)]
    print("python", shlex.join(command), flush=True)
    if not file.exists():
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text())
    return found
