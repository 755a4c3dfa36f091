"""Checkpoints of a whole group: which checkpoints of its members belong together.

Each member has its own checkpoints, as when it trains alone. If the group is killed while they are
written, some have that of the last moment and some only that of the one before. cuts.json says
which belong together: of the last few moments, the step of each member, and who had a slot. A group
that goes on takes the newest moment of which every checkpoint is there, and so ends with the bits
that it would have had without the kill. Where there is none (a member was trained on alone, or has
failed), each member goes on from its own newest checkpoint: the same runs, but for rounding.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from lora_jax import json_file
from lora_jax.errors import LoraError
from lora_jax.training.directory import write_json

_LISTED = 3  # the members keep their last two checkpoints


@dataclasses.dataclass(frozen=True)
class GroupCheckpoint:
    """The checkpoints of the members at one moment.

    steps: member -> the step of its checkpoint.
    slots: the members that had a slot in the group afterwards, in their order; some of them may
      have taken all their steps.
    """

    steps: dict[str, int]
    slots: list[str]


class GroupCheckpoints:
    """The last checkpoints of a group, as cuts.json in its directory lists them."""

    def __init__(self, path: pathlib.Path) -> None:
        """Read the list that an earlier run of the group has left, if there is one."""
        self._file = path / "cuts.json"
        text = self._file.read_bytes() if self._file.is_file() else b"[]"
        found = json_file.parse(text, str(self._file), LoraError)
        try:
            self._checkpoints = [GroupCheckpoint(**checkpoint) for checkpoint in found]
        except TypeError as error:
            raise LoraError(f"{self._file} is no list of checkpoints: {error}") from error

    def add(self, checkpoint: GroupCheckpoint) -> None:
        """List a checkpoint, before the members write theirs."""
        self._checkpoints = [*self._checkpoints, checkpoint][-_LISTED:]
        write_json(self._file, [dataclasses.asdict(checkpoint) for checkpoint in self._checkpoints])

    def newest(self, there: Mapping[str, Sequence[int]]) -> GroupCheckpoint | None:
        """Return the newest checkpoint that all these members have, or None.

        Args:
          there: member -> the steps of its checkpoints, of all that are to go on and have one.
        """
        for checkpoint in reversed(self._checkpoints if there else []):
            if all(checkpoint.steps.get(name) in steps for name, steps in there.items()):
                return checkpoint
        return None
