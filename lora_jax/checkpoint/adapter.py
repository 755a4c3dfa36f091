"""Adapter-only checkpoints: the factors, their layout, and base parameters trained beside them.

Orbax does the writing (atomic: a path exists only when it is whole). This is the one file of the
core that names Orbax; what else needs it takes `ocp` from here, since its v1 names still move.

Every array and the text beside it carry a hash (`lora_jax.checkpoint.manifest`), checked when they are read:
a damaged adapter is an error, never other numbers. A folder from a stranger is safe to restore:
JSON and arrays are read, nothing is unpickled or imported, nothing is written. A folder that
points out of itself, declares more than it can hold, or holds an array that its manifest does not
list is refused before an array is read.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from lora_jax import paths
from lora_jax.adapters import Adapters, Factors, check
from lora_jax.checkpoint import manifest as manifests
from lora_jax.checkpoint.fingerprint import Fingerprint, check_base
from lora_jax.checkpoint.fingerprint import fingerprint as fingerprint_of
from lora_jax.checkpoint.manifest import DamagedError, Manifest
from lora_jax.errors import LoraError, listed
from lora_jax.layout import Layout

Path = str | os.PathLike[str]


def save(
    path: Path,
    layout: Layout,
    adapters: Adapters,
    *,
    base: Mapping[str, Any] | None = None,
    fingerprint: Fingerprint | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write one adapter to the folder `path`: the factors and the layout, no base weight.

    Args:
      path: a folder that does not exist yet; any file system that Orbax writes to.
      layout: of the adapters.
      adapters: `{path: Factors(a, b)}`.
      base: base parameters trained beside the adapters (a head), as `frozen.split` gives them;
        `restore_base` reads them back.
      fingerprint: `lora_jax.fingerprint` of the parameters that the adapters were trained on, to
        tell at `restore(params=...)` whether they are restored onto the same. What is in `base`
        is left out of it.
      about: JSON values that whoever uses the adapters will want to know (the base's reference,
        the names of the classes); `restore_about` reads them back.
      overwrite: replace what is at `path`, once the new adapter is whole.

    Raises:
      LoraError: the adapters do not fit the layout, `path` exists, or it cannot be written.
    """
    check(layout, adapters)
    folder = _absolute(path)
    _recover(folder)
    if folder.exists() and not overwrite:
        raise LoraError(f"{folder} exists; choose another path, or pass overwrite=True")
    trained = dict(base or {})
    tree = jax.tree.map(
        manifests.canonical,
        {"adapters": {p: {"a": f.a, "b": f.b} for p, f in adapters.items()}, "base": trained},
    )
    frozen = None if fingerprint is None else _without(fingerprint, trained)
    notes = {
        "layout": layout.to_json(),
        "base": list(trained),
        "fingerprint": frozen,
        "about": dict(about or {}),
    }
    parts: dict[str, Any] = {"meta": manifests.of(tree, notes).seal()}
    if adapters or trained:
        parts["arrays"] = {k: v for k, v in tree.items() if v}
    with writing(folder):
        _replace(folder, lambda place: ocp.save_checkpointables(place, parts, overwrite=True))


def restore(
    path: Path,
    shardings: Any = None,
    *,
    params: Any = None,
    allow_other_base: bool = False,
    max_bytes: float | None = None,
) -> tuple[Layout, Adapters]:
    """Read what `save` wrote: `restore(save(x)) == x`, bit for bit.

    Args:
      path: the folder.
      shardings: where the factors go: None (one device), one `jax.sharding.Sharding` for all, or
        a tree like the adapters.
      params: the base that they are restored onto, compared with the fingerprint that was saved.
        Parameters that were trained beside the adapters may be new in it, or not there.
      allow_other_base: go on where it differs.
      max_bytes: the most that the arrays may take; `lora_jax.checkpoint.manifest` says what it is otherwise.

    Raises:
      LoraError: no adapter at `path`, its parts contradict each other, it was trained on another
        base, or it declares more than it may (`lora_jax.checkpoint.manifest`).
      DamagedError: (a LoraError) it is not as it was saved.
    """
    folder, layout, manifest = _open(path, max_bytes)
    if params is not None:
        _check_base(folder, manifest, lambda: fingerprint_of(params), allow_other_base)
    target: dict[str, Any] = {}
    for t in layout.targets:
        place = shardings[t.path] if isinstance(shardings, Mapping) else shardings
        places = place if isinstance(place, Factors) else (place, place)
        target[t.path] = {
            name: _struct(manifest.arrays[f"adapters/{t.path}/{name}"], where)
            for name, where in zip(("a", "b"), places, strict=True)
        }
    loaded = _load(folder, manifest, "adapters", target)
    return layout, {p: Factors(**f) for p, f in loaded.items()}


