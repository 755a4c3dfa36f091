"""The exported adapters of a run, which remain when its checkpoints are deleted."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from lora_jax.adapters import Adapter
from lora_jax.checkpoint import save as save_adapter
from lora_jax.checkpoint.adapter import restore
from lora_jax.checkpoint.fingerprint import Fingerprint
from lora_jax.errors import writing
from lora_jax.layout import Layout
from lora_jax.training import processes
from lora_jax.training.state import Trained


def folder(run: pathlib.Path, name: str) -> pathlib.Path:
    """Where the adapter `name` ("best" or "last") of a run lies."""
    return run / "adapters" / name


def save(
    run: pathlib.Path,
    name: str,
    layout: Layout,
    trained: Trained,
    fingerprint: Fingerprint | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapters and the parameters trained in full, replacing an earlier export.

    Args:
      run: the run directory.
      name: of the adapter.
      layout, trained: what is written, `State.trained` of the run.
      fingerprint: of the frozen base.
      about: `Workload.about`.

    Raises:
      LoraError: it cannot be written; the earlier export is as it was.
    """
    target = folder(run, name)
    processes.by_first(lambda: _prepare(target))
    save_adapter(
        target,
        Adapter(layout, trained["adapters"], trained["base"]),
        fingerprint=fingerprint,
        about=about,
        overwrite=True,
    )


def _prepare(target: pathlib.Path) -> None:
    """Make the folder above `target`, and delete what a kill left half-written."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for end in ("orbax-checkpoint-tmp*", "deleted-*"):
            for part in target.parent.glob(f"{target.name}*.{end}"):
                shutil.rmtree(part, ignore_errors=True)


def load(run: pathlib.Path, name: str, where: Any = None) -> Trained:
    """What `save` wrote, bit for bit.

    Args:
      run: the run directory.
      name: of the adapter.
      where: shardings of it, a tree like it; None puts all on one device.
    """
    places = None if where is None else {**where["adapters"], **where["base"]}
    _, adapters, trainable = restore(folder(run, name), places)
    return {"adapters": adapters, "base": trainable}


def size(path: pathlib.Path) -> int:
    """Bytes of all files below `path`."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
