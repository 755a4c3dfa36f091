"""Train a group, from its config to the summaries of its members.

Each member writes the same files as if it trained alone: metrics, checkpoints from which `train.py`
can continue, exported adapters, the summary and the curves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.errors import LoraError
from lora_jax.sweeps import memory_fit
from lora_jax.sweeps.config import GroupConfig, short_hash
from lora_jax.sweeps.group import Group
from lora_jax.sweeps.group_checkpoints import GroupCheckpoint, GroupCheckpoints
from lora_jax.sweeps.members import Opener, OpenMember, workload_settings
from lora_jax.sweeps.progress import GroupDisplay, Lines
from lora_jax.system import whole_files
from lora_jax.system.console import Console
from lora_jax.training import directory, processes, sizes, summary
from lora_jax.training.checkpoints import steps_in
from lora_jax.training.config import Config, ConfigError, MeshConfig
from lora_jax.training.directory import Summary
from lora_jax.training.text import TextConfig

# If free slots would cost this many steps in total, the group is compiled again without them.
WORTH = 200


class StoppedError(LoraError):
    """Some members stopped at a step that is not finite; the others are finished.

    summaries: the summaries of the finished members.
    """

    def __init__(self, message: str, summaries: list[Summary]) -> None:
        super().__init__(message)
        self.summaries = summaries


def folder(name: str, config: GroupConfig) -> pathlib.Path:
    """Return the directory of a group: the config's, or runs/<config>-<hash of the members>."""
    return pathlib.Path(config.run_dir or f"runs/{name}-{short_hash(config)}")


def run(
    config: GroupConfig, grid: jax.sharding.Mesh, path: pathlib.Path, console: Console
) -> list[Summary]:
    """Train the members that are neither finished nor paused."""
    if jax.process_count() > 1:
        raise ConfigError(
            f"a group trains in one process, and there are {jax.process_count()}; start it with "
            "--processes.count 1, on the devices of one machine"
        )
    errors: dict[str, str] = {}
    whole_files.check_links(path, [member.name for member in config.members])
    with contextlib.ExitStack() as stack:
        waiting = {}
        for name, own in _configs(config, path).items():
            stack.enter_context(directory.enter(name, own))
            if directory.summary(path / name) is None:
                waiting[name] = directory.dated(path / name, own)
        while waiting:
            key = next(iter(waiting.values())).group_key
            alike = {name: own for name, own in waiting.items() if own.group_key == key}
            with _Loop(config, grid, path, console) as loop:
                done = loop.run(alike)
            errors |= {member.name: member.error for member in done if member.error}
            waiting = {n: own for n, own in waiting.items() if n not in {m.name for m in done}}
    found = [directory.summary(path / member.name) for member in config.members]
    summaries: list[Summary] = [summary for summary in found if summary is not None]
    if errors:
        lines = "\n".join(f"{name}: {error}" for name, error in errors.items())
        raise StoppedError(
            f"{len(errors)} of {len(config.members)} members stopped:\n{lines}", summaries
        )
    return summaries


def _configs(config: GroupConfig, path: pathlib.Path) -> dict[str, Config]:
    """Return the config of each member that does not wait, as a run in its own directory."""
    found = {}
    for member in config.members:
        own = member.config
        alone = {"--from": own.start_from is not None, "--profile": own.profile > 0}
        alone |= {"--samples.prompts": isinstance(own, TextConfig) and own.samples.prompts > 0}
        for option in (option for option, given in alone.items() if given):
            raise ConfigError(
                f"{option} is for one run, and {member.name!r} is a member of a group: train it "
                "alone"
            )
        if own.run_dir is not None or own.mesh != MeshConfig() or own.fresh:
            raise ConfigError(
                f"run_dir, mesh and fresh are set for a group as a whole, not for its member "
                f"{member.name!r}: give --run-dir, --mesh.* and --fresh"
            )
        if not config.waits(member):
            own = dataclasses.replace(own, mesh=config.mesh, fresh=config.fresh)
            found[member.name] = dataclasses.replace(own, run_dir=str(path / member.name))
    return found


