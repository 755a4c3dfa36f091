"""Adapter-only checkpoints: the factors, their layout, and base parameters trained with them.

Every array and the text that describes it have a hash (`lora_jax.checkpoint.manifest`), which is
checked when they are read. So a damaged adapter is an error, and never gives other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from lora_jax.adapters import Adapter, check
from lora_jax.checkpoint import manifest as manifests
from lora_jax.checkpoint import storage
from lora_jax.checkpoint.fingerprint import Fingerprint
from lora_jax.checkpoint.fingerprint import fingerprint as fingerprint_of
from lora_jax.checkpoint.saved_adapter import SavedAdapter, without
from lora_jax.checkpoint.storage import Path
from lora_jax.errors import LoraError
from lora_jax.layout import Layout


def save(
    path: Path,
    adapter: Adapter,
    *,
    fingerprint: Fingerprint | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write one adapter to the folder `path`: its factors, its layout and its trainable parameters.

    No frozen base weight is written.

    Args:
      path: a folder that does not exist yet, on any file system that Orbax writes to.
      adapter: an `Adapter`, or a plain tuple of its first two or three fields.
      fingerprint: `lora_jax.fingerprint` of the parameters that the adapter was trained on. With
        it, `restore(params=...)` can check that it gets the same base. Parameters in
        `adapter.trainable` are left out of it.
      about: JSON values that users of the adapter need (the reference of the base, the names of the
        classes); `restore_about` reads them back.
      overwrite: replace an existing `path`, once the new adapter is complete.

    Raises:
      LoraError: the parameters do not fit the layout, `path` exists, or it cannot be written.

    >>> import tempfile, lora_jax
    >>> folder = tempfile.mkdtemp() + "/adapter"
    >>> layout = Layout((lora_jax.Target("w", (3, 4), (), (0,), (1,), rank=2, alpha=4.0),))
    >>> save(folder, (layout, lora_jax.init(jax.random.key(0), layout)), about={"classes": 2})
    >>> restore_about(folder), restore(folder).layout == layout
    ({'classes': 2}, True)
    """
    layout, adapters, trainable = Adapter(*adapter)
    check(layout, adapters)
    folder = storage.absolute(path)
    with storage.writing(folder):
        storage.recover(folder)
    if folder.exists() and not overwrite:
        raise LoraError(f"{folder} exists; choose another path, or pass overwrite=True")
    factors = {p: arrays._asdict() for p, arrays in adapters.items()}
    tree = jax.tree.map(manifests.canonical, {"adapters": factors, "base": dict(trainable)})
    frozen = None if fingerprint is None else without(fingerprint, trainable)
    notes = {
        "layout": layout.to_json(),
        "base": list(trainable),
        "fingerprint": frozen,
        "about": dict(about or {}),
    }
    parts: dict[str, Any] = {"meta": manifests.of(tree, notes).seal()}
    if adapters or trainable:
        parts["arrays"] = {k: v for k, v in tree.items() if v}
    with storage.writing(folder):
        storage.write(folder, parts)


def restore(
    path: Path,
    shardings: Any = None,
    *,
    params: Any = None,
    allow_other_base: bool = False,
    max_bytes: float | None = None,
) -> Adapter:
    """Read the adapter that `save` wrote: `restore(save(x)) == x`, bit for bit.

    Args:
      path: the folder.
      shardings: the placement of the arrays: None (one device), one `jax.sharding.Sharding` for
        all, or `{path: Sharding}` for every target and every trainable parameter. For a target, the
        value may be the NamedTuple of its kind, with a sharding for each array.
      params: the base for the adapter, which is compared with the saved fingerprint. Parameters
        that were trained with the adapter may be new in it, or missing.
      allow_other_base: accept a base that differs.
      max_bytes: the limit for the arrays, in place of the one in `lora_jax.checkpoint.manifest`.

    Returns:
      The adapter, which unpacks: `layout, adapters, trainable = restore(path)`.

    Raises:
      LoraError: no adapter at `path`, parts that contradict each other, an adapter that was trained
        on another base, or one that declares more than the limits (`lora_jax.checkpoint.manifest`).
      DamagedError: (a LoraError) the files are not as they were saved.
    """
    saved = SavedAdapter.open(path, max_bytes)
    if params is not None and not allow_other_base:
        saved.check_base(fingerprint_of(params))
    return saved.load(shardings)


def restore_layout(path: Path) -> Layout:
    """Return only the layout, without reading an array.

    Args:
      path: a folder that `save` wrote.

    Raises:
      LoraError: see `restore`.
    """
    return SavedAdapter.open(path).layout


def restore_about(path: Path) -> dict[str, Any]:
    """Return the `about` that was saved, or {}. It is not checked: check the values that you use.

    Args:
      path: a folder that `save` wrote.

    Raises:
      LoraError: see `restore`.
    """
    return dict(SavedAdapter.open(path).about)
