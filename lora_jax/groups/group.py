"""The group: members that take their steps together. They may change between two steps.

    group = Group(members, frozen, grid, config)
    group.tick()            every live member takes its next step
    group.member("a").paused = True    compiles nothing; nothing in its slot changes
    group.join(member)      compiles the step once more, for one member more
    group.leave("b")        likewise, for one less

A slot costs its share of every step, whether its member is live or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.errors import LoraError, listed, nearest
from lora_jax.groups import batches
from lora_jax.groups.group_program import GroupProgram
from lora_jax.groups.members import OpenMember
from lora_jax.groups.padded_state import HostState, only_trained, unstack
from lora_jax.groups.step import CPU_MEMBERS
from lora_jax.multi.stack import Scaled
from lora_jax.training.config import MeshConfig
from lora_jax.training.metrics import DelayedMetrics
from lora_jax.training.run import BatchLoss, NonFiniteError
from lora_jax.training.state import State, Trained
from lora_jax.training.workload import Loss

Tree = Any  # a pytree


class Group:
    """The members' states as one, and the programs that move them."""

    def __init__(
        self,
        members: Sequence[OpenMember],
        frozen: Tree,
        grid: jax.sharding.Mesh,
        config: MeshConfig,
        at_once: int | None = None,
        stopped: Callable[[OpenMember], None] = lambda member: None,
    ) -> None:
        """Stack the members' states.

        Args:
          frozen: the base that they share.
          at_once: members that a step takes through the model at once. None: `CPU_MEMBERS` on a
            CPU, all of them elsewhere.
          stopped: is told of a member that a step which is not finite has stopped.

        Raises:
          ConfigError: the members do not go together.
        """
        self.members: list[OpenMember] = []
        self._frozen, self._grid, self._config, self._stopped = frozen, grid, config, stopped
        on_cpu = grid.devices.flat[0].platform == "cpu"
        self._at_once = at_once or (CPU_MEMBERS if on_cpu else None)
        self._programs: dict[Any, GroupProgram] = {}
        self._program: GroupProgram
        self._evaluated_member: OpenMember | None = None
        self._delayed = DelayedMetrics()
        self._held: HostState | None = None
        self.compile_seconds = 0.0
        self._fill(members)

    @property
    def at_once(self) -> int:
        """Members that a step takes through the model at once."""
        return min(self._at_once or len(self.members), len(self.members))

    # ---- who is in it

    def join(self, member: OpenMember) -> None:
        """Give it a slot, after the others'.

        Raises:
          ConfigError: it does not go together with the others; the group is as it was.
        """
        self._fill([*self.members, member])

    def leave(self, *names: str) -> list[OpenMember]:
        """Take these members out, with their states as they are now."""
        gone = [self.member(name) for name in names]
        self._fill([member for member in self.members if member not in gone])
        return gone

    def member(self, name: str) -> OpenMember:
        """By its name."""
        for member in self.members:
            if member.name == name:
                return member
        known = [member.name for member in self.members]
        raise LoraError(f"no member {name!r}; nearest:\n{listed(nearest(name, known))}")

    # ---- steps

    def tick(self) -> list[OpenMember]:
        """Every live member takes its next step; they are returned."""
        if not any(member.live for member in self.members):
            return []
        began, compiled = time.monotonic(), self.compile_seconds
        lines, rows = [], list[Any]()
        for index, member in enumerate(self.members):
            if not member.live:
                rows.append(None)
                continue
            batch = next(member.run.data)
            member.step += 1
            lines.append((index, member, member.step, member.run.count(batch)))
            rows.append(self._marked(member, batch))
        state, values = self._program.step(*self._arguments(rows))
        self._state, self._held = state, None
        for line in self._delayed.push({"moved": lines}, values):
            self._report(**line)
        spent = time.monotonic() - began - (self.compile_seconds - compiled)
        for _, member, *_ in lines:
            member.run.notes.add("train", spent)
        return [member for _, member, *_ in lines]

    def settle(self) -> None:
        """Report every step taken so far, which waits for the devices."""
        began = time.monotonic()
        moving = set[OpenMember]()
        for line in self._delayed.flush():
            self._report(**line)
            moving |= {member for _, member, *_ in line["moved"]}
        for member in moving:
            member.run.notes.add("train", time.monotonic() - began)

    def compiled(self) -> jax.stages.Compiled:
        """The step, compiled for the members' first batches."""
        rows = [self._marked(member, member.example) for member in self.members]
        return self._program.compiled(*self._arguments(rows))

    # ---- single members

    def state(self, member: OpenMember) -> State:
        """Its state, in its own shapes."""
        return member.state_shapes.state(member.state_shapes.unpad(self._slot(member)))

    def trained(self, member: OpenMember) -> Trained:
        """What it trains, in its own shapes."""
        return member.state_shapes.trained(member.state_shapes.unpad(self._slot(member)))

    def batch_loss(self, member: OpenMember, trained: Trained | None = None) -> BatchLoss:
        """Return the loss of a batch for a member, by its parameters now or by `trained`."""
        program, frozen = self._program, self._frozen
        scales = member.settings(program.layout).scales
        scales, marks = jax.device_put(
            (scales, member.marks if program.marked else {}), program.place.whole
        )
        ours = self._padded(member, trained)
        scaled = {**ours, "adapters": Scaled(ours["adapters"], scales)} if scales else ours

        def batch_loss(batch: Any) -> Loss:
            self._evaluated_member = member
            found: Loss = program.batch_loss(scaled, frozen, {**batch, **marks})
            self._evaluated_member = None
            return found

        return batch_loss

    def difference(self, member: OpenMember, trained: Trained, batch: Any) -> float:
        """Largest |merged - unmerged| output of a member with `trained`, on a placed batch."""
        scales = member.settings(self._program.layout).scales
        ours = self._padded(member, trained)
        adapters = ours["adapters"]
        if scales:
            adapters = {p: f._replace(b=f.b * scales[p]) for p, f in adapters.items()}
        return float(self._program.difference({**ours, "adapters": adapters}, self._frozen, batch))

    # ---- within

    def _fill(self, members: Sequence[OpenMember]) -> None:
        """Give the members their slots, in this order."""
        if self.members:
            self.settle()
            for member in self.members:
                member.host = member.state_shapes.unpad(self._slot(member))
        if not members:
            self.members = []
            return
        found = self._program_of(members)
        padded = [found.state_shapes.pad(member.host) for member in members]
        state = found.state_shapes.stack(padded, self._grid)
        scalars = [member.settings(found.layout) for member in members]
        settings = jax.tree.map(lambda *xs: np.stack(xs), *scalars)
        self._settings = jax.device_put(settings, found.place.whole)
        self._state, self._program, self.members, self._held = state, found, list(members), None

    def _program_of(self, members: Sequence[OpenMember]) -> GroupProgram:
        """The one there is, where the members' common shapes are as before."""
        found = GroupProgram(members, self._grid, self._config, self._at_once, self._compiling)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), found.state_shapes.like)
        known = (found.layout, found.marked, str(shapes))
        return self._programs.setdefault(known, found)

    def _compiling(self, seconds: float) -> None:
        self.compile_seconds += seconds
        if self._evaluated_member is not None:
            self._evaluated_member.run.notes.compiling("evaluate")(seconds)
        else:
            for member in self.members:
                member.run.notes.add("compile", seconds)

    def _marked(self, member: OpenMember, batch: Any) -> Any:
        return {**batch, **member.marks} if self._program.marked else batch

    def _arguments(self, rows: Sequence[Any]) -> tuple[Any, ...]:
        names, place = [member.name for member in self.members], self._program.place
        active = jax.device_put(np.array([row is not None for row in rows]), place.whole)
        batch = batches.placed(place, batches.together(names, rows))
        return (self._state, self._settings, active, self._frozen, batch)

    def _slot(self, member: OpenMember) -> HostState:
        """Its state in the common shapes; all states are read at once, and once after a tick."""
        if self._held is None:
            self._held = self._program.state_shapes.host(self._state)
        return unstack(self._held, self.members.index(member))

    def _padded(self, member: OpenMember, trained: Trained | None) -> Trained:
        """`trained`, or what the member trains now, in the common shapes."""
        shapes = self._program.state_shapes
        if trained is None:
            return shapes.trained(self._slot(member))
        return shapes.trained(shapes.pad(member.state_shapes.host(only_trained(trained))))

    def _report(self, moved: list[tuple[int, OpenMember, int, int]], **values: list[Any]) -> None:
        """Write one tick: who moved (slot, member, step, units), and the values of all slots."""
        for index, member, step, units in moved:
            if member.error is None:
                own = {name: value[index] for name, value in values.items()}
                try:
                    member.run.report({"step": step, "units": units, **own})
                except NonFiniteError as error:
                    member.error = str(error)
                    self._stopped(member)