def restore_base(
    path: Path, shardings: Any = None, *, max_bytes: float | None = None
) -> dict[str, Any]:
    """The base parameters that were saved beside the adapters: `{path: array}`, maybe empty."""
    folder, _, manifest = _open(path, max_bytes)
    places = shardings if isinstance(shardings, Mapping) else None
    target = {
        p: _struct(manifest.arrays[f"base/{p}"], places[p] if places else shardings)
        for p in manifest.notes["base"]
    }
    return _load(folder, manifest, "base", target)


def restore_layout(path: Path) -> Layout:
    """The layout alone: small, and read without an array."""
    return _open(path, None)[1]


def restore_about(path: Path) -> dict[str, Any]:
    """What was saved as `about`, maybe nothing. It is the writer's word: check what you use."""
    about = _open(path, None)[2].notes.get("about")
    return dict(about) if isinstance(about, Mapping) else {}


def check_trained_on(path: Path, ours: Fingerprint, *, allow_other_base: bool = False) -> None:
    """What `restore(params=...)` checks, by a fingerprint of `params` that was taken before.

    Args:
      path: the folder.
      ours: `lora_jax.fingerprint` of the base here.
      allow_other_base: check nothing.

    Raises:
      LoraError: the adapters were trained on another base, or do not say on which.
    """
    folder, _, manifest = _open(path, None)
    _check_base(folder, manifest, lambda: ours, allow_other_base)


def read_manifest(folder: epath.Path, max_bytes: float | None, part: str = "arrays") -> Manifest:
    """The manifest of a checkpoint that holds one as "meta"; checked, and no array read.

    Whoever has it may load what it lists: `folder` holds these arrays, as they are declared, and
    no other.

    Args:
      folder: of the checkpoint.
      max_bytes: as for `restore`.
      part: the only other part of the checkpoint, which holds the arrays.

    Raises:
      LoraError, DamagedError: as `restore`.
    """
    local = "://" not in str(folder)
    with reading(folder):
        on_disk = manifests.check_folder(pathlib.Path(folder)) if local else None
        found = manifests.unseal(_sealed(folder))
        manifests.check_declared(found, on_disk, max_bytes)
        _check_stored(folder, found, part)
    return found


def _sealed(folder: epath.Path) -> Any:
    """The strings in "meta", from the file that Orbax keeps them in.

    Orbax would load every array that it finds there, whatever its size.
    """
    file = folder / "meta" / "_strings.json"
    if not file.exists():
        return None
    manifests.check_json(file, file.stat().length)
    return json.loads(file.read_text())


@contextlib.contextmanager
def reading(folder: epath.Path) -> Iterator[None]:
    """Whatever goes wrong while `folder` is read becomes an error that names it.

    A lack of memory or of permission is no damage, and passes.
    """
    try:
        with _quiet():
            yield
    except LoraError as error:
        raise type(error)(f"{folder}: {error}") from error
    except Exception as error:
        cause = _innermost(error)
        if isinstance(cause, MemoryError | PermissionError | jax.errors.JaxRuntimeError):
            raise
        raise DamagedError(f"{folder} is damaged: {_said(cause)}") from error


