"""Checkpoints of a run: the trained arrays, the optimizer's state and notes, but no base weight.

A checkpoint holds the arrays of one `State` (adapters, parameters trained in full, optimizer state,
step, PRNG key) and notes as JSON, which can be read without the arrays: config, layout, fingerprint
of the base, iterator state, the best evaluation so far, the length of metrics.jsonl.

    checkpoints/7          written by Orbax in the background; it gets this name when it is complete
    checkpoints/damaged-9  renamed, because its bytes are not the ones that were saved

Restoring a checkpoint finds out whether it is damaged (`lora_jax.checkpoint.manifest`). The arrays
do not depend on the mesh and the processes that wrote them: any others may restore them.
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
from lora_jax.checkpoint.manifest import Manifest
from lora_jax.checkpoint.storage import RemotePath, read_manifest, writing
from lora_jax.errors import DamagedError, LoraError, listed
from lora_jax.system import interrupts
from lora_jax.training import processes
from lora_jax.training.state import State

CheckpointNotes = dict[str, Any]  # JSON values

_log = logging.getLogger(__name__)
_UNFINISHED = re.compile(r"\d+\.(orbax-checkpoint-tmp|deleted-)")


def steps_in(directory: pathlib.Path) -> list[int]:
    """Return the steps of a run's checkpoints, ascending; none if the directory does not exist.

    The names are enough, because Orbax gives a checkpoint its name when it is complete.
    """
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save when it closes."""

    def __init__(
        self,
        directory: pathlib.Path,
        keep: int = 2,
        report: Callable[[str], None] = _log.warning,
    ) -> None:
        """Make the folder, on a file system that all processes share, if it does not exist.

        The first save deletes incomplete checkpoints. `report` gets a message about each damaged
        checkpoint that is not used.
        """
        self._directory, self._report, self._keep = directory.absolute(), report, keep
        self._saving: int | None = None
        self._response: Any = None  # Orbax's, of the save under way
        self._is_clean = False  # whether the rest of earlier kills is deleted

        def make() -> None:
            with errors.writing(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)

        processes.by_first(make)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Wait for the last save.

        If the block ended with another error, that error is raised instead of a failed save's,
        unless it was only a request to stop: a lost checkpoint is worse news.
        """
        try:
            self.wait()
        except LoraError:
            if not isinstance(error, Exception) or isinstance(error, processes.Preempted):
                raise

    def wait(self) -> None:
        """Wait for the last save, and delete the checkpoints that are not kept."""
        if self._response is not None:
            # A result that nobody asks for keeps a thread and three open files until the end.
            response, self._response = self._response, None
            self._try(response.result)
            for step in steps_in(self._directory)[: -self._keep] if processes.first() else ():
                with contextlib.suppress(OSError):  # a process may have it open
                    self._delete(step)

    def _delete(self, step: int) -> None:
        """Delete a checkpoint, renamed first: a half-deleted one is not taken for a whole one."""
        path = self._directory / str(step)
        shutil.rmtree(path.rename(path.with_name(f"{step}.deleted-{secrets.token_hex(4)}")))

    def _clean(self) -> None:
        """Delete the folders that a kill left half-written or half-deleted."""
        for path in self._directory.iterdir():
            if _UNFINISHED.match(path.name):
                shutil.rmtree(path, ignore_errors=True)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, which may turn out to be damaged.

        It waits for a checkpoint that is being written.
        """
        self.wait()
        return max(steps_in(self._directory), default=None)

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps. Call this before anything is saved."""

        def delete() -> None:
            for later in [found for found in steps_in(self._directory) if found > step]:
                self._delete(later)

        processes.by_first(delete)

    def save(self, step: int, state: State, notes: CheckpointNotes) -> None:
        """Copy the state off the device and write it in the background.

        It waits for an earlier save. The arrays may be donated as soon as this returns.
        If a save fails, older checkpoints are unchanged.
        """
        self.wait()
        parts = {"state": state, "meta": manifests.of(state, notes).seal()}
        self._saving = step
        if not self._is_clean:
            processes.by_first(self._clean)
            self._is_clean = True

        def begin() -> None:
            folder = storage.absolute(self._directory / str(step))
            with interrupts.held_back():
                self._response = storage.orbax().save_checkpointables_async(folder, parts)

        self._try(begin)

    def restore(self, like: State) -> tuple[State, CheckpointNotes]:
        """Restore the newest checkpoint that is not damaged.

        Damaged ones that are newer are reported and renamed, so that their steps can be saved
        again. If every checkpoint is damaged, none is renamed.
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
        """Return a checkpoint, or a message about its damage; all processes return the same."""
        folder = storage.absolute(self._directory / str(step))
        if jax.process_count() > 1:
            # If all read a damaged checkpoint together, some would fail and the rest would wait.
            found = processes.everywhere(lambda: _damage(folder, abstract))
            if any(found):
                return next(filter(None, found))
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
            several = processes.LOST if jax.process_count() > 1 else processes.AGAIN
            raise LoraError(
                f"the checkpoint of step {self._saving} is lost; {kept}. {error}\n{several}"
            ) from error


def _read(folder: RemotePath, abstract: State) -> tuple[State, CheckpointNotes]:
    """Read a checkpoint; raise DamagedError, or LoraError if the run has another structure."""
    manifest = read_manifest(folder, math.inf, "state")
    _check_structure(folder, manifest, abstract)
    state = storage.load(folder, manifest, "state", abstract)
    # Orbax gives a scalar PRNG key the sharding of its data, which has an axis more.
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, abstract), manifest.notes


def _damage(folder: RemotePath, abstract: State) -> str:
    """Return a message about the damage that this process alone finds, "" if there is none.

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
            f"in full, or optimizer state); {len(rows)} differ:\n{listed(rows)}\n"
            "Give that run's config, or start afresh with --fresh."
        )


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
