"""The compiled functions of a group: its step, its evaluation, and the check of merged weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax import paths
from lora_jax.sweeps import batches
from lora_jax.sweeps.joint_workload import check_padding, joined
from lora_jax.sweeps.members import TX, OpenMember
from lora_jax.sweeps.padded_state import StateShapes
from lora_jax.sweeps.step import common_layout, group_step
from lora_jax.training import mesh, step
from lora_jax.training.config import MeshConfig, require
from lora_jax.training.evaluation import merged_difference


class GroupProgram:
    """The functions of a common layout and workload, compiled for each shape of their arguments.

    state_shapes: the shapes of one member's state, padded to the common shapes.
    marked: whether the batches contain the members' marks.
    """

    def __init__(
        self,
        members: Sequence[OpenMember],
        grid: jax.sharding.Mesh,
        config: MeshConfig,
        at_once: int | None,
        report: Callable[[float], None],
    ) -> None:
        """Join the members' workloads and layouts. Nothing is compiled yet."""
        parts = {member.config.accumulate for member in members}
        require(len(parts) == 1, "accumulate", sorted(parts), "the same for all members of a group")
        names = [member.name for member in members]
        rows = batches.together(names, [member.example for member in members])
        example = {name: x[0] for name, x in rows.items()}
        workload, self.marked = joined(members, example)
        check_padding(members, rows, workload, self.marked)
        self.layout = common_layout(member.run.setup.layout for member in members)
        self.place = mesh.place(workload, config, grid, example)
        first = members[0].state_shapes.like.trained["base"]
        common = paths.flatten(workload.params)
        base = {p: jax.ShapeDtypeStruct(common[p].shape, x.dtype) for p, x in first.items()}
        weights = step.adapted_weights(self.layout, workload.params)
        key = jax.random.key(0)
        state = step.shapes(self.layout, base, TX, key, self.place, weights)
        self.state_shapes = StateShapes(state)
        self._report, self._steps = report, dict[Any, jax.stages.Compiled]()
        rates = {member.config.adaptation.dropout for member in members}
        require(len(rates) == 1, "lora.dropout", sorted(rates), "the same for all at once")
        self._step = group_step(workload, self.layout, parts.pop(), at_once, rates.pop())
        loss, whole = step.evaluation_step(workload, self.layout), self.place.whole
        self.batch_loss = step.Compiled(loss, report, out_shardings=whole)
        # The layout's scales are 1, because the members' scales are multiplied into their factors.
        difference = merged_difference(workload, self.layout)
        self.difference = step.Compiled(difference, report, out_shardings=whole)

    def step(self, *arguments: Any) -> Any:
        """Run `group_step`, compiled for each number of members and each shape of a batch."""
        return self.compiled(*arguments)(*arguments)

    def compiled(self, *arguments: Any) -> jax.stages.Compiled:
        """Return the step compiled for the shapes of these arguments."""
        active, batch = arguments[2], arguments[4]
        shapes = (active.shape, *((name, x.shape) for name, x in sorted(batch.items())))
        if shapes not in self._steps:
            state = jax.tree.map(lambda x: x.sharding, arguments[0])
            whole = self.place.whole
            began = time.monotonic()
            jitted = jax.jit(self._step, donate_argnums=0, out_shardings=(state, whole))
            self._steps[shapes] = jitted.lower(*arguments).compile()
            self._report(time.monotonic() - began)
        return self._steps[shapes]
