"""Adapter-only checkpoints: the factors, their layout, and base parameters trained with them.

Every array and the text that describes it have a hash (`lora_jax.checkpoint.manifest`), which is
checked when they are read. So a damaged adapter is an error, and never gives other numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import Adapter, check
from lora_jax.checkpoint import manifest as manifests
from lora_jax.checkpoint import storage
from lora_jax.checkpoint.fingerprint import Fingerprint, check_base, is_fingerprint
from lora_jax.checkpoint.fingerprint import fingerprint as fingerprint_of
from lora_jax.checkpoint.manifest import Manifest
from lora_jax.checkpoint.storage import Path, RemotePath
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.updates.kind import kind_of


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
    frozen = None if fingerprint is None else _without(fingerprint, trainable)
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
    return SavedAdapter.open(path).about


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a folder that `save` wrote: all of it but the arrays, read and checked once.

    folder: the folder.
    layout: the layout of the adapter.
    manifest: the arrays as they are declared, and the notes.
    """

    folder: RemotePath
    layout: Layout
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, max_bytes: float | None = None) -> SavedAdapter:
        """Read and check a folder, as `restore` does."""
        folder = storage.absolute(path)
        if not folder.exists():
            near = [p.name for p in folder.parent.iterdir()] if folder.parent.exists() else []
            raise LoraError(f"no adapter at {folder}; its parent folder holds {sorted(near)[:10]}")
        if not (folder / "meta").exists():
            raise LoraError(f"{folder} is not an adapter that lora_jax.save wrote: it has no meta")
        manifest = storage.read_manifest(folder, max_bytes)
        with storage.reading(folder):
            layout = Layout.from_json(manifest.notes["layout"])
            _check_layout(layout, manifest)
        return cls(folder, layout, manifest)

    @property
    def about(self) -> dict[str, Any]:
        """The `about` that was saved, or {}; not checked."""
        about = self.manifest.notes.get("about")
        return dict(about) if isinstance(about, Mapping) else {}

    @property
    def trainable_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the trainable parameters by path."""
        entries = self.manifest.arrays
        return {p: entries[f"base/{p}"].shape for p in self.manifest.notes["base"]}

    def check_base(self, ours: Fingerprint, fresh: Container[str] = ()) -> None:
        """Check a base by its fingerprint, as `restore(params=...)` does.

        The parameters `fresh` of it may be missing in the other, such as a new head.
        """
        notes = self.manifest.notes
        if (stored := notes.get("fingerprint")) is None:
            raise LoraError(
                f"{self.folder} has no fingerprint of its base to compare params with; pass "
                "fingerprint= to lora_jax.save, or allow_other_base=True here"
            )
        known = stored if is_fingerprint(stored) else {}
        ours = {p: value for p, value in ours.items() if p in known or p not in fresh}
        check_base(stored, _without(ours, notes["base"]), False, str(self.folder))

    def load(self, shardings: Any = None) -> Adapter:
        """Read the arrays, placed as `restore` places them."""

        def struct(name: str, place: Any) -> jax.ShapeDtypeStruct:
            place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            entry = self.manifest.arrays[name]
            return jax.ShapeDtypeStruct(entry.shape, jnp.dtype(entry.dtype), sharding=place)

        def place_of(path: str) -> Any:
            return shardings[path] if isinstance(shardings, Mapping) else shardings

        factors: dict[str, Any] = {}
        for t in self.layout.targets:
            place, fields = place_of(t.path), kind_of(t).fields
            places = (
                place if isinstance(place, fields) else fields(*(place for _ in fields._fields))
            )
            named = places._asdict().items()
            factors[t.path] = {n: struct(f"adapters/{t.path}/{n}", each) for n, each in named}
        base = {p: struct(f"base/{p}", place_of(p)) for p in self.manifest.notes["base"]}
        target = {k: v for k, v in {"adapters": factors, "base": base}.items() if v}
        loaded = storage.load(self.folder, self.manifest, "arrays", target) if target else {}
        arrays = loaded.get("adapters", {})
        adapters = {t.path: kind_of(t).fields(**arrays[t.path]) for t in self.layout.targets}
        return Adapter(self.layout, adapters, loaded.get("base", {}))


def _check_layout(layout: Layout, manifest: Manifest) -> None:
    """Raise `LoraError` unless the layout and the notes account for exactly the declared arrays."""
    declared = {p: entry.shape for p, entry in manifest.arrays.items()}
    expected = {f"base/{p}": declared.get(f"base/{p}") for p in manifest.notes["base"]}
    for t in layout.targets:
        manifests.check_path(t.path)
        manifests.check_shape(t.path, t.shape)
        shapes = kind_of(t).shapes(t)._asdict()
        expected |= {f"adapters/{t.path}/{name}": shape for name, shape in shapes.items()}
    keys = [p for p, entry in manifest.arrays.items() if entry.dtype.startswith("key<")]
    if keys:
        raise LoraError(f"{keys[0]} is declared as PRNG keys, which no adapter has")
    for path in dict.fromkeys([*expected, *declared]):
        if path not in declared or expected.get(path) != declared[path]:
            raise LoraError(
                f"its parts contradict each other: {path} has the shape {declared.get(path)} in "
                f"the list of arrays, and {expected.get(path)} by the layout"
            )


def _without(fingerprint: Fingerprint, trained: Any) -> dict[str, Any]:
    return {p: value for p, value in fingerprint.items() if p not in trained}