@contextlib.contextmanager
def writing(folder: epath.Path) -> Iterator[None]:
    """Whatever goes wrong while `folder` is written becomes an error that names it."""
    try:
        with _quiet():
            yield
    except LoraError:
        raise
    except Exception as error:
        raise LoraError(f"{folder} cannot be written: {_said(_innermost(error))}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Of many operations under way Orbax reports the first that fails, and abandons the others.

    Each of those leaves a traceback on stderr, as it is collected or finds its event loop closed:
    pages that would bury the one message that counts. It also warns of a part that holds no array,
    as ours that holds the manifest.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(max(level, logging.ERROR))
    disabled, logger.disabled = logger.disabled, True
    sys.unraisablehook = lambda what: None if _is_abandoned(what.exc_value) else hook(what)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            try:
                yield
            except Exception:
                gc.collect()
                raise
    finally:
        logger.disabled, sys.unraisablehook = disabled, hook
        absl.setLevel(level)


def _is_abandoned(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _innermost(error: BaseException) -> BaseException:
    """The first cause: Orbax reports what its libraries raise as something of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _said(error: BaseException) -> str:
    """What TensorStore says, without the pages of settings that it puts after it."""
    return f"{type(error).__name__}: {str(error).partition(' [tensorstore_spec')[0][:1000]}"


def _replace(folder: epath.Path, write: Callable[[epath.Path], None]) -> None:
    """Write to `folder`; what is there is kept until the new one is whole."""
    if not folder.exists():
        write(folder)
        return
    fresh, old = (folder.with_name(f"{folder.name}.{end}") for end in ("new", "old"))
    write(fresh)
    _once(lambda: (old.rmtree(missing_ok=True), folder.rename(old), fresh.rename(folder)))
    _once(lambda: old.rmtree())


def _recover(folder: epath.Path) -> None:
    """Bring back what a kill between the two renames of `_replace` has left under another name."""
    old = folder.with_name(f"{folder.name}.old")
    _once(lambda: old.rename(folder) if old.exists() and not folder.exists() else None)


def _once(act: Callable[[], Any]) -> None:
    """By one process, while the others wait."""
    if jax.process_index() == 0:
        act()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("lora_jax.checkpoint")


def _open(path: Path, max_bytes: float | None) -> tuple[epath.Path, Layout, Manifest]:
    folder = _absolute(path)
    if not folder.exists():
        near = [p.name for p in folder.parent.iterdir()] if folder.parent.exists() else []
        raise LoraError(f"no adapter at {folder}; its parent folder holds {sorted(near)[:10]}")
    if not (folder / "meta").exists():
        raise LoraError(f"{folder} is not an adapter that lora_jax.save wrote: it has no meta")
    manifest = read_manifest(folder, max_bytes)
    with reading(folder):
        layout = Layout.from_json(manifest.notes["layout"])
        _check_layout(layout, manifest)
    return folder, layout, manifest


def _check_layout(layout: Layout, manifest: Manifest) -> None:
    """Raise `LoraError` unless the declared arrays are the layout's and the trained base's."""
    declared = {p: entry.shape for p, entry in manifest.arrays.items()}
    expected = {f"base/{p}": declared.get(f"base/{p}") for p in manifest.notes["base"]}
    for t in layout.targets:
        manifests.check_path(t.path)
        manifests.check_shape(t.path, t.shape)
        expected |= {f"adapters/{t.path}/a": t.a_shape, f"adapters/{t.path}/b": t.b_shape}
    for path in dict.fromkeys([*expected, *declared]):
        if path not in declared or expected.get(path) != declared[path]:
            raise LoraError(
                f"its parts contradict each other: {path} has the shape {declared.get(path)} in "
                f"the list of arrays, and {expected.get(path)} by the layout"
            )


def _check_base(
    folder: epath.Path, manifest: Manifest, take: Callable[[], Fingerprint], allow: bool
) -> None:
    stored = manifest.notes["fingerprint"]
    if stored is None and not allow:
        raise LoraError(
            f"{folder} has no fingerprint of its base to compare params with; pass fingerprint= "
            "to lora_jax.save, or allow_other_base=True here"
        )
    if stored is not None and not allow:
        ours = _without(take(), manifest.notes["base"])
        check_base(stored, ours, allow, str(folder))


def _without(fingerprint: Fingerprint, trained: Any) -> dict[str, Any]:
    return {p: value for p, value in fingerprint.items() if p not in trained}


def _load(
    folder: epath.Path, manifest: Manifest, part: str, target: dict[str, Any]
) -> dict[str, Any]:
    if not target:
        return {}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with reading(folder):
        with context:
            loaded = ocp.load_checkpointables(folder, {"arrays": {part: target}})["arrays"][part]
        damaged = manifest.damaged(loaded, f"{part}/")
        if damaged:
            raise DamagedError(f"damaged:\n{listed(damaged)}")
    return loaded


def _check_stored(folder: epath.Path, manifest: Manifest, part: str) -> None:
    """Raise unless the parts of `folder` are those, and hold what the manifest lists."""
    parts = {child.name for child in folder.iterdir() if child.is_dir()}
    if other := sorted(n for n in parts - {"meta", part} if not n.startswith(".")):
        raise DamagedError(f"it holds {listed(other)}\nexpected no folder but meta and {part}")
    found = ocp.checkpointables_metadata(folder).metadata
    if not isinstance(found["meta"], Mapping) or set(found["meta"]) != manifests.SEALED:
        raise DamagedError(f"its meta does not hold {sorted(manifests.SEALED)} and nothing else")
    if part in parts and found[part] is None:
        raise DamagedError(f"damaged: the description of its {part} cannot be read")
    manifests.check_stored(manifest, paths.flatten(found.get(part, {})))


def _struct(entry: manifests.Entry, sharding: Any) -> jax.ShapeDtypeStruct:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(entry.shape, jnp.dtype(entry.dtype), sharding=sharding)


def _absolute(path: Path) -> epath.Path:
    folder = epath.Path(path)
    return folder if "://" in str(path) else epath.Path(os.path.abspath(folder))
