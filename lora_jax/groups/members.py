"""The open members of a group: each is a run of its own over the shared base."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import paths
from lora_jax.checkpoint.fingerprint import Fingerprint, differences
from lora_jax.checkpoint.fingerprint import fingerprint as fingerprint_of
from lora_jax.errors import listed
from lora_jax.frozen import join, split
from lora_jax.groups.padded_state import HostState, StateShapes
from lora_jax.groups.step import Settings, is_plain
from lora_jax.layout import Layout
from lora_jax.resolve import resolve
from lora_jax.spec import LoraSpec
from lora_jax.training import beginning, mesh, optimizer, step
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.config import Config, ConfigError, OptimizerConfig
from lora_jax.training.config_json import to_dict
from lora_jax.training.run import Run, Setup
from lora_jax.training.workload import Batch, Workload

Tree = Any  # a pytree

# The state of the optimizer has one structure, whatever the settings.
TX = optimizer.adamw(optimizer.hyper(OptimizerConfig(), 1))


@dataclasses.dataclass(eq=False)
class OpenMember:
    """A member under way.

    state_shapes: of its state, in its own shapes.
    host: its state while no group holds it.
    example: its first batch.
    step: the steps it has taken.
    paused: it waits.
    error: why it has stopped, if it has.
    """

    name: str
    run: Run
    state_shapes: StateShapes
    host: HostState
    example: Batch
    step: int
    paused: bool = False
    error: str | None = None

    @property
    def config(self) -> Config:
        """Of its run."""
        return self.run.setup.config

    @property
    def left(self) -> int:
        """Steps that it will still take."""
        return 0 if self.error is not None else self.config.steps - self.step

    @property
    def live(self) -> bool:
        """Whether it takes part in the next step."""
        return self.left > 0 and not self.paused

    @property
    def marks(self) -> dict[str, Any]:
        """What its batches have in a group that is joined."""
        common = self.run.setup.workload.common
        return {} if common is None else dict(common.marks)

    def settings(self, layout: Layout) -> Settings:
        """Its settings, as scalars on the host, for the common layout."""
        own = {t.path: t.scale for t in self.run.setup.layout.targets}
        scales = {t.path: np.float32(own.get(t.path, 0)) for t in layout.targets}
        return Settings(
            optimizer.hyper(self.config.optimizer, self.config.steps),
            scales if is_plain(layout) else {},
            np.bool_(self.config.on_nonfinite == "skip"),
        )


@dataclasses.dataclass(frozen=True)
class SharedBase:
    """What the first member has brought, and all share.

    trainable: the parameters that the first member trains in full.
    """

    name: str
    workload: Workload
    trainable: dict[str, Any]
    frozen: Tree
    fingerprint: Fingerprint


# A workload, its placement, its first training batch, and the layouts on it by their specs.
OpenedWorkload = tuple[Workload, mesh.Placement, Batch, dict[LoraSpec, Layout]]


class Opener(contextlib.ExitStack):
    """Opens members, the first of which brings the base; it closes them as its block ends."""

    def __init__(self, grid: jax.sharding.Mesh, report: Callable[[str], None]) -> None:
        super().__init__()
        self._grid, self._report = grid, report
        self._workloads: dict[Any, OpenedWorkload] = {}
        self.base: SharedBase | None = None
        self._begun: beginning.Beginning | None = None

    def open(
        self, name: str, config: Config, path: pathlib.Path, newest: int | None = None
    ) -> OpenMember:
        """The member in the run directory `path`, at its newest checkpoint or its beginning.

        Args:
          newest: checkpoints of later steps than this are deleted first.

        Raises:
          ConfigError: it does not go together with the first.
        """
        began = time.monotonic()
        workload, place, example, layouts = self._opened(config)
        lora = config.adaptation
        patterns = workload.trainable if lora.trainable is None else lora.trainable
        trainable = self._trainable(name, workload, place, patterns)
        assert self.base is not None
        key, spec = jax.random.key(config.seed), lora.spec
        if spec not in layouts:
            layouts[spec] = resolve(
                spec, workload.apply, workload.params, example, train=True, key=key
            )
        layout = layouts[spec]
        step.check_apart(layout, trainable)
        workload, begun = self._begin(config, workload, layout, place, key, trainable)
        base = self.base
        weights = step.adapted_weights(layout, base.frozen)
        state_shapes = StateShapes(step.shapes(layout, trainable, TX, key, place, weights))
        setup = Setup(config, workload, place, layout, base.frozen, base.fingerprint, path, began)
        checkpoints = self.enter_context(Checkpoints(path / "checkpoints", report=self._report))
        if newest is not None:
            checkpoints.forget_after(newest)
        run = Run(setup, workload.train(mesh.shard_of(self._grid)), checkpoints)
        self.callback(run.close)
        where = jax.tree.map(lambda x: x.sharding, state_shapes.like)
        fresh = jax.jit(step.fresh(layout, TX, lora.init), out_shardings=where)
        new = checkpoints.latest is None
        state = run.begin(fresh(trainable, key, weights, begun) if new else state_shapes.like)
        return OpenMember(name, run, state_shapes, state_shapes.host(state), example, run.start)

    def _begin(
        self,
        config: Config,
        workload: Workload,
        layout: Layout,
        place: mesh.Placement,
        key: jax.Array,
        trainable: dict[str, Any],
    ) -> tuple[Workload, Tree | None]:
        """The adapters that a member begins with, if they are not drawn by chance.

        A method that changes the base changes it for all, once: they have the same `group_key`.
        """
        assert self.base is not None
        lora, base = config.adaptation, self.base
        if lora.changes_base and self._begun is not None:
            about = self._begun.workload.about
            return dataclasses.replace(workload, about=about), self._begun.adapters
        params = join(trainable, base.frozen)
        found = beginning.begin(lora, workload, layout, params, place, key)
        if lora.changes_base:
            frozen = split(found.params, tuple(trainable))[1] if trainable else found.params
            self.base = dataclasses.replace(base, frozen=frozen, fingerprint=fingerprint_of(frozen))
            self._begun = found
        return found.workload, found.adapters

    def _opened(self, config: Config) -> OpenedWorkload:
        """Opened once for members that differ in their adapters and settings alone."""
        known = (workload_settings(config), config.seed)
        if known in self._workloads:
            return self._workloads[known]
        workload = config.workload(config)
        example = next(workload.train(mesh.shard_of(self._grid)))
        place = mesh.place(workload, config.mesh, self._grid, example)
        opened = workload, place, example, dict[LoraSpec, Layout]()
        if workload.common is not None:
            self._workloads[known] = opened
        return opened

    def _trainable(
        self, name: str, workload: Workload, place: mesh.Placement, patterns: Sequence[str]
    ) -> dict[str, Any]:
        """The parameters that the member trains in full; the first brings the base."""
        base = self.base
        if base is None:
            params = workload.arrays(place.params)
            trainable, frozen = split(params, patterns)
            found = fingerprint_of(frozen)
            self.base = SharedBase(name, workload, trainable, frozen, found)
            return trainable
        shapes, frozen = split(workload.params, patterns)
        _check_alike(base, name, shapes, frozen)
        common, first = workload.common, base.workload.common
        if common is None or first is None:
            trainable, frozen = split(workload.arrays(place.params), patterns)
            if changed := differences(base.fingerprint, fingerprint_of(frozen)):
                raise ConfigError(
                    f"{base.name!r} and {name!r} have not the same base: {len(changed)} of its "
                    f"parameters differ:\n{listed(changed)}\na group trains over one base"
                )
            return trainable
        if common.base != first.base:
            raise ConfigError(
                f"{base.name!r} and {name!r} have not the same base: {first.base} and "
                f"{common.base}; a group trains over one base"
            )
        drawn, known = common.fresh(), paths.flatten(base.frozen)
        for path in drawn:
            if path in known and not np.array_equal(drawn[path], known[path]):
                raise ConfigError(
                    f"{base.name!r} and {name!r} have not the same base: {path!r} is drawn from "
                    "the seed and is not trained; train it (lora.trainable), or give both one seed"
                )
        return {p: drawn[p] if p in drawn else base.trainable[p] for p in shapes}


def _check_alike(base: SharedBase, name: str, trainable: dict[str, Any], frozen: Tree) -> None:
    """Raise unless the frozen parameters have the paths and shapes of the first's."""
    if list(trainable) != list(base.trainable):
        raise ConfigError(
            f"{base.name!r} and {name!r} train different parameters in full "
            f"(lora.trainable, or the method): {list(base.trainable)} and {list(trainable)}; in a "
            "group they are the same"
        )
    ours, theirs = paths.shapes(base.frozen), paths.shapes(frozen)
    for path in dict.fromkeys([*ours, *theirs]):
        if ours.get(path) != theirs.get(path):
            raise ConfigError(
                f"{base.name!r} and {name!r} have not the same base: {path!r} is "
                f"{ours.get(path, 'not there')} and {theirs.get(path, 'not there')}"
            )


def workload_settings(config: Config) -> str:
    """What of a config may change its model, data and loss: all but settings of the training."""
    values = to_dict(config)
    for field in dataclasses.fields(config):
        settings = ("lora", "optimizer", "seed", "steps", "evaluate_every")
        if field.metadata.get("incidental") or field.name in settings:
            del values[field.name]
    return str(values)
