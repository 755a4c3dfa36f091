"""The config of a group: named runs, each an ordinary `Config`, that share one base."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter

import tyro

from lora_jax.errors import nearest
from lora_jax.training.config import (
    INCIDENTAL,
    Config,
    ConfigError,
    MeshConfig,
    ProcessesConfig,
    incidental,
    require,
)
from lora_jax.training.config_json import short_hash as hash_of
from lora_jax.training.config_json import stable_identity


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a group; its directory is the group's, then `name`."""

    name: str
    config: Config
    paused: bool = False
    """Whether it waits: what it has is kept, and it takes no step."""

    def __post_init__(self) -> None:
        unfit = self.name.startswith(".") or any(sign in self.name for sign in "/\\")
        plain = bool(self.name) and not unfit
        require(plain, "the name of a member", self.name, "a folder's name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """What is said of a group as a whole; what its members are is said in the subclasses."""

    only: tuple[str, ...] = incidental(())
    """Train these members (`rank=4,*` is all whose name begins so) and leave the others as they
    are. Empty: all."""
    memory: float | None = incidental(None)
    """Bytes of a device that a group may take; members beyond it train after the others. None:
    what the device has."""
    at_once: int | None = incidental(None)
    """Members that go through the model at once, the others after them in the same step: the same
    results in less memory. None: 4 on a CPU, whose caches hold no more, and all elsewhere."""
    run_dir: str | None = incidental(None)
    """Where the members' run directories are. None: runs/<config>-<hash of the members>."""
    fresh: bool = incidental(False)
    """Delete what earlier runs left in the members' directories and start from step 0."""
    mesh: MeshConfig = dataclasses.field(default=MeshConfig(), metadata=INCIDENTAL)
    """The layout of the devices."""
    processes: ProcessesConfig = dataclasses.field(default=ProcessesConfig(), metadata=INCIDENTAL)
    """The processes of the run."""

    def __post_init__(self) -> None:
        require(self.memory is None or self.memory > 0, "memory", self.memory, "above 0")
        require(self.at_once is None or self.at_once > 0, "at_once", self.at_once, "at least 1")

    def expand(self) -> GroupConfig:
        """The group that these options stand for."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig(GroupOptions):
    """A group by its members: what `lora_jax.groups.run` is given."""

    members: tyro.conf.Suppress[tuple[Member, ...]]
    """Each is what its config says it is when it trains alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.members), "members", self.members, "at least one")
        twice = [n for n, times in Counter(m.name for m in self.members).items() if times > 1]
        require(not twice, "the names of the members", twice, "each there once")
        names = [member.name for member in self.members]
        for pattern in self.only:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"only: {pattern!r} is no member; nearest: {', '.join(nearest(pattern, names))}"
                )

    def expand(self) -> GroupConfig:
        """The group itself."""
        return self

    def waits(self, member: Member) -> bool:
        """Whether a member is paused, or left out by `only`."""
        chosen = not self.only or any(fnmatch.fnmatchcase(member.name, p) for p in self.only)
        return member.paused or not chosen


def short_hash(config: GroupConfig) -> str:
    """Return eight characters that differ when a member's name or identity does, in any order."""
    return hash_of({member.name: stable_identity(member.config) for member in config.members})
