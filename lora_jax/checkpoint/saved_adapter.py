"""One saved adapter on its base: what its folder says, and its arrays when they are asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import Adapter
from lora_jax.bases.recipe import ABOUT, BEGUN
from lora_jax.checkpoint import manifest as manifests
from lora_jax.checkpoint import storage
from lora_jax.checkpoint.fingerprint import Fingerprint, check_base, is_fingerprint
from lora_jax.checkpoint.manifest import Manifest
from lora_jax.checkpoint.storage import Path, RemotePath
from lora_jax.errors import LoraError, listed
from lora_jax.layout import Layout
from lora_jax.updates.kind import kind_of

EXTRA = "extra"  # the key of parameters that a method adds to the model, next to the model's


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a folder that `lora_jax.save` wrote: all of it but the arrays, checked.

    manifest: the arrays as they are declared, and the notes.
    about: the `about` that was saved, or {}; not checked.
    name: the name by which users ask for it.
    allow_other_base: whether the caller may use it on another base than its own.
    """

    folder: RemotePath
    layout: Layout
    manifest: Manifest
    about: Mapping[str, Any]
    name: str = ""
    allow_other_base: bool = False

    @classmethod
    def open(cls, path: Path, max_bytes: float | None = None, name: str = "") -> SavedAdapter:
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
        about = manifest.notes.get("about")
        return cls(folder, layout, manifest, about if isinstance(about, dict) else {}, name)

    @classmethod
    def open_lora(cls, path: Path, name: str, allow_other_base: bool = False) -> SavedAdapter:
        """Open an adapter of LoRA; raise if a method has added parameters of its own to the model.

        Code that loads LoRA adapters ignores them, so it would compute another model.
        """
        found = cls.open(path, name=name)
        own = [path for path in found.trainable_shapes if path.startswith(f"{EXTRA}/")]
        if own:
            raise LoraError(
                f"{name!r} ({path}) was trained by the method {str(found.about.get('method'))[:80]}"
                f", which adds parameters of its own to the model:\n{listed(own)}\nOnly LoRA "
                "adapters, and base parameters trained in full with them, can be used here. The "
                "run's summary.json has its scores; in Python, Method.apply runs the model with "
                "them (docs/methods.md)"
            )
        return dataclasses.replace(found, allow_other_base=allow_other_base)

    @functools.cached_property
    def adapter(self) -> Adapter:
        """The adapter on one device, as `lora_jax.restore` returns it."""
        return self.load()

    @property
    def parameters(self) -> dict[str, Any]:
        return self.adapter.parameters

    @property
    def trainable(self) -> Mapping[str, Any]:
        """The parameters of the base that were trained in full with the adapter."""
        return self.adapter.trainable

    @property
    def labels(self) -> tuple[str, ...]:
        return labels_in(self.about)

    @property
    def model(self) -> Mapping[str, Any]:
        """The settings of the base, {} if it names none."""
        model = self.about.get("model", {})
        if not isinstance(model, Mapping):
            raise LoraError(f"{self.folder} says that its model is {str(model)[:80]!r}, no object")
        return model

    @property
    def recipe(self) -> Mapping[str, Any] | None:
        """The recipe by which the base was quantised (`bases.recipe`), or None."""
        if not isinstance(how := self.about.get(ABOUT), Mapping | None):
            raise LoraError(f"{self.folder} says {ABOUT} is {str(how)[:80]!r}")
        return how

    @property
    def changed_by(self) -> str | None:
        """The method that changed the base before the first step (`init_from_base`), or None."""
        if not isinstance(method := self.about.get(BEGUN), str | None):
            raise LoraError(f"{self.folder} says {BEGUN} is {str(method)[:80]!r}")
        return method

    @property
    def trainable_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the trainable parameters by path."""
        entries = self.manifest.arrays
        return {p: entries[f"base/{p}"].shape for p in self.manifest.notes["base"]}

    def check_base(self, ours: Fingerprint, fresh: Container[str] = ()) -> None:
        """Check a base by its fingerprint, as `restore(params=...)` does.

        The parameters `fresh` of it may be missing in the other, such as a new head.
        """
        if self.allow_other_base:
            return
        notes = self.manifest.notes
        if (stored := notes.get("fingerprint")) is None:
            raise LoraError(
                f"{self.folder} has no fingerprint of its base to compare params with; pass "
                "fingerprint= to lora_jax.save, or allow_other_base=True here"
            )
        known = stored if is_fingerprint(stored) else {}
        ours = {p: value for p, value in ours.items() if p in known or p not in fresh}
        check_base(stored, without(ours, notes["base"]), False, str(self.folder))

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
            places = place if isinstance(place, fields) else [place] * len(fields._fields)
            named = zip(fields._fields, places, strict=True)
            factors[t.path] = {n: struct(f"adapters/{t.path}/{n}", each) for n, each in named}
        base = {p: struct(f"base/{p}", place_of(p)) for p in self.manifest.notes["base"]}
        target = {k: v for k, v in {"adapters": factors, "base": base}.items() if v}
        loaded = storage.load(self.folder, self.manifest, "arrays", target) if target else {}
        arrays = loaded.get("adapters", {})
        adapters = {t.path: kind_of(t).fields(**arrays[t.path]) for t in self.layout.targets}
        return Adapter(self.layout, adapters, loaded.get("base", {}))


def labels_in(about: Mapping[str, Any]) -> tuple[str, ...]:
    labels = about.get("labels")
    return tuple(map(str, labels)) if isinstance(labels, list) else ()


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


def without(fingerprint: Fingerprint, trained: Any) -> dict[str, Any]:
    """Return a fingerprint without the parameters that were trained."""
    return {p: value for p, value in fingerprint.items() if p not in trained}
