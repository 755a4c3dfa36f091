"""The adapters of a run, alone: what is kept of it when its checkpoints are deleted."""

from __future__ import annotations

import pathlib
import shutil

import lora_jax
from lora_jax.checkpoint import restore_base
from lora_jax.training.step import Trained


def folder(run: pathlib.Path, name: str) -> pathlib.Path:
    """Where the adapter `name` ("best" or "last") of a run lies."""
    return run / "adapters" / name


def save(run: pathlib.Path, name: str, layout: lora_jax.Layout, trained: Trained) -> None:
    """Write adapters and the parameters trained beside them, replacing an earlier export."""
    target = folder(run, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    for partial in target.parent.glob(f"{name}.*"):  # what a kill left half-written
        shutil.rmtree(partial)
    lora_jax.save(target, layout, trained["adapters"], base=trained["base"], overwrite=True)


def load(run: pathlib.Path, name: str) -> Trained:
    """What `save` wrote, bit for bit."""
    path = folder(run, name)
    _, adapters = lora_jax.restore(path)
    return {"adapters": adapters, "base": restore_base(path)}


def size(path: pathlib.Path) -> int:
    """Bytes of all files below `path`."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
