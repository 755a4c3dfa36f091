"""A careless command: what it meets, and what it must say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Case:
    """One command and its expected end.

    Attributes:
      name: the name of the test.
      command: the words of the command line. {here} is the folder of `files`; {world} holds `lm`
        and `model`, tiny models, `run`, a classifier trained on `model`, and `good.jsonl`.
      says: phrases that stdout and stderr hold, with white space as single spaces.
      files: name -> content, which are written before. A content that begins with "-> " is a
        symbolic link.
      status: the expected exit status.
      out: name -> phrase that the written file of this name holds.
      extra: words that are added to the command line as they are.
    """

    name: str
    command: str
    says: tuple[str, ...]
    files: Mapping[str, str | bytes] = dataclasses.field(default_factory=dict)
    status: int = 1
    out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra: tuple[str, ...] = ()
