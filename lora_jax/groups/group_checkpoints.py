"""Checkpoints of all members at one moment, so that a group goes on exactly where it was.

Each member has its own checkpoints, as when it trains alone. If the group is killed while they are
written, some have that of the last moment and some only that of the one before. cuts.json says
which belong together: of the last few moments, the step of each member, and who had a slot. A group
that goes on takes the newest moment of which every checkpoint is there, and so ends with the bits
that it would have had without the kill. Where there is none (a member was trained on alone, or has
failed), each member goes on from its own newest checkpoint: the same runs, but for rounding.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

from lora_jax.training.directory import write_json

_KEPT = 3  # moments; the checkpoints of the last two are kept


@dataclasses.dataclass(frozen=True)
class Cut:
    """One moment.

    steps: of each member that was checkpointed at it.
    slots: the members that had a slot after it, in their order; some may have taken all steps.
    """

    steps: dict[str, int]
    slots: list[str]


class Cuts:
    """The last moments of a group, in cuts.json of its directory."""

    def __init__(self, path: pathlib.Path) -> None:
        """Read those that an earlier run of the group has left, if any."""
        self._file = path / "cuts.json"
        text = self._file.read_text() if self._file.is_file() else "[]"
        self._cuts = [Cut(**cut) for cut in json.loads(text)]

    def add(self, cut: Cut) -> None:
        """Say which checkpoints will belong together, before they are written."""
        self._cuts = [*self._cuts, cut][-_KEPT:]
        write_json(self._file, [dataclasses.asdict(cut) for cut in self._cuts])

    def newest(self, there: Mapping[str, Sequence[int]]) -> Cut | None:
        """The newest moment that all these members can go back to.

        Args:
          there: member -> the steps of its checkpoints, of all that are to go on and have one.
        """
        for cut in reversed(self._cuts if there else []):
            if all(cut.steps.get(name) in steps for name, steps in there.items()):
                return cut
        return None
