"""The open members of a group. Each is a run of its own with the shared base."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import paths
from lora_jax.checkpoint.fingerprint import Fingerprint, differences
from lora_jax.checkpoint.fingerprint import fingerprint as fingerprint_of
from lora_jax.errors import listed
from lora_jax.frozen import join, split
from lora_jax.layout import Layout
from lora_jax.paths import Tree
from lora_jax.resolve import resolve
from lora_jax.spec import LoraSpec
from lora_jax.sweeps.padded_state import HostState, StateShapes
from lora_jax.sweeps.step import Settings, is_plain
from lora_jax.training import initial, mesh, optimizer, reference_cache, step
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.config import Config, ConfigError, OptimizerConfig
from lora_jax.training.config_file import workload_of
from lora_jax.training.config_json import to_dict
from lora_jax.training.open_run import Run, Setup
from lora_jax.training.workload import Batch, Workload

# The structure of the optimizer state does not depend on the settings.
TX = optimizer.adamw(optimizer.hyper(OptimizerConfig(), 1))
BASE_ALONE: Any = {"base": {}, "adapters": {}}  # as `State.trained`


@dataclasses.dataclass(eq=False)
class OpenMember:
    """A member in progress.

    host: its state while it is in no group.
    references: the values of the reference, which all members of a group share.
    error: the reason why it stopped, if it did.
    """

    name: str
    run: Run
    state_shapes: StateShapes
    host: HostState
    example: Batch
    step: int
    references: reference_cache.ReferenceCache
    paused: bool = False
    error: str | None = None

    @property
    def config(self) -> Config:
        return self.run.setup.config

    @property
    def left(self) -> int:
        """The number of steps that it will still take."""
        ended = self.error is not None or self.run.is_over
        return 0 if ended else self.config.steps - self.step

    @property
    def live(self) -> bool:
        """Whether it takes part in the next step."""
        return self.left > 0 and not self.paused

    @property
    def marks(self) -> dict[str, Any]:
        """The arrays that are added to its batches if the workload of the group is joined."""
        common = self.run.setup.workload.common
        return {} if common is None else dict(common.marks)

    def settings(self, layout: Layout) -> Settings:
        """Return its settings for the common layout, as scalars on the host."""
        own = {t.path: t.scale for t in self.run.setup.layout.targets}
        scales = {t.path: np.float32(own.get(t.path, 0)) for t in layout.targets}
        return Settings(
            optimizer.hyper(self.config.optimizer, self.config.steps),
            scales if is_plain(layout) else {},
            np.bool_(self.config.on_nonfinite == "skip"),
        )


@dataclasses.dataclass(frozen=True)
class SharedBase:
    """The base, which the first member loads and all share.

    trainable: the parameters that the first member trains in full.
    """

    name: str
    workload: Workload
    trainable: dict[str, Any]
    frozen: Tree
    fingerprint: Fingerprint


# A workload, its placement, its first training batch, and the layouts that specs resolve to on it.
OpenedWorkload = tuple[Workload, mesh.Placement, Batch, dict[LoraSpec, Layout]]


class Opener(contextlib.ExitStack):
    """Opens members, of which the first loads the base, and closes them when its block ends."""

    def __init__(self, grid: jax.sharding.Mesh, report: Callable[[str], None]) -> None:
        super().__init__()
        self._grid, self._report = grid, report
        self._workloads: dict[Any, OpenedWorkload] = {}
        self.base: SharedBase | None = None
        self._references: reference_cache.ReferenceCache | None = None
        self._changed: tuple[Mapping[str, Any], Tree] | None = None  # `about`, adapters

    def open(
        self, name: str, config: Config, path: pathlib.Path, newest: int | None = None
    ) -> OpenMember:
        """Open the member in the run directory `path`, at its newest checkpoint or at step 0.

        Checkpoints of later steps than `newest` are deleted first.
        """
        began = time.monotonic()
        workload, place, example, layouts = self._opened(config)
        lora = config.adaptation
        patterns = workload.trainable if lora.trainable is None else lora.trainable
        trainable = self._trainable(name, workload, place, patterns)
        assert self.base is not None
        key, spec = jax.random.key(config.seed), lora.spec
        if (layout := layouts.get(spec)) is None:
            how = {"train": True, "key": key}
            layout = layouts[spec] = resolve(spec, workload.apply, workload.params, example, **how)
        step.check_apart(layout, trainable)
        if workload.reference is not None and (lora.changes_base or trainable):
            raise ConfigError(
                f"{name}: members of a group share the base alone as their reference, so it may "
                f"not change: got lora.init {lora.init!r} and {len(trainable)} parameters trained "
                "in full (lora.trainable); train each by itself"
            )
        workload, adapters = self._changed_base(config, workload, layout, place, key, trainable)
        base = self.base
        weights = step.adapted_weights(layout, base.frozen)
        state_shapes = StateShapes(step.shapes(layout, trainable, TX, key, place, weights))
        setup = Setup(config, workload, place, layout, base.frozen, base.fingerprint, path, began)
        if self._references is None:
            alone, start = dataclasses.replace(setup, layout=Layout(())), BASE_ALONE
            opened = reference_cache.opened(alone, start, self._report)
            self._references = opened or reference_cache.ReferenceCache(None)
        checkpoints = self.enter_context(Checkpoints(path / "checkpoints", report=self._report))
        if newest is not None:
            checkpoints.forget_after(newest)
        run = Run(setup, workload.train(mesh.shard_of(self._grid)), checkpoints)
        self.callback(run.close)
        where = jax.tree.map(lambda x: x.sharding, state_shapes.like)
        fresh = jax.jit(step.fresh(layout, TX, lora.init), out_shardings=where)
        new = checkpoints.latest is None
        state = run.resume(fresh(trainable, key, weights, adapters) if new else state_shapes.like)
        host, known = state_shapes.host(state), self._references
        return OpenMember(name, run, state_shapes, host, example, run.start, known)

    def _changed_base(
        self,
        config: Config,
        workload: Workload,
        layout: Layout,
        place: mesh.Placement,
        key: jax.Array,
        trainable: dict[str, Any],
    ) -> tuple[Workload, Tree | None]:
        """Return the workload and the adapters to begin with; None if they are drawn at random.

        A method that changes the base changes it once for all members of the same `group_key`.
        """
        assert self.base is not None
        lora, base = config.adaptation, self.base
        if lora.changes_base and self._changed is not None:
            about, adapters = self._changed
            return dataclasses.replace(workload, about=about), adapters
        params = join(trainable, base.frozen)
        workload, params, adapters = initial.changed_base(
            lora, workload, layout, params, place, key
        )
        if lora.changes_base:
            frozen = split(params, tuple(trainable))[1] if trainable else params
            self.base = dataclasses.replace(base, frozen=frozen, fingerprint=fingerprint_of(frozen))
            self._changed = workload.about, adapters
        return workload, adapters

    def _opened(self, config: Config) -> OpenedWorkload:
        """Open a workload, once for members that differ only in their adapters and settings."""
        known = (workload_settings(config), config.seed)
        if known in self._workloads:
            return self._workloads[known]
        workload = workload_of(config)
        example = next(workload.train(mesh.shard_of(self._grid)))
        place = mesh.place(workload, config.mesh, self._grid, example)
        opened = workload, place, example, dict[LoraSpec, Layout]()
        if workload.common is not None:
            self._workloads[known] = opened
        return opened

    def _trainable(
        self, name: str, workload: Workload, place: mesh.Placement, patterns: Sequence[str]
    ) -> dict[str, Any]:
        """Return the parameters that a member trains in full; the first one loads the base."""
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
                said = f"{len(changed)} of its parameters differ:\n{listed(changed)}"
                raise _other_base(base, name, said)
            return trainable
        if common.base != first.base:
            raise _other_base(base, name, f"{first.base} and {common.base}")
        drawn, known = common.fresh(), paths.flatten(base.frozen)
        for path in drawn:
            if path in known and not np.array_equal(drawn[path], known[path]):
                cure = "train it (lora.trainable), or give both one seed"
                said = f"{path!r} is drawn from the seed and not trained; {cure}"
                raise _other_base(base, name, said)
        return {p: drawn[p] if p in drawn else base.trainable[p] for p in shapes}


def _check_alike(base: SharedBase, name: str, trainable: dict[str, Any], frozen: Tree) -> None:
    """Raise unless the parameters have the paths and shapes of the first member's."""
    if list(trainable) != list(base.trainable):
        raise ConfigError(
            f"{base.name!r} and {name!r} train different parameters in full "
            f"(lora.trainable, or the method): {list(base.trainable)} and {list(trainable)}; in a "
            "group they must be the same"
        )
    ours, theirs = paths.shapes(base.frozen), paths.shapes(frozen)
    for path in dict.fromkeys([*ours, *theirs]):
        if ours.get(path) != theirs.get(path):
            both = f"{ours.get(path, 'missing')} and {theirs.get(path, 'missing')}"
            raise _other_base(base, name, f"{path!r} is {both}")


def _other_base(base: SharedBase, name: str, why: str) -> ConfigError:
    return ConfigError(
        f"{base.name!r} and {name!r} do not have the same base: {why}\na group trains on one base"
    )


def workload_settings(config: Config) -> str:
    """Return the fields of a config that may change its model, data and loss, as text."""
    values = to_dict(config)
    for field in dataclasses.fields(config):
        settings = ("lora", "optimizer", "seed", "steps", "evaluate_every")
        if field.metadata.get("incidental") or field.name in settings:
            del values[field.name]
    return str(values)
