"""Checkpoints of a run: the trained arrays, the optimizer's state and notes. Never a base weight.

Each checkpoint holds the arrays of one `State` (adapters, parameters trained beside them,
optimizer, step, PRNG key) and, as JSON that can be read without them, the notes: config, layout,
fingerprint of the base, iterator state, the best evaluation so far, the length of the record.

    checkpoints/7          what Orbax writes, in the background; it has this name once it is whole
    checkpoints/damaged-9  set aside, since its bits were not those that were saved

Restoring the newest one finds out which it is (`lora_jax.checkpoint.manifest`). The arrays of a
checkpoint do not know the mesh and the processes that wrote it: any others may restore it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable
from typing import Any

import jax

from lora_jax import errors, paths
from lora_jax.checkpoint import manifest as manifests
from lora_jax.checkpoint import storage
from lora_jax.checkpoint.manifest import DamagedError, Manifest
from lora_jax.checkpoint.storage import RemotePath, read_manifest, writing
from lora_jax.errors import LoraError, listed
from lora_jax.training import processes
from lora_jax.training.state import State

CheckpointNotes = dict[str, Any]  # JSON values

_log = logging.getLogger(__name__)
_UNFINISHED = re.compile(r"\d+\.(orbax-checkpoint-tmp|deleted-)")


def steps_in(directory: pathlib.Path) -> list[int]:
    """The steps of a run's checkpoints, ascending; a directory that is not there has none.

    By the names alone, which Orbax gives to what is whole.
    """
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one when it closes."""

    def __init__(
        self,
        directory: pathlib.Path,
        keep: int = 2,
        report: Callable[[str], None] = _log.warning,
    ) -> None:
        """Make the folder if need be; what a kill left half-written goes at the first save.

        Args:
          directory: on a file system that all processes share.
          keep: how many checkpoints stay; older ones are deleted.
          report: is told which checkpoint was damaged and is not used.
        """
        self._directory, self._report, self._keep = directory.absolute(), report, keep
        self._saving: int | None = None
        self._response: Any = None  # Orbax's, of the save under way
        self._is_clean = False  # whether what a kill has left is gone
        processes.by_first(self._make)

    def _make(self) -> None:
        with errors.writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Wait for the last save.

        Raises:
          LoraError: it failed. Where the block ends in an error already, that one goes on,
            unless it only asks to stop: then a lost checkpoint is the worse news.
        """
        try:
            self.wait()
        except LoraError:
            if not isinstance(error, Exception) or isinstance(error, processes.Preempted):
                raise

    def wait(self) -> None:
        """Wait for the last save, and delete the checkpoints that are not kept.

        Raises:
          LoraError: it failed.
        """
        if self._response is not None:
            # Whoever does not ask for the result keeps a thread and three open files for ever.
            response, self._response = self._response, None
            self._try(response.result)
            if processes.first():
                self._delete_older()

    def _delete_older(self) -> None:
        """Delete what is not kept; a checkpoint that somebody has open may stay.

        Its name goes first, so that what a kill leaves of it is not taken for a checkpoint.
        """
        for step in steps_in(self._directory)[: -self._keep]:
            path = self._directory / str(step)
            with contextlib.suppress(OSError):
                gone = path.rename(path.with_name(f"{step}.deleted-{secrets.token_hex(4)}"))
                shutil.rmtree(gone)

    def _clean(self) -> None:
        """Delete what a kill has left half-written or half-deleted."""
        for path in self._directory.iterdir():
            if _UNFINISHED.match(path.name):
                shutil.rmtree(path, ignore_errors=True)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint; it may yet turn out to be damaged.

        It waits for the one that is being written.
        """
        self.wait()
        return max(steps_in(self._directory), default=None)

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps. To be called before anything is saved."""

        def delete() -> None:
            for later in [found for found in steps_in(self._directory) if found > step]:
                shutil.rmtree(self._directory / str(later))

        processes.by_first(delete)

    def save(self, step: int, state: State, notes: CheckpointNotes) -> None:
        """Copy the state off the device and write it in the background.

        The arrays may be donated as soon as this returns. It waits for an earlier save.

        Raises:
          LoraError: this or the earlier checkpoint cannot be written; the ones before it are
            as they were.
        """
        self.wait()
        parts = {"state": state, "meta": manifests.of(state, notes).seal()}
        self._saving = step
        if not self._is_clean:
            processes.by_first(self._clean)
            self._is_clean = True

        def begin() -> None:
            folder = storage.absolute(self._directory / str(step))
            self._response = storage.orbax().save_checkpointables_async(folder, parts)

        self._try(begin)

    def restore(self, like: State) -> tuple[State, CheckpointNotes]:
        """The newest whole checkpoint, in the structure, dtypes and shardings of `like`.

        Newer ones that are damaged are reported and set aside, so that their steps can be saved
        again.

        Raises:
          LoraError: none is whole (all are left where they are), or the newest is of another
            structure than `like`.
        """
        abstract, damaged = jax.tree.map(_abstract, like), dict[int, str]()
        for step in reversed(steps_in(self._directory)):
            found = self._restore(step, abstract)
            if not isinstance(found, str):
                self._set_aside(damaged, step)
                return found
            damaged[step] = found
        raise LoraError(
            f"no checkpoint in {self._directory} is whole:\n{listed(damaged.values())}\n"
            "Bring one back from a copy, or give --fresh to delete this run and start again."
        )

    def _restore(self, step: int, abstract: State) -> tuple[State, CheckpointNotes] | str:
        """A checkpoint, or in what way it is damaged; every process comes to the same answer."""
        folder = storage.absolute(self._directory / str(step))
        if jax.process_count() > 1:
            # Read together, a damaged one would fail in some and leave the others waiting for them.
            found = [
                text for text in processes.everywhere(lambda: _damage(folder, abstract)) if text
            ]
            if found:
                return found[0]
        try:
            return _read(folder, abstract)
        except DamagedError as error:
            if jax.process_count() == 1:
                return str(error)
            raise LoraError(f"{error}\nEach process could read it alone: try again.") from error

    def _set_aside(self, damaged: dict[int, str], restored: int) -> None:
        for step, text in damaged.items():
            name = processes.by_first(functools.partial(self._rename, step))
            self._report(
                f"{text}\nIt is set aside as {name}, and the checkpoint of step {restored} is used "
                "in its place."
            )

    def _rename(self, step: int) -> str:
        names = (f"damaged-{step}" + (f"-{i}" if i else "") for i in range(1000))
        free = next(name for name in names if not (self._directory / name).exists())
        with errors.writing(self._directory / free):
            (self._directory / str(step)).rename(self._directory / free)
        return free

    def _try(self, act: Callable[[], object]) -> None:
        try:
            with writing(storage.absolute(self._directory)):
                act()
        except LoraError as error:
            latest = max(steps_in(self._directory), default=None)
            kept = "there is none before it" if latest is None else f"that of step {latest} is kept"
            raise LoraError(
                f"the checkpoint of step {self._saving} is lost; {kept}. {error}: it goes on from "
                "what is kept"
            ) from error


def _read(folder: RemotePath, abstract: State) -> tuple[State, CheckpointNotes]:
    """Raises DamagedError; LoraError where the run has another structure than the checkpoint."""
    manifest = read_manifest(folder, math.inf, "state")
    _check_structure(folder, manifest, abstract)
    state = storage.load(folder, manifest, "state", abstract)
    # Orbax gives a scalar PRNG key the sharding of its data, which has an axis more.
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, abstract), manifest.notes


def _damage(folder: RemotePath, abstract: State) -> str:
    """What is wrong with a checkpoint, found by this process alone; "" if nothing.

    Every process has to call it: Orbax counts its operations, and the counts have to agree.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    context = storage.orbax().Context()
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    try:
        with context:
            _read(folder, target)
    except DamagedError as error:
        return str(error)
    return ""


def _check_structure(folder: RemotePath, manifest: Manifest, abstract: State) -> None:
    stored = {p: e.kind for p, e in manifest.arrays.items()}
    ours = {p: f"{x.dtype}{list(x.shape)}" for p, x in paths.flatten(abstract).items()}
    rows = [
        f"{p}: {stored.get(p, 'nothing')} there, {ours.get(p, 'nothing')} in this run"
        for p in dict.fromkeys([*stored, *ours])
        if stored.get(p) != ours.get(p)
    ]
    if rows:
        raise LoraError(
            f"{folder} was written by a run with other arrays (adapters, parameters trained "
            f"beside them, or optimizer); {len(rows)} differ:\n{listed(rows)}\n"
            "Give that run's config, or start afresh with --fresh."
        )


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
