"""Where a killed run goes on: the trained arrays, the optimizer, and notes. Never a base weight.

Each checkpoint holds the arrays of one `State` (adapters, parameters trained beside them,
optimizer, step, PRNG key) and, as JSON that can be read without them, the notes: config, layout,
iterator state, the best evaluation so far, the length of the record.
"""

from __future__ import annotations

import json
import pathlib
from types import TracebackType
from typing import Any

import jax

from lora_jax.checkpoint import ocp
from lora_jax.training.step import State

Notes = dict[str, Any]  # JSON values


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one when it closes."""

    def __init__(self, directory: pathlib.Path, keep: int = 2) -> None:
        """Open the folder, made if need be; what a kill left half-written is deleted."""
        policies = ocp.training.preservation_policies
        self._orbax = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._orbax.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    def save(self, step: int, state: State, notes: Notes) -> None:
        """Copy the state off the device and write it in the background.

        The arrays may be donated as soon as this returns. It waits for an earlier save.
        """
        self._orbax.save_checkpointables_async(
            step, {"state": state}, force=True, custom_metadata={"notes": json.dumps(notes)}
        )

    def restore(self, like: State) -> tuple[State, Notes]:
        """The newest checkpoint, in the structure, dtypes and shardings of `like`."""
        abstract = jax.tree.map(_abstract, like)
        step = self.latest
        metadata = self._orbax.checkpointables_metadata(step).custom_metadata
        state = self._orbax.load_checkpointables(step, {"state": abstract})["state"]
        return state, json.loads(metadata["notes"])


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
