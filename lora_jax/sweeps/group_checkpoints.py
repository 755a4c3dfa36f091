"""Checkpoints of a whole group: which checkpoints of its members belong together.

Each member has its own checkpoints, as if it trained alone. If the group is killed while they are
written, some members have the newest one and some only the one before. checkpoints.json lists which
belong together: for the last few times, the step of each member, and the members that had a slot. A
group that continues uses the newest entry whose checkpoints all exist, so it ends with the bits of
a group without the kill. If there is none (because a member was trained alone or has failed), each
member continues from its own newest checkpoint: the results are the same except for rounding.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from lora_jax.errors import LoraError
from lora_jax.system import json_file, regular_files
from lora_jax.system.whole_files import write_json

_LISTED = 3  # entries of checkpoints.json; the members keep their last two checkpoints


@dataclasses.dataclass(frozen=True)
class GroupCheckpoint:
    """The checkpoints of the members at one time.

    steps: member -> the step of its checkpoint.
    slots: the members that had a slot in the group afterwards, in order; some of them may have
      taken all their steps.
    """

    steps: dict[str, int]
    slots: list[str]


class GroupCheckpoints:
    """The last checkpoints of a group, which checkpoints.json in its directory lists."""

    def __init__(self, path: pathlib.Path) -> None:
        """Read the list that an earlier run of the group has written, if there is one."""
        self._file = path / "checkpoints.json"
        text = regular_files.read(self._file, LoraError) if self._file.exists() else b"[]"
        found = json_file.parse(text, str(self._file), LoraError)
        try:
            self._checkpoints = [GroupCheckpoint(**checkpoint) for checkpoint in found]
        except TypeError as error:
            raise LoraError(f"{self._file} is not a list of checkpoints: {error}") from error

    def add(self, checkpoint: GroupCheckpoint) -> None:
        """Add a checkpoint to the list, before the members write theirs."""
        self._checkpoints = [*self._checkpoints, checkpoint][-_LISTED:]
        write_json(self._file, [dataclasses.asdict(checkpoint) for checkpoint in self._checkpoints])

    def newest(self, there: Mapping[str, Sequence[int]]) -> GroupCheckpoint | None:
        """Return the newest checkpoint that all these members have, or None; forget later ones."""
        for count in range(len(self._checkpoints), 0, -1) if there else ():
            checkpoint = self._checkpoints[count - 1]
            if all(checkpoint.steps.get(name) in steps for name, steps in there.items()):
                # With the later ones, the list would lack this one after a few more kills.
                self._checkpoints = self._checkpoints[:count]
                return checkpoint
        return None
