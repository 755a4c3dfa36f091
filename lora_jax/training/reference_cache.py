"""The log-probabilities by a reference (`Workload.reference`), kept on disk in the user's cache.

A file has the values of one reference: its name is a hash of the base, of the adapter that the run
begins with, and of what else decides the bits. An example is found by a hash of its tokens, so by
its data, its template, and the shape of its batch. A batch with an example that is not known yet
takes a second forward pass, whose values are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lora_jax.checkpoint.fingerprint import digests
from lora_jax.errors import LoraError
from lora_jax.system import program_cache, regular_files, user_cache, whole_files
from lora_jax.system.user_cache import CacheError
from lora_jax.training.evaluation import AHEAD
from lora_jax.training.open_run import Setup
from lora_jax.training.state import Trained

MOST = 1_000_000  # examples in a file
_RECORD = np.dtype([("key", "V16"), ("value", "<f4", (2,))])
_SUM = 32  # bytes of the SHA-256 that a file begins with
_NOT_READ = ("reference", "weight", "index")  # entries of a batch that the model does not read


class ReferenceCache:
    """The known values of one reference, by the hash of the example."""

    def __init__(self, path: pathlib.Path | None) -> None:
        """Read the file, if there is one; `CacheError` if it is damaged. None: keep no file."""
        self._path, self._known = path, {} if path is None else _read(path)
        self._new, self._pending = False, deque[tuple[list[bytes], Any]]()

    def values(self, batch: Any, refer: Callable[[Any], jax.Array]) -> Any:
        """Return the reference of a batch, from `refer(batch)` if an example is not known."""
        self.learn(AHEAD)
        keys = _keys(batch)
        found = [self._known.get(key) for key in keys]
        if None not in found:
            return np.array(found, np.float32)
        self._pending.append((keys, value := refer(batch)))
        return value

    def write(self) -> None:
        """Write the file if values are new; this waits for the device."""
        self.learn()
        if self._path is None or not self._new:
            return
        with contextlib.suppress(LoraError):  # the disk is full: the values are computed again
            self._known = _read(self._path) | self._known  # of another run at the same time
            kept = list(self._known.items())[-MOST:]
            rows = np.zeros(len(kept), _RECORD)
            rows["key"] = np.array([key for key, _ in kept], "V16")
            rows["value"] = [value for _, value in kept]
            content = rows.tobytes()
            whole_files.write(self._path, hashlib.sha256(content).digest() + content)
        self._new = False

    def learn(self, ahead: int = 0) -> None:
        """Read values from the device, for all but the last `ahead` batches."""
        while len(self._pending) > ahead:
            keys, value = self._pending.popleft()
            rows = np.asarray(value)
            if np.isfinite(rows).all():  # otherwise the run is about to stop
                self._known |= zip(keys, map(tuple, rows.tolist()), strict=True)
                self._new = True


def opened(
    setup: Setup, start: Trained | None, say: Callable[[str], object]
) -> ReferenceCache | None:
    """Return the cache of a run that begins at `start`; None if its workload keeps nothing, or if
    the cache cannot be trusted, which `say` prints."""
    program = setup.workload.reference_program
    if start is None or program is None or jax.process_count() > 1:
        return None
    arrays = {"base": jax.tree.leaves(setup.frozen), "start": jax.tree.leaves(start)}
    device, grid = jax.devices()[0].device_kind, dict(setup.place.mesh.shape)
    facts = [program, setup.layout.to_json(), digests(arrays), jax.__version__, device, grid]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    try:
        folder = user_cache.folder("references", program_cache.machine())
        return ReferenceCache(folder / name)
    except (CacheError, OSError) as error:
        say(f"note: the reference is computed for each batch: {error}")
        return None


def _keys(batch: Any) -> list[bytes]:
    """Return a hash of what the model reads of each example."""
    read = [np.asarray(batch[name]) for name in sorted(batch) if name not in _NOT_READ]
    start = str([x.shape for x in read]).encode()
    each = (start + b"".join(x[i].tobytes() for x in read) for i in range(len(read[0])))
    return [hashlib.blake2b(content, digest_size=16).digest() for content in each]


def _read(path: pathlib.Path) -> dict[bytes, tuple[float, float]]:
    """Return the values in a file that may have been damaged."""
    if not path.exists() and not path.is_symlink():
        return {}
    content = regular_files.read(path, CacheError)
    total, rows = content[:_SUM], content[_SUM:]
    if hashlib.sha256(rows).digest() != total or len(rows) % _RECORD.itemsize:
        raise CacheError(f"{path} is damaged: its contents do not have its SHA-256; delete it")
    found = np.frombuffer(rows, _RECORD)
    if not (np.isfinite(found["value"]) & (found["value"] <= 0)).all():
        raise CacheError(f"{path} has values that are not log-probabilities; delete it")
    return dict(zip(found["key"].tolist(), map(tuple, found["value"].tolist()), strict=True))
