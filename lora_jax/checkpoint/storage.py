"""Folders that Orbax writes: read with distrust, written whole, with readable errors.

This is the only file that names Orbax, since its v1 names still move. Orbax is imported when it is
used, so `import lora_jax` does not pay for it.

A folder from a stranger is safe to read. JSON and arrays are read; nothing is unpickled, imported
or written. A folder is refused before any memory is allocated if it links out of itself, holds
arrays that its manifest does not list, or declares more than it can hold.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from lora_jax import paths
from lora_jax.checkpoint import folder as folders
from lora_jax.checkpoint import manifest as manifests
from lora_jax.checkpoint import stored_arrays
from lora_jax.checkpoint.manifest import Manifest, StoredArray
from lora_jax.errors import DamagedError, LoraError, cure, errno_of, listed
from lora_jax.system import interrupts

# Errors of the system that say nothing of what is on the disk.
_PASSING = {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EMFILE, errno.ENFILE}

ADAPTER = "arrays"  # the part with an adapter's arrays
Path = str | os.PathLike[str]
RemotePath = Any  # etils' epath.Path: a local folder, or a remote one (gs://...)


def orbax() -> Any:
    from orbax.checkpoint import v1

    return v1


def folder_at(path: Path) -> RemotePath:
    """Return the folder at `path`, local or remote."""
    from etils import epath  # comes with Orbax, whose paths are these

    return epath.Path(path).expanduser()


def absolute(path: Path) -> RemotePath:
    """Return the same folder by its absolute path, which Orbax needs."""
    return folder_at(path if "://" in str(path) else os.path.abspath(os.path.expanduser(path)))


def read_manifest(folder: RemotePath, max_bytes: float | None, part: str = ADAPTER) -> Manifest:
    """Return the manifest of a checkpoint, its "meta", after checking it; no array is read.

    The caller may then load the arrays that it lists: `folder` holds exactly these, as declared, in
    `part`.
    """
    remote = "://" in str(folder)
    with reading(folder):
        on_disk = None if remote else folders.check(pathlib.Path(folder), part, max_bytes)
        found = manifests.unseal(_sealed(folder))
        manifests.check_declared(found, on_disk, max_bytes)
        _check_stored(folder, found, part)
    return found


def _sealed(folder: RemotePath) -> Any:
    """Return the strings in "meta", from the file in which Orbax stores them.

    Orbax itself would load every array that it finds there, of any size.
    """
    file = folder / "meta" / "_strings.json"
    if not file.exists():
        return None
    if (size := file.stat().length) > folders.JSON_BYTES:
        raise LoraError(f"{file} has {size:,} bytes; the limit of JSON is {folders.JSON_BYTES:,}")
    return json.loads(file.read_text())


def _check_stored(folder: RemotePath, manifest: Manifest, part: str) -> None:
    """Raise unless `folder` has exactly these parts, with the arrays that the manifest lists."""
    parts = {child.name for child in folder.iterdir() if child.is_dir()}
    if other := sorted(n for n in parts - {"meta", part} if not n.startswith(".")):
        raise DamagedError(f"it holds {listed(other)}\nexpected no folder but meta and {part}")
    if _is_direct(folder, part):
        meta: Any = stored_arrays.names(pathlib.Path(folder) / "meta")
        found = stored_arrays.described(pathlib.Path(folder) / part) if part in parts else {}
    else:
        meta, found = _described(folder, part)
    if set(meta) != manifests.SEALED:
        raise DamagedError(f"its meta does not hold {sorted(manifests.SEALED)} and nothing else")
    manifests.check_stored(manifest, found)


def _is_direct(folder: RemotePath, part: str) -> bool:
    """Return whether TensorStore reads the arrays, without Orbax."""
    return part == ADAPTER and "://" not in str(folder)


def _described(folder: RemotePath, part: str) -> tuple[Any, dict[str, StoredArray]]:
    """Return Orbax's description of "meta", and of each array of a part."""
    found = orbax().checkpointables_metadata(folder).metadata
    if part in found and found[part] is None:
        raise DamagedError(f"damaged: the description of its {part} cannot be read")
    arrays = {}
    for path, x in paths.flatten(found.get(part, {})).items():
        chunk = x.storage_metadata.chunk_shape if x.storage_metadata else x.shape
        arrays[path] = StoredArray(tuple(x.shape), jnp.dtype(x.dtype).name, tuple(chunk))
    return found["meta"] or (), arrays


