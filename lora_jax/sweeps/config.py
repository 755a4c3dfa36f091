"""The config of a group: named runs, each an ordinary `Config`, that share one base."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from typing import ClassVar

import tyro

from lora_jax.errors import nearest
from lora_jax.system.checked import Checked
from lora_jax.training.config import (
    INCIDENTAL,
    Config,
    ConfigError,
    MeshConfig,
    ProcessesConfig,
    incidental,
    require,
)
from lora_jax.training.config_json import identity
from lora_jax.training.config_json import short_hash as hash_of


@dataclasses.dataclass(frozen=True)
class Member(Checked):
    """One run of a group."""

    name: str
    """The name of its folder in the group's directory."""
    config: Config
    """Its config."""
    paused: bool = False
    """Whether it is left out: it takes no step, and its files are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unfit = self.name.startswith(".") or any(sign in self.name for sign in "/\\")
        plain = bool(self.name) and not unfit
        require(plain, "the name of a member", self.name, "a folder's name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupOptions(Checked):
    """The options of a group as a whole; the subclasses define its members."""

    _bounds: ClassVar = {"above 0": ("memory",), "at least 1": ("at_once",)}

    only: tuple[str, ...] = incidental(())
    """Train only these members, and leave the others as they are. `rank=4,*` is every name that
    begins with rank=4. Empty: all members."""
    memory: float | None = incidental(None)
    """Bytes of device memory that a group may use. Members that do not fit are trained after the
    others. None: the memory of the device."""
    at_once: int | None = incidental(None)
    """Members that go through the model at the same time; the others follow in the same step, with
    the same results and less memory. None: 4 on a CPU, whose caches hold no more, and all members
    on other devices."""
    run_dir: str | None = incidental(None)
    """The folder of the members' run directories. None: runs/<config>-<hash of the members>."""
    fresh: bool = incidental(False)
    """Delete the earlier runs in the members' directories and start from step 0."""
    mesh: MeshConfig = dataclasses.field(default=MeshConfig(), metadata=INCIDENTAL)
    """The device mesh."""
    processes: ProcessesConfig = dataclasses.field(default=ProcessesConfig(), metadata=INCIDENTAL)
    """The processes of the run."""

    def expand(self) -> GroupConfig:
        """Return the group that these options describe."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig(GroupOptions):
    """A group given by its members, for `lora_jax.sweeps.group.run`."""

    members: tyro.conf.Suppress[tuple[Member, ...]]
    """The members. Each has the result that its config has alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.members), "members", self.members, "at least one")
        twice = [n for n, times in Counter(m.name for m in self.members).items() if times > 1]
        require(not twice, "the names of the members", twice, "each there once")
        names = [member.name for member in self.members]
        for pattern in self.only:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"only: {pattern!r} matches no member; nearest: "
                    f"{', '.join(nearest(pattern, names))}"
                )

    def expand(self) -> GroupConfig:
        """Return the group itself."""
        return self

    def waits(self, member: Member) -> bool:
        """Return whether a member is paused, or left out by `only`."""
        chosen = not self.only or any(fnmatch.fnmatchcase(member.name, p) for p in self.only)
        return member.paused or not chosen


def short_hash(config: GroupConfig) -> str:
    """Return eight characters that depend on the members' names and identities, in any order."""
    return hash_of({member.name: identity(member.config) for member in config.members})