class _Loop(contextlib.ExitStack):
    """Trains members together until all are finished."""

    def __init__(
        self, config: GroupConfig, grid: jax.sharding.Mesh, path: pathlib.Path, console: Console
    ) -> None:
        super().__init__()
        self._config, self._grid, self._path, self._console = config, grid, path, console
        self._checkpoints, self._said = GroupCheckpoints(path), set[str]()
        self._members: list[OpenMember] = []
        self._before: dict[Any, dict[str, dict[str, float]]] = {}

    def run(self, configs: dict[str, Config]) -> list[OpenMember]:
        """Train as many of these members as fit, until they are finished, and return them."""
        preemption = self.enter_context(processes.Preemption())
        every = min(config.log_every for config in configs.values())
        self._display = self.enter_context(GroupDisplay(self._console, every))
        opener = self.enter_context(Opener(self._grid, self._display.say))
        members = self._open(opener, configs)
        assert opener.base is not None
        config, frozen = self._config, opener.base.frozen
        group = Group(members, frozen, self._grid, config.mesh, config.at_once, self._stopped)
        self._members = self._fitting(group, frozen)
        for member in self._members:
            if not self._is_finished(member.name):
                self._start(group, member)
        self._train(group, preemption)
        return self._members

    def _open(self, opener: Opener, configs: dict[str, Config]) -> list[OpenMember]:
        """Open the members, at the newest checkpoint that all of them share if there is one."""
        there = {name: steps_in(self._path / name / "checkpoints") for name in configs}
        checkpoint = self._checkpoints.newest({n: steps for n, steps in there.items() if steps})
        slots = [] if checkpoint is None else checkpoint.slots
        steps = {} if checkpoint is None else checkpoint.steps
        # A member that had a slot gets it again even if it has finished since, so that the programs
        # are the same as before.
        members = {m.name: m.config for m in self._config.members}
        ended = {n: members[n] for n in slots if n in members and self._is_finished(n)}
        names = dict.fromkeys(name for name in slots if name in configs or name in ended)
        found = []
        for name in dict.fromkeys([*names, *configs]):
            own, newest = configs.get(name), steps.get(name)
            if own is None:
                own, newest = dataclasses.replace(ended[name], mesh=self._config.mesh), None
            found.append(opener.open(name, own, self._path / name, newest))
        return found

    def _fitting(self, group: Group, frozen: object) -> list[OpenMember]:
        """Return the members that fit on the devices; the others leave the group."""
        shared = float(sizes.on_each_device(frozen))
        count = len(group.members)
        with self._display.compiling(f"the step of {count} members"):
            needed = memory_fit.of_step(group.compiled())
        memory = self._config.memory or memory_fit.available(held=shared)
        found = memory_fit.fit(needed, shared, count, memory, at_once=group.at_once)
        if count > 1:
            self._display.say(str(found))
        if found.size < count:
            going = sorted(group.members, key=lambda member: member.left == 0)
            group.leave(*(member.name for member in going[found.size :]))
        return list(group.members)

    def _start(self, group: Group, member: OpenMember) -> None:
        run = member.run
        (run.setup.path / "error.txt").unlink(missing_ok=True)
        run.open(Lines(self._display, member.name))
        lines = summary.opening(run, group.state(member)).split("\n")
        for line in lines:
            if line not in self._said:  # members of a sweep print the same facts about the data
                self._display.say(line)
        self._said |= set(lines)
        if member.step == 0:
            # Adapters change nothing yet, so members with the same head and data score the same.
            own = member.config
            alike = workload_settings(own), own.seed, own.adaptation.trainable
            run.evaluate_before(group.batch_loss(member), self._before.get(alike))
            self._before[alike] = run.notes.before

    def _train(self, group: Group, preemption: processes.Preemption) -> None:
        tick = 0
        while True:
            for member in group.members:
                ended = member.left == 0 and member.error is None
                if ended and not self._is_finished(member.name):
                    self._finish(group, member)
            slots = _slots(group.members)
            if not slots:
                return
            gone = [m.name for m in group.members if m.name not in slots]
            if gone:
                group.leave(*gone)
            tick += 1
            moved = group.tick()
            steps = [(member.step, member.config.steps) for member in self._members]
            self._display.tick(tick, steps, [member.name for member in moved])
            due = [m for m in moved if m.step % m.config.evaluate_every == 0 or m.left == 0]
            stop = preemption.asked(tick)
            save = stop or any(m.step % m.config.checkpoint_every == 0 for m in moved)
            if due or save or any(m.left == 0 for m in moved):
                group.settle()
            for member in due:
                if member.error is None:
                    run, trained = member.run, functools.partial(group.trained, member)
                    run.validate(member.step, group.batch_loss(member), trained)
            if save or any(m.left == 0 for m in moved):
                self._save(group)
            if stop:
                raise processes.Preempted(f"every member of {self._path}")

    def _save(self, group: Group) -> None:
        """Write a checkpoint of every member that continues or has just finished."""
        saved = [m for m in group.members if m.error is None and not self._is_finished(m.name)]
        steps = {member.name: member.step for member in saved}
        self._checkpoints.add(GroupCheckpoint(steps, _slots(group.members)))
        for member in saved:
            member.run.checkpoint(member.step, group.state(member))
        if any(member.left == 0 for member in saved):
            for member in saved:  # once a summary is written, nothing can be continued
                member.run.checkpoints.wait()

    def _finish(self, group: Group, member: OpenMember) -> None:
        batch_loss = functools.partial(group.batch_loss, member)
        difference = functools.partial(group.difference, member)
        summary.conclude(member.run, group.state(member), batch_loss, difference, member.example)

    def _is_finished(self, name: str) -> bool:
        return directory.summary(self._path / name) is not None

    def _stopped(self, member: OpenMember) -> None:
        text = f"{member.name} stops: {member.error}"
        whole_files.write(member.run.setup.path / "error.txt", f"{text}\n".encode())
        self._display.say(text)


def _slots(members: Sequence[OpenMember]) -> list[str]:
    """Return the members that keep their slots for the next steps.

    Finished members keep theirs while the others have few steps left: a smaller program is compiled
    only if the free slots would cost `WORTH` steps or more.
    """
    left = [member.left for member in members]
    free = sum(steps == 0 for steps in left)
    if not any(left):
        return []
    worth = free * max(left) >= WORTH
    return [m.name for m, steps in zip(members, left, strict=True) if steps or not worth]