def load(folder: RemotePath, manifest: Manifest, part: str, target: Any) -> Any:
    """Read arrays of one part of a checkpoint, and check them against their hashes.

    `target` is a tree of `jax.ShapeDtypeStruct` with shardings, like the part.
    """
    with reading(folder):
        if _is_direct(folder, part):
            loaded = stored_arrays.load(pathlib.Path(folder) / part, target)
        else:
            loaded = orbax().load_checkpointables(folder, {part: target})[part]
        damaged = manifest.damaged(loaded)
        if damaged:
            raise DamagedError(f"damaged:\n{listed(damaged)}")
    return loaded


@contextlib.contextmanager
def reading(folder: RemotePath) -> Iterator[None]:
    """Turn any error of the block, which reads `folder`, into one that names it.

    Errors of memory and of permission are raised unchanged, and a file system that went away is a
    plain `LoraError`: they do not mean damage.
    """
    try:
        yield
    except LoraError as error:
        raise type(error)(f"{folder}: {error}") from error
    except Exception as error:
        cause = _innermost(error)
        if isinstance(cause, MemoryError | PermissionError | jax.errors.JaxRuntimeError):
            raise
        if errno_of(cause) in _PASSING:
            raise LoraError(f"{folder} cannot be read: {_text_of(cause)}. {cure(cause)}") from error
        raise DamagedError(f"{folder} is damaged: {_text_of(cause)}") from error


@contextlib.contextmanager
def writing(folder: RemotePath) -> Iterator[None]:
    """Turn any error of the block, which writes `folder`, into one that names it."""
    try:
        yield
    except LoraError:
        raise
    except Exception as error:
        cause = _innermost(error)
        help = "" if errno_of(cause) is None else f". {cure(cause)}"
        raise LoraError(f"{folder} cannot be written: {_text_of(cause)}{help}") from error


def _innermost(error: BaseException) -> BaseException:
    """Return the first cause: Orbax wraps the errors of its libraries in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _text_of(error: BaseException) -> str:
    """Return the type and text of an error, without the settings that TensorStore appends."""
    return f"{type(error).__name__}: {str(error).partition(' [tensorstore_spec')[0][:1000]}"


def write(folder: RemotePath, parts: Mapping[str, Any]) -> None:
    """Write the parts of a checkpoint; an old `folder` stays until the new one is complete."""

    def save(place: RemotePath) -> None:
        with _without_note_of_no_arrays(), interrupts.held_back():
            orbax().save_checkpointables(place, parts, overwrite=True)

    if not folder.exists():
        save(folder)
        return
    fresh, old = (folder.with_name(f"{folder.name}.{end}") for end in ("new", "old"))
    save(fresh)
    _once(lambda: _swap(folder, fresh, old))
    _once(lambda: _delete(old))


@contextlib.contextmanager
def _without_note_of_no_arrays() -> Iterator[None]:
    """Drop one line that Orbax logs at every save: "meta" holds strings, and no arrays to merge."""

    def keep(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _swap(folder: RemotePath, fresh: RemotePath, old: RemotePath) -> None:
    _delete(old)
    folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        old.rename(folder)
        raise


def _delete(folder: RemotePath) -> None:
    """Delete a folder that nobody needs any more, or give it another name if that fails.

    Network file systems keep a file that somebody has open, and so its folder.
    """
    try:
        folder.rmtree(missing_ok=True)
    except OSError:
        with contextlib.suppress(OSError):
            folder.rename(folder.with_name(f"{folder.name}.deleted-{secrets.token_hex(4)}"))


def recover(folder: RemotePath) -> None:
    """Restore the folder that a kill between the two renames of `write` left under another name.

    What killed writes of the folder left incomplete is deleted.
    """
    _once(lambda: _recover(folder))


def _recover(folder: RemotePath) -> None:
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    part = re.compile(rf"{re.escape(folder.name)}(\.new|\.old)?\.(orbax-checkpoint-tmp|deleted-)")
    for path in folder.parent.iterdir() if folder.parent.exists() else ():
        if part.match(path.name):
            with contextlib.suppress(OSError):  # a process may have it open
                path.rmtree()


def _once(act: Callable[[], Any]) -> None:
    """Run `act` in one process while the others wait."""
    if jax.process_index() == 0:
        act()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("lora_jax.checkpoint")
