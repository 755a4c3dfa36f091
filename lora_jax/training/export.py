"""The exported adapters of a run, which are kept when its checkpoints are deleted."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from lora_jax.adapters import Adapter
from lora_jax.checkpoint import save as save_adapter
from lora_jax.checkpoint.adapter import restore
from lora_jax.checkpoint.fingerprint import Fingerprint
from lora_jax.layout import Layout
from lora_jax.training.state import Trained


def folder(run: pathlib.Path, name: str) -> pathlib.Path:
    """Return the folder of the adapter `name` ("best" or "last") of a run."""
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

    If it cannot be written, the earlier export is unchanged.
    """
    save_adapter(
        folder(run, name),
        Adapter(layout, trained["adapters"], trained["base"]),
        fingerprint=fingerprint,
        about=about,
        overwrite=True,
    )


def load(run: pathlib.Path, name: str, where: Any = None) -> Trained:
    """Read the arrays that `save` wrote, bit for bit; `where` is a tree of shardings like them."""
    places = None if where is None else {**where["adapters"], **where["base"]}
    _, adapters, trainable = restore(folder(run, name), places)
    return {"adapters": adapters, "base": trainable}


def size(path: pathlib.Path) -> int:
    """Return the total bytes of all files below `path`."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
