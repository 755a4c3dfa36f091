"""The compiled functions of a group: its step, its evaluation, and the check of merged weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax import paths
from lora_jax.groups import batches
from lora_jax.groups.joint_workload import check_padding, joined
from lora_jax.groups.members import TX, OpenMember
from lora_jax.groups.padded_state import StateShapes
from lora_jax.groups.step import group_evaluation, group_step
from lora_jax.layout import Layout
from lora_jax.multi.stack import union
from lora_jax.training import mesh, step
from lora_jax.training.compiled import Compiled
from lora_jax.training.config import MeshConfig, require
from lora_jax.training.evaluation import merged_difference
from lora_jax.training.workload import Workload

Tree = Any  # a pytree


class GroupProgram:
    """The programs of a common layout and workload, each compiled for the shapes that it meets.

    form: of one member's state in the common shapes.
    marked: whether the batches carry the members' marks.
    """

    def __init__(
        self,
        workload: Workload,
        layout: Layout,
        state_shapes: StateShapes,
        place: mesh.Placement,
        parts: int,
        marked: bool,
        at_once: int | None,
        report: Callable[[float], None],
    ) -> None:
        self.layout, self.state_shapes, self.place, self.marked = (
            layout,
            state_shapes,
            place,
            marked,
        )
        self._report, self._steps = report, dict[Any, jax.stages.Compiled]()
        self._step = group_step(workload, layout, parts, at_once)
        self.batch_loss = Compiled(
            group_evaluation(workload, layout), report, out_shardings=place.whole
        )
        # The members' scales are put into their factors, for the layout's scale is 1.
        self.difference = Compiled(
            merged_difference(workload, layout), report, out_shardings=place.whole
        )

    def step(self, *arguments: Any) -> Any:
        """Of `group_step`; compiled for each number of members and each shape of a batch."""
        return self.compiled(*arguments)(*arguments)

    def compiled(self, *arguments: Any) -> jax.stages.Compiled:
        """The step for such arguments."""
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


def program(
    members: Sequence[OpenMember],
    grid: jax.sharding.Mesh,
    config: MeshConfig,
    at_once: int | None,
    report: Callable[[float], None],
) -> GroupProgram:
    """The program of these members; `at_once` as in `group_step`.

    Raises:
      ConfigError: they do not go together.
    """
    names = [member.name for member in members]
    parts = {member.config.accumulate for member in members}
    require(len(parts) == 1, "accumulate", sorted(parts), "the same for all members of a group")
    rows = batches.together(names, [member.example for member in members])
    example = {name: x[0] for name, x in rows.items()}
    workload, marked = joined(members, example)
    check_padding(members, workload, marked)
    layout = union(member.run.setup.layout for member in members)
    place = mesh.place(workload, config, grid, example)
    first = members[0].state_shapes.like.trained["base"]
    shapes = paths.flatten(workload.params)
    base = {path: jax.ShapeDtypeStruct(shapes[path].shape, x.dtype) for path, x in first.items()}
    state_shapes = StateShapes(step.shapes(layout, base, TX, jax.random.key(0), place))
    return GroupProgram(workload, layout, state_shapes, place, parts.pop(), marked, at_once, report)
