"""A group of members that take their steps together. The members may change between two steps.

    group = Group(members, frozen, grid, config)
    group.tick()            every live member takes its next step
    group.member("a").paused = True    compiles nothing; its slot no longer changes
    group.join(member)      adds a member, and compiles the step again
    group.leave("b")        removes a member, and compiles the step again

A slot costs its share of every step even if its member is not live.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.multi.stack import Scaled
from lora_jax.paths import Tree
from lora_jax.sharding import gathered
from lora_jax.sweeps import batches
from lora_jax.sweeps.group_program import GroupProgram
from lora_jax.sweeps.members import BASE_ALONE, OpenMember
from lora_jax.sweeps.padded_state import HostState, only_trained, unstack
from lora_jax.sweeps.step import CPU_MEMBERS
from lora_jax.training.config import MeshConfig
from lora_jax.training.metrics import DelayedMetrics
from lora_jax.training.open_run import BatchLoss, NonFiniteError
from lora_jax.training.state import State, Trained
from lora_jax.training.step import Compiled, reference_step
from lora_jax.training.workload import Loss


class Group:
    """The stacked states of the members, and the programs that update them."""

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
          members: the members.
          frozen: the base that they share.
          grid: the device mesh.
          config: the config of the mesh.
          at_once: members that go through the model at the same time. None: `CPU_MEMBERS` on a CPU,
            all of them on other devices.
          stopped: called with a member that is stopped by a step that is not finite.

        Raises:
          ConfigError: the members do not fit together.
        """
        self.members: list[OpenMember] = []
        self._frozen, self._grid = gathered(frozen), grid
        self._config, self._stopped = config, stopped
        on_cpu = grid.devices.flat[0].platform == "cpu"
        self._at_once = at_once or (CPU_MEMBERS if on_cpu else None)
        self._programs: dict[Any, GroupProgram] = {}
        self._program: GroupProgram
        self._evaluated_member: OpenMember | None = None
        self._refer: Compiled | None = None
        self._delayed = DelayedMetrics()
        self._held: HostState | None = None
        self.compile_seconds = 0.0
        self._fill(members)

    @property
    def at_once(self) -> int:
        """The number of members that go through the model at the same time."""
        return min(self._at_once or len(self.members), len(self.members))

    # ---- the members

    def join(self, member: OpenMember) -> None:
        """Add a member after the others.

        Raises:
          ConfigError: it does not fit together with the others; the group is unchanged.
        """
        self._fill([*self.members, member])

    def leave(self, *names: str) -> list[OpenMember]:
        """Remove members and return them, with their current states."""
        gone = [self.member(name) for name in names]
        self._fill([member for member in self.members if member not in gone])
        return gone

    def member(self, name: str) -> OpenMember:
        for member in self.members:
            if member.name == name:
                return member
        known = [member.name for member in self.members]
        raise LoraError(f"no member {name!r}; nearest:\n{listed(nearest(name, known))}")

    # ---- steps

    def tick(self) -> list[OpenMember]:
        """Let every live member take its next step, and return these members."""
        if not any(member.live for member in self.members):
            return []
        began, compiled = time.monotonic(), self.compile_seconds
        lines, rows = [], list[Any]()
        for index, member in enumerate(self.members):
            if not member.live:
                rows.append(None)
                continue
            batch = self._referred(member, next(member.run.data))
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
        """Report every step taken so far. This waits for the devices."""
        began = time.monotonic()
        moving = set[OpenMember]()
        for line in self._delayed.flush():
            self._report(**line)
            moving |= {member for _, member, *_ in line["moved"]}
        for member in moving:
            member.run.notes.add("train", time.monotonic() - began)
        for member in self.members[:1]:
            member.references.write()

    def compiled(self) -> jax.stages.Compiled:
        """Return the step, compiled for the first batches of the members."""
        rows = [self._marked(member, member.example) for member in self.members]
        return self._program.compiled(*self._arguments(rows))

    # ---- single members

    def state(self, member: OpenMember) -> State:
        """Return the state of a member, in its own shapes."""
        return member.state_shapes.state(member.state_shapes.unpad(self._slot(member)))

    def trained(self, member: OpenMember) -> Trained:
        """Return the trained parameters of a member, in its own shapes."""
        return member.state_shapes.trained(member.state_shapes.unpad(self._slot(member)))

    def batch_loss(self, member: OpenMember, trained: Trained | None = None) -> BatchLoss:
        """Return the loss function of a member with its current parameters, or with `trained`."""
        program, frozen = self._program, self._frozen
        own = member.settings(program.layout).scales, member.marks if program.marked else {}
        scales, marks = jax.device_put(own, program.place.whole)
        ours = self._padded(member, trained)
        scaled = {**ours, "adapters": Scaled(ours["adapters"], scales)} if scales else ours

        def batch_loss(batch: Any) -> Loss:
            self._evaluated_member = member
            batch = self._referred(member, batch)
            found: Loss = program.batch_loss(scaled, frozen, {**batch, **marks})
            self._evaluated_member = None
            return found

        return batch_loss

    def difference(self, member: OpenMember, trained: Trained, batch: Any) -> float:
        """Return the largest |merged - unmerged| output of a member on a placed batch."""
        scales = member.settings(self._program.layout).scales
        ours = self._padded(member, trained)
        adapters = ours["adapters"]
        if scales:
            adapters = {p: f._replace(b=f.b * scales[p]) for p, f in adapters.items()}
        return float(self._program.difference({**ours, "adapters": adapters}, self._frozen, batch))

    # ---- private

    def _fill(self, members: Sequence[OpenMember]) -> None:
        """Stack these members, in this order."""
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
        """Return the program of the members; if their common shapes are known, the existing one."""
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

    def _referred(self, member: OpenMember, batch: Any) -> Any:
        """Return a batch with the reference by the base alone, if the loss has a reference."""
        setup, frozen = member.run.setup, self._frozen
        if setup.workload.reference is None:
            return batch
        if self._refer is None:
            self._refer = Compiled(reference_step(setup.workload, Layout(())), self._compiling)
        refer = self._refer
        second = lambda rows: refer(BASE_ALONE, frozen, setup.place.batch(rows))  # noqa: E731
        own = np.asarray(member.references.values(batch, second))
        member.references.learn()  # the next member has the same examples
        return {**batch, "reference": own}

    def _marked(self, member: OpenMember, batch: Any) -> Any:
        return {**batch, **member.marks} if self._program.marked else batch

    def _arguments(self, rows: Sequence[Any]) -> tuple[Any, ...]:
        names, place = [member.name for member in self.members], self._program.place
        active = jax.device_put(np.array([row is not None for row in rows]), place.whole)
        batch = batches.placed(place, batches.together(names, rows))
        return (self._state, self._settings, active, self._frozen, batch)

    def _slot(self, member: OpenMember) -> HostState:
        """Return a member's state in the common shapes; all states are read once after a tick."""
        if self._held is None:
            self._held = self._program.state_shapes.host(self._state)
        return unstack(self._held, self.members.index(member))

    def _padded(self, member: OpenMember, trained: Trained | None) -> Trained:
        """Return `trained`, or the member's current parameters, in the common shapes."""
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
